"""The page: everything of a run is in it, nothing of a user's runs, and damaged files are notices."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hpc_supcon import run_folder
from hpc_supcon.errors import OutputError, RunFolderError
from hpc_supcon.pages.curves import cost_of, curves_data, seconds_of
from hpc_supcon.pages.page import render, write_page
from hpc_supcon.pages.read import read_run
from hpc_supcon.pages.runs import page_of_runs
from hpc_supcon.pages.watch import watch
from tests.commands import run
from tests.run_folders import CLASSES, HOSTILE, full_run, write_events, write_maps, write_run, write_scores

REFRESH = '<meta http-equiv="refresh"'


class Parsed(HTMLParser):
    """The elements and texts of a page, as a browser reads them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.scripts, self._inside = [], [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.texts.append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(*folders):
    return Parsed(render(page_of_runs(folders)))


def test_everything_that_is_known_of_a_run_is_on_its_page(tmp_path):
    folder = full_run(tmp_path / "run", name="my run")
    Image.new("RGB", (30, 10), "red").save(folder / "embeddings/neighbors.png")
    page = page_of(folder)
    for text in (
        "my run", "conv · supcon_out · digits · seed 0", "80.0 %", "95 % interval 70.0 – 90.0 %, 39 test images",
        "hpc-supcon run", "node7", "2.14.1", "abc", "134,176", "25.0%",  # how it was run
        "balanced accuracy", "ECE", "NMI", "AUROC", "contrast", "severity 5", "clean 0.0500; mean 0.3000",
        "train.epochs", "probe.linear.lrs", "Nearest neighbors",
    ):  # fmt: skip
        assert text in page.text, text
    data = page.data
    assert {m["space"] + m["method"] for m in data["runs"][0]["maps"]} == {"encodertsne", "projectionpca"}
    assert data["runs"][0]["thumbnails"]["tile"] == [8, 8]
    assert list(data["curves"]["series"]) == ["loss", "accuracy", "lr", "images_per_s", "data_wait"]
    assert data["confusions"][0]["classes"] == CLASSES


def test_pruned_encoders_have_a_table_and_a_figure_and_are_not_among_the_scores(tmp_path):
    folder = full_run(tmp_path / "run")
    (folder / "plots").mkdir(exist_ok=True)
    Image.new("RGB", (30, 10), "red").save(folder / "plots/pruning.png")
    found = json.loads((folder / "results.json").read_text())
    for scope, accuracy in (("global", 0.6125), ("layer", 0.5875)):  # of one method and rate
        found["results"].append({
            "stage": "prune", "probe": "linear", "folder": f"pruned/{scope}",
            "test": {"accuracy": accuracy, "f1": 0.5}, "features": {"knn": 0.4375, "silhouette": None},
            "prune": {"method": "fishleg", "rate": 0.8, "scope": scope, "schedule": "oneshot", "label": None},
            "size": {"dense_bytes": 4_000_000, "sparse_bytes": 1_000_000},
        })  # fmt: skip
    (folder / "results.json").write_text(json.dumps(found))
    page = page_of_runs([folder])
    sections = {section.id: section for section in page.sections}
    (table,) = sections["pruned"].tables
    assert table.headings[4:] == ["rate", "size (MB)", "ratio", "accuracy", "F1", "kNN"]
    assert [[cell.value for cell in row] for row in table.rows] == [
        ["fishleg", "global", "oneshot", "linear", 0.8, 1.0, 4.0, 0.6125, 0.5, 0.4375],
        ["fishleg", "layer", "oneshot", "linear", 0.8, 1.0, 4.0, 0.5875, 0.5, 0.4375],
    ]
    assert sections["pruning-0"].picture
    assert not any("pruned" in row[0].text for row in sections["results"].tables[0].rows)


def test_a_map_comes_out_as_it_went_in(tmp_path):
    folder = write_run(tmp_path / "run")
    index, labels = write_maps(folder, names=("encoder-umap",))
    with np.load(folder / "embeddings/encoder-umap.npz") as file:
        points = file["points"]
    data = page_of(folder).data
    (found,) = data["runs"][0]["maps"]

    def read(key, kind):
        return np.frombuffer(base64.b64decode(data["blobs"][found[key]]), dtype=kind)

    assert read("index", "<u4").tolist() == index.tolist()
    assert read("labels", "<u2").tolist() == labels.tolist()
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    placed = read("points", "<u2").reshape(-1, 2) / 65535 * extent + low
    assert np.abs(placed - points).max() < 2 * extent.max() / 65535
    assert found["shape"] == pytest.approx(extent[0] / extent[1])


def test_nothing_of_a_user_s_is_an_element_or_a_script(tmp_path):
    folder = full_run(tmp_path / "r<b>n", classes=HOSTILE, name="<img src=x onerror=alert(2)>")
    clean = page_of(full_run(tmp_path / "clean", classes=[f"class {i}" for i in range(len(HOSTILE))]))
    page = page_of(folder)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in clean.elements]
    handlers = [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert handlers == []
    assert "<img src=x onerror=alert(2)>" in page.texts, "it is there as text"
    assert page.data["runs"][0]["maps"][0]["classes"] == HOSTILE
    raw = render(page_of_runs([folder]))
    assert "</script><img" not in raw
    assert "\u2028" not in raw.split('type="application/json"')[1]


def test_the_policy_allows_the_script_and_the_style_of_the_page_and_nothing_else(tmp_path):
    html = render(page_of_runs([full_run(tmp_path / "run")]))
    policy = next(
        a["content"] for tag, a in Parsed(html).elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    script, style = (
        html.rpartition("<script>")[2].split("</script>")[0],
        re.search("<style>(.*?)</style>", html, re.S)[1],
    )
    for name, text in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    for _, attributes in Parsed(html).elements:
        assert "style" not in attributes, "the policy would refuse it"
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))


