"""The API in a real Jupyter kernel: notebooks run in miniature and are committed with the outputs of a whole run, and
the stop button leaves a run that goes on."""

from __future__ import annotations

import getpass
import json
import re
import socket

import pytest

from tests import notebooks
from tests.unit.api.conftest import FAST

pytest.importorskip("ipykernel")
nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
pytestmark = pytest.mark.filterwarnings("default")  # of the kernel's packages
MINIATURE = {
    "first_run": {"epochs": 3},
    "own_data": {"epochs": 2},
    "compare_losses": {"losses": ["supcon_out", "simclr"], "seeds": 2, "epochs": 2},
    "prune_and_export": {"epochs": 2, "rates": [0.5, 0.9], "methods": ["l1"]},
    "read_a_grid": {"seeds": 1, "epochs": 2},
}
"""Notebook -> what its cell of parameters has in its place here."""
ANYBODY_S = 300_000
"""Bytes of a notebook, at most: it is in everybody's clone, and its diffs are read."""
ABSOLUTE = re.compile(r"(?<![\w.:/<~])/(?:tmp|home|root|work|usr|var|opt|Users|mnt|data)/|[A-Z]:\\\\")


@pytest.fixture
def in_kernel(tmp_path, monkeypatch):
    """Makes a client whose kernel imports this package and works in the empty folder tmp_path/work."""
    for name, value in notebooks.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    return lambda notebook: notebooks.client(notebook, tmp_path / "work")


def read(name):
    return nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook, name):
    cell = next(cell for cell in notebook.cells if cell["id"] == name)
    return [output.get("data", {"text/plain": output.get("text", "")}) for output in cell["outputs"]]


def text_of(notebook, name):
    return "".join(shown.get("text/plain", "") for shown in outputs(notebook, name))


def has_picture(notebook, name):
    return any("image/png" in shown for shown in outputs(notebook, name))


def check_first_run(notebook, folder):
    bars = [
        shown["text/html"] for shown in outputs(notebook, "pretrain") if "<progress" in shown.get("text/html", "")
    ]
    assert len(bars) == 1, "updated in place"
    assert "value='30' max='30'" in bars[0]
    assert any(
        "Run('runs/first-notebook': conv, supcon_out" in shown["text/plain"]
        for shown in outputs(notebook, "pretrain")
    )
    assert any("<th>loss</th>" in shown.get("text/html", "") for shown in outputs(notebook, "metrics"))
    assert has_picture(notebook, "curves")
    assert 0.8 < float(text_of(notebook, "knn").partition("test accuracy ")[2].split()[0]) <= 1
    assert (folder / "runs/first-notebook/report.html").is_file()


def check_own_data(notebook, folder):
    assert "train: 1200 images, 10 classes, 16x16: 1200" in text_of(notebook, "verify")
    assert sum("image/png" in shown for shown in outputs(notebook, "show")) == 2
    assert has_picture(notebook, "alike")
    assert "without (simclr)" in outputs(notebook, "without")[-1]["text/html"]
    assert text_of(notebook, "table").split()[-1] == "True", "the views of the folder"


def check_compare_losses(notebook, folder):
    assert has_picture(notebook, "intervals")
    (table,) = outputs(notebook, "paired")
    assert "cannot be told apart" in table["text/html"] or "is better" in table["text/html"]
    assert "2 pairs" in text_of(notebook, "compare")
    assert (folder / "losses.html").is_file()


def check_prune_and_export(notebook, folder):
    assert "2 rows" in outputs(notebook, "results")[0]["text/html"]
    assert has_picture(notebook, "curve")
    for cell in ("pytorch", "onnx"):
        told = text_of(notebook, cell)
        assert "hpc-supcon[export]" in told or float(told.split()[-1]) < 1e-4


def check_read_a_grid(notebook, folder):
    assert "4 done" in text_of(notebook, "submit")  # pre-training and probe of two cells
    assert "missing" not in outputs(notebook, "tables")[1]["text/markdown"]
    assert "2 rows" in outputs(notebook, "runs")[0]["text/html"]
    assert "test accuracy of temperature" in text_of(notebook, "winner")
    assert (folder / "grid/report.html").is_file()


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_runs_from_top_to_bottom_in_miniature(name, in_kernel, tmp_path, request):
    if request.config.getoption("--no-training"):
        pytest.skip("trains")
    notebook = notebooks.with_parameters(read(name), MINIATURE[name])
    in_kernel(notebook).execute()
    globals()[f"check_{name}"](notebook, tmp_path / "work")


def test_all_notebooks_are_run_and_in_the_documentation():
    names = sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb"))
    assert names == sorted(notebooks.NAMES) == sorted(MINIATURE)
    pages = re.findall(r"notebooks/(\w+)\.md", (notebooks.ROOT / "mkdocs.yml").read_text())
    assert tuple(pages) == notebooks.NAMES


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_committed_notebook_was_executed_whole_and_names_no_machine(name):
    path = notebooks.FOLDER / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) <= ANYBODY_S
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in shown if output["output_type"] == "error"]
    assert not [output for output in shown if output.get("name") == "stderr"], "warnings of somebody's machine"
    assert any("image/png" in output.get("data", {}) for output in shown)
    without_pictures = json.dumps([{**o, "data": {**o.get("data", {}), "image/png": ""}} for o in shown])
    assert not ABSOLUTE.findall(without_pictures)
    for own in {socket.gethostname(), getpass.getuser()} - {"root", "localhost"}:
        assert own not in without_pictures
    sources = "".join("".join(cell["source"]) for cell in cells)
    assert not ABSOLUTE.findall(sources)
    assert 11 <= len(cells) <= 20
    assert max(len("".join(cell["source"]).splitlines()) for cell in code) <= 30, "short cells"


def test_paths_of_a_machine_are_found():
    for text in ('"/tmp/a"', " /home/me/x", "(/root/x", "C:\\\\Users"):
        assert ABSOLUTE.search(text), text
    for text in ("runs/tmp/a", "../data/x", "https://x.org/data/", "</data/", "images/s"):
        assert not ABSOLUTE.search(text), text


def test_what_a_terminal_shows_is_what_is_left_of_moving_text():
    assert notebooks.as_shown("a\x1b[2Kb\r\n") == "b\n"
    assert notebooks.as_shown("\x1b[31m10%\x1b[0m\r\n\x1b[1A\x1b[2Kdone\n\n") == "done\n"


def test_a_parameter_that_a_notebook_does_not_have_is_an_error():
    with pytest.raises(KeyError, match="epoch"):
        notebooks.with_parameters(read("own_data"), {"epoch": 1})


STOPPED = f"""
import os, signal
import hpc_supcon as hs

class Stop(hs.Callback):
    def on_step(self, step, metrics):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)  # what the stop button sends

settings = {{**{FAST!r}, "train.iterations": 50}}
hs.pretrain("quickstart", run_dir="stopped", settings=settings, callbacks=[Stop()])
"""


def test_the_stop_button_saves_and_the_kernel_lives(in_kernel):
    cells = [
        nbformat.v4.new_code_cell(source) for source in (STOPPED, "hs.load('stopped').metrics.column('step')[-1]")
    ]
    cells[0]["metadata"]["tags"] = ["raises-exception"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    in_kernel(notebook).execute()
    errors = [output["ename"] for output in cells[0]["outputs"] if output["output_type"] == "error"]
    assert errors == ["KeyboardInterrupt"]
    (shown,) = [output["data"]["text/plain"] for output in cells[1]["outputs"]]
    assert shown == "4"
