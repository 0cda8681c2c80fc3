"""The API in a real Jupyter kernel: the example runs, shows what it should, and survives its stop button."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import hpc_supcon as hs
from tests.processes import RUN_TIMEOUT_S
from tests.unit.api.conftest import FAST

pytest.importorskip("ipykernel")
nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
pytestmark = pytest.mark.filterwarnings("default")  # of the kernel's packages
ROOT = Path(hs.__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "first_run.ipynb"


@pytest.fixture
def in_kernel(tmp_path, monkeypatch):
    """Makes a client whose kernel imports this package and works in tmp_path."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def make(notebook):
        resources = {"metadata": {"path": str(tmp_path)}}
        return nbclient.NotebookClient(
            notebook, timeout=RUN_TIMEOUT_S, startup_timeout=RUN_TIMEOUT_S, kernel_name="python3", resources=resources
        )

    return make


def outputs(notebook, name):
    cell = next(cell for cell in notebook.cells if cell["id"] == name)
    return [output.get("data", {"text/plain": output.get("text", "")}) for output in cell["outputs"]]


def test_the_example_has_no_outputs_of_somebody_s():
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_example_runs_and_shows_progress_numbers_and_pictures(in_kernel, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    in_kernel(notebook).execute()
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
    assert any("image/png" in shown for shown in outputs(notebook, "curves"))
    text = "".join(shown["text/plain"] for shown in outputs(notebook, "knn"))
    assert 0.8 < float(text.partition("test accuracy ")[2].split()[0]) <= 1
    assert (tmp_path / "runs/first-notebook/report.html").is_file()


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