def test_numbers_that_are_not_finite_and_odd_events_are_left_out_of_the_curves(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"event": "train", "step": 4, "time": NaN, "loss": NaN, "lr": Infinity, "odd": [1], "text": "x"}\n'
        )
        file.write(
            '{"event": "train", "step": 6, "time": "soon", "loss": 1e400, "flag": true, "huge": 1' + "0" * 400 + "}\n"
        )
        file.write('{"event": "train", "step": 8, "loss"')
    data = page_of(folder).data
    names = {"loss", "accuracy", "lr", "images_per_s", "data_wait"}
    assert set(data["curves"]["series"]) == names


def test_a_step_that_was_told_twice_counts_as_it_was_told_last_and_pauses_are_no_time(tmp_path):
    folder = write_run(tmp_path / "run")
    told = [("start", 0, 0, 0), ("train", 1, 10, 5.0), ("train", 2, 20, 4.0), ("preempted", 2, 21, 0),
            ("start", 2, 1000, 0), ("train", 2, 1005, 3.0), ("end", 2, 1006, 0)]  # fmt: skip
    write_events(folder, [{"event": e, "step": s, "time": t, "loss": y} for e, s, t, y in told])
    run = read_run(folder)
    assert seconds_of(run.events) == [0, 10, 20, 21, 21, 26, 27]
    (series,) = curves_data([run])["series"]["loss"]
    assert series["y"] == [5.0, 3.0]
    assert cost_of(run) == {"seconds": 27, "processes": 2.0}


def test_the_time_that_waited_for_data_is_weighted_by_time(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [(10, 100.0, 0.5), (20, 300.0, 0.1)]  # images_per_s is of all steps since the last event
    events = [{"event": "train", "step": s, "time": 1.0, "images_per_s": r, "data_wait": w} for s, r, w in rows]
    write_events(folder, [{"event": "start", "step": 0, "time": 0.0}, *events])
    assert cost_of(read_run(folder))["data_wait"] == pytest.approx((0.5 / 100 + 0.1 / 300) / (1 / 100 + 1 / 300))


def test_a_run_that_is_not_finished_says_so(tmp_path):
    folder = write_run(tmp_path / "run", results=False)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_events(folder, events[:4])
    page = page_of_runs([folder])
    assert page.notices == ["run: no results yet (not finished, at step 6)"]
    assert page.headlines[0].value == "loss 4.4000"
    run_folder.create(tmp_path / "new", run_folder.read_config(folder))
    assert "not started" in page_of_runs([tmp_path / "new"]).notices[0]


def test_without_scores_the_interval_is_that_of_the_test_images(tmp_path):
    (line,) = page_of_runs([write_run(tmp_path / "run", accuracy=0.75)]).headlines
    assert (line.label, line.value) == ("linear probe, test accuracy", "75.0 %")
    assert line.detail == "95 % interval 65.7 – 82.5 %, 100 test images"  # Wilson's, of 75 in 100


DAMAGE = {
    "embeddings/encoder-tsne.npz": lambda p: p.write_bytes(p.read_bytes()[:100]),
    "embeddings/projection-pca.npz": lambda p: np.savez(
        p, points=np.array([{"a": 1}], dtype=object), index=[0], labels=[0]
    ),
    "embeddings/initial-encoder-tsne.npz": lambda p: np.savez(p, points=np.zeros((3, 3)), index=[0], labels=[0]),
    "embeddings/encoder-pca.npz": lambda p: np.savez(p, points=np.full((2, 2), np.nan), index=[0, 1], labels=[0, 1]),
    "embeddings/pixels-pca.npz": lambda p: p.mkdir(),
    "embeddings/thumbnails.webp": lambda p: p.write_bytes(b"RIFF"),
    "embeddings/neighbors.png": lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "results.json": lambda p: p.write_text("{"),
    "scores.json": lambda p: p.write_text('{"probes": []}'),
    "config.yaml": lambda p: p.write_bytes(b"name: \xff"),
    "checkpoints/step-20/state.json": lambda p: p.write_text("[" * 100_000),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_a_notice_and_the_rest_is_shown(tmp_path, name):
    folder = full_run(tmp_path / "run")
    DAMAGE[name](folder / name)
    if name == "embeddings/thumbnails.webp":
        name = "embeddings/thumbnails.json"
    page = page_of_runs([folder])
    named = [notice for notice in page.notices if name in notice]
    assert len(named) >= 1, page.notices
    assert all("\n" not in notice for notice in page.notices)
    assert len(page.sections) >= 4
    render(page)


def test_scores_of_the_wrong_shape_are_passed_over(tmp_path):
    folder = full_run(tmp_path / "run")
    odd = {
        "accuracy": "0.9",
        "accuracy_interval": [1],
        "confusion": [[1, 2], [3]],
        "per_class": {"f1": 3},
        "f1": None,
    }
    run_folder.add_scores(folder, "probes", "knn", {"classes": 3, "splits": {"test": odd, "train": 5}})
    run_folder.add_scores(folder, "corruptions", "knn", {"errors": {"blur": "x", "fog": [None, 0.5]}})
    run_folder.add_scores(folder, "ood", "x", {"knn": 3})
    page = page_of_runs([folder])
    assert any("confusion matrix of knn, test is not a square" in notice for notice in page.notices)
    render(page)


def test_maps_that_a_page_has_no_room_for_are_left_out_and_told(tmp_path, monkeypatch):
    from hpc_supcon.pages import runs
    from hpc_supcon.pages.blobs import Blobs

    monkeypatch.setattr(runs, "Blobs", lambda: Blobs(5000))
    page = page_of_runs([full_run(tmp_path / "run")])
    assert any("not all maps are in the page" in notice for notice in page.notices)
    assert len(page.data["runs"][0]["maps"]) < 3


def test_of_many_points_every_nth_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    write_maps(folder, n=50_001, names=("encoder-pca",))
    (found,) = page_of_runs([folder]).data["runs"][0]["maps"]
    assert (found["n"], found["total"]) == (16_667, 50_001)


def test_settings_that_differ_between_runs_are_marked(tmp_path):
    a = write_run(tmp_path / "a", "optim.lr=0.25", name="a")
    b = write_run(tmp_path / "b", "optim.lr=0.5", name="b")
    sections = {section.id: section for section in page_of_runs([a, b]).sections}
    (table,) = sections["settings"].tables
    marked = {row[0].text: [cell.text for cell in row[1:3]] for row in table.rows if any(cell.mark for cell in row)}
    assert marked == {"optim.lr": ["0.25", "0.5"]}
    alone = page_of_runs([a])
    (table,) = next(s for s in alone.sections if s.id == "settings").tables
    assert "optim.lr" in {row[0].text for row in table.rows if any(cell.mark for cell in row)}


def test_the_command_writes_the_page_into_the_run_folder_or_where_it_is_told(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = full_run(tmp_path / "a", name="a"), write_run(tmp_path / "b", name="b")
    assert run(capsys, "report", a) == (0, f"{a}/report.html\n", "")
    assert run(capsys, "report", a, b)[:2] == (0, "report.html\n")
    assert run(capsys, "report", a, b, "-o", "c.html")[:2] == (0, "c.html\n")
    assert run(capsys, "report", a, b, "-o", "c.html")[0] == 0, "a page is replaced by a newer one"
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, err = run(capsys, "report", a, "-o", "thesis.tex")
    assert code == 2
    assert "thesis.tex exists already" in err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_mistakes_are_one_line_and_exit_code_2(capsys, tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid/grid.json").write_text("{}")
    for arguments, message in [
        ([], "which run? hpc-supcon report RUN_DIR"),
        ([tmp_path], "no config.yaml in it, so this is not a run folder"),
        ([tmp_path / "nowhere"], "not a run folder"),
        ([tmp_path / "grid"], "hpc-supcon grid report --html"),
        ([tmp_path / "a", "-o", tmp_path / "no/folder.html"], "does not exist"),
        ([tmp_path / "a", "-o", tmp_path], "is a folder"),
    ]:
        code, out, err = run(capsys, "report", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err


def test_a_page_that_is_watched_follows_the_run_and_stays_when_it_is_left(tmp_path):
    folder, out = write_run(tmp_path / "run", results=False), tmp_path / "page.html"
    seen = []

    def wait(_seconds):
        html = out.read_text()
        seen.append((REFRESH in html, "80.0 %" in html))
        if len(seen) == 2:
            full_run(folder)
        if len(seen) == 4:
            raise KeyboardInterrupt

    watch([folder], out, wait)
    assert seen == [(True, False), (True, False), (True, True), (True, True)]
    assert "80.0 %" in out.read_text()
    assert REFRESH not in out.read_text()


def test_a_page_is_not_written_again_while_nothing_changes(tmp_path, monkeypatch):
    folder, out, waited = write_run(tmp_path / "run"), tmp_path / "run/report.html", []

    def wait(_seconds):
        waited.append(out.stat().st_ino)
        if len(waited) == 3:
            raise KeyboardInterrupt

    watch([folder], out, wait)
    assert len(set(waited)) == 1


def test_readers_find_a_whole_page_while_it_is_rewritten(tmp_path):
    folder, out, torn = full_run(tmp_path / "run"), tmp_path / "page.html", []
    html = render(page_of_runs([folder]))
    write_page(out, html)
    done = threading.Event()

    def read():
        while not done.is_set():
            if out.read_text() != html:
                torn.append(True)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        write_page(out, html)
    done.set()
    reader.join()
    assert not torn


def test_reading_a_file_that_is_no_page_is_refused_before_the_work(tmp_path):
    (tmp_path / "x.html").write_text("<html>mine</html>")
    with pytest.raises(OutputError, match="exists already"):
        write_page(tmp_path / "x.html", "")
    with pytest.raises(RunFolderError, match="not a run folder"):
        page_of_runs([tmp_path])


def test_a_page_is_made_without_torch(python, tmp_path):
    folder = full_run(tmp_path / "run")
    code = f"""
import sys
from pathlib import Path
from hpc_supcon.pages.runs import page_of_runs
from hpc_supcon.pages.page import render
render(page_of_runs([Path({str(folder)!r})]))
assert not {{"torch", "matplotlib", "sklearn", "scipy.stats"}} & set(sys.modules)
"""
    subprocess.run([python, "-c", code], check=True)


def test_a_page_of_several_runs_shows_thumbnails_once(tmp_path):
    folders = [full_run(tmp_path / name, f"seed={i}", name=name) for i, name in enumerate("ab")]
    page = page_of_runs(folders)
    pictures = {run["thumbnails"]["picture"] for run in page.data["runs"]}
    assert len(pictures) == 1
    write_scores(folders[0])
    assert page.title == "2 runs"


def test_the_errors_of_an_autoencoder_are_among_the_scores_of_its_run(tmp_path):
    folder = write_run(tmp_path / "r")
    errors = {
        "stage": "reconstruction",
        "probe": None,
        "checkpoint": "step-20",
        "test": {"mae": 0.125, "mse": 0.0625},
    }
    run_folder.add_result(folder, errors)
    (table,) = next(section for section in page_of_runs([folder]).sections if section.id == "results").tables
    assert table.headings[-2:] == ["MAE", "MSE"]
    rows = {(row[0].text, row[1].text): [cell.value for cell in row[-2:]] for row in table.rows}
    assert rows["reconstruction", "test"] == [0.125, 0.0625]
    assert rows["linear", "test"] == [None, None]
