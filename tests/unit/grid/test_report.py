"""Tables and charts: the numbers of results.json grouped and averaged, compared with a library."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import statistics
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hpc_supcon.config import yaml12
from hpc_supcon.errors import ConfigError, RunFolderError
from hpc_supcon.grid.cells import load as load_grid
from hpc_supcon.grid.expand import Cell, expand
from hpc_supcon.grid.folder import FrozenGrid, FrozenNode, freeze
from hpc_supcon.grid.report import chart, latex, markdown, write_report
from hpc_supcon.grid.schema import ClusterProfile, Resources, TableConfig
from hpc_supcon.grid.tables import SCORES, TableData, build_tables

AXES = {"model.encoder": ["conv", "resnet18"], "loss.name": ["supcon_in", "tcl"]}


@pytest.fixture
def grid(tmp_path):
    """A frozen grid of 2 x 2 cells and three seeds."""
    path = tmp_path / "grid.yaml"
    keys = {"name": "g", "base": "quickstart", "axes": AXES, "seeds": 3}
    path.write_text(yaml12.dumps(keys))
    return freeze(tmp_path / "out", expand(load_grid(path)), "", "debug", ClusterProfile(cluster="debug"))


def write_result(frozen, cell, **numbers):
    folder = frozen.run_folder(frozen.nodes[cell.nodes[-1]])
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"stage": "probe", "probe": "linear", "test": dict.fromkeys(SCORES, 0.5) | numbers}
    other = {"stage": "autoencoder", "test": {"mse": 1.0}}
    (folder / "results.json").write_text(json.dumps({"results": [other, entry]}))


def test_every_number_of_the_csv_is_the_mean_over_seeds(grid, tmp_path):
    rng, drawn = random.Random(0), {}
    for cell in grid.cells:
        numbers = {score: rng.random() for score in SCORES}
        write_result(grid, cell, **numbers)
        for score, value in numbers.items():
            drawn.setdefault((cell.labels["model.encoder"], cell.labels["loss.name"], score), []).append(value)
    write_report(grid, tmp_path / "report")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "report" / "report.csv").read_text())))
    assert len(lines) == 2 * 2 * 4
    for line in lines:
        values = drawn[line["row"], line["column"], line["score"]]
        assert float(line["mean"]) == pytest.approx(statistics.fmean(values))
        assert (line["n"], line["expected"]) == ("3", "3")
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "report.md", "report.tex", "report.csv", "scores.png",
    }  # fmt: skip


def test_missing_cells_are_shown_as_missing_and_incomplete_ones_with_their_count(grid):
    for cell in grid.cells:
        name, seed = cell.labels["loss.name"], cell.seed
        if name == "supcon_in" and (cell.labels["model.encoder"] == "conv" or seed < 2):
            write_result(grid, cell, accuracy=0.5 + 0.1 * seed)
    text = markdown(build_tables(grid)[0])
    conv, resnet = (line for line in text.splitlines() if line.startswith(("| conv", "| resnet18")))
    assert conv.count("missing") == 4
    assert "0.6000 ± " in conv
    assert "(2 of 3)" in resnet


def test_a_grid_without_results_has_a_complete_report(grid, tmp_path):
    write_report(grid, tmp_path / "report")
    assert "missing" in (tmp_path / "report" / "report.md").read_text()


def test_values_of_an_axis_that_a_table_does_not_name_are_never_mixed(grid, tmp_path):
    for cell in grid.cells:
        write_result(grid, cell, accuracy=0.25 if cell.labels["loss.name"] == "tcl" else 0.75)
    one = FrozenGrid(**{**vars(grid), "tables": (TableConfig(title="t", layout="matrix", rows="model.encoder"),)})
    tables = build_tables(one)
    assert [table.title for table in tables] == ["t, loss.name supcon_in", "t, loss.name tcl"]
    assert ["0.75" in markdown(t) and "0.25" not in markdown(t) for t in tables] == [True, False]


def test_an_unknown_axis_and_damaged_results_are_named_errors(grid):
    one = FrozenGrid(**{**vars(grid), "tables": (TableConfig(title="t", layout="matrix", rows="encoder"),)})
    with pytest.raises(ConfigError, match=r"table 't': unknown axis 'encoder'; did you mean 'model.encoder'"):
        build_tables(one)
    write_result(grid, grid.cells[0])
    path = grid.run_folder(grid.nodes[grid.cells[0].nodes[-1]]) / "results.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(RunFolderError, match=r"results\.json: cannot be read"):
        build_tables(grid)


@pytest.mark.parametrize("known", [False, True])
def test_pruning_shows_rate_size_ratio_scores_and_what_is_known_of_the_features(tmp_path, known):
    """Read from results.json as the prune stage writes it; an unpruned cell has the dense size and ratio 1."""
    nodes, cells = {}, []
    for rate in ("null", "0.2", "0.5"):
        stage = "probe" if rate == "null" else "prune"
        node = FrozenNode(f"r{rate}.{stage}", stage, f"r{rate}", None, Resources(), "")
        nodes[node.name] = node
        cells.append(Cell(f"r{rate}", {"prune.rate": rate, "seed": "0"}, 0, (node.name,)))
        folder = tmp_path / "runs" / node.folder
        folder.mkdir(parents=True)
        entry = {"stage": stage, "test": dict.fromkeys(SCORES, 0.9)}
        entries = [entry]
        if known and rate == "null":  # where the stage of probes writes them
            entries.append({"stage": stage, "probe": "knn", "test": dict.fromkeys(SCORES, 0.7)})
            (folder / "scores.json").write_text(json.dumps({"embedding": {"encoder": {"silhouette": 0.25}}}))
        if rate != "null":
            entry["prune"] = {"method": "l1", "rate": float(rate), "scope": "global"}
            kept = int(8_000_000 * (1 - float(rate)))
            entry["size"] = {"dense_bytes": 8_000_000, "gzip_bytes": 7_000_000, "sparse_bytes": kept}
            entry["features"] = {"knn": 0.6 if known else None, "silhouette": -0.1 if known else None}
        (folder / "results.json").write_text(json.dumps({"results": entries}))
    tables = (TableConfig(title="pruning", layout="pruning", rows="prune.rate"),)
    profile = ClusterProfile(cluster="debug")
    frozen = FrozenGrid(tmp_path, "g", "debug", profile, "c", 1, tuple(cells), nodes, tables)
    lines = markdown(build_tables(frozen)[0]).splitlines()
    more = " | kNN | silhouette" if known else ""
    assert lines[0] == f"| prune.rate | size (MB) | ratio | accuracy | F1{more} |"
    dense, pruned = (" | 0.7000 | 0.2500", " | 0.6000 | -0.1000") if known else ("", "")
    assert lines[2:] == [
        f"| 0 | 8.00 | 1.00 | 0.9000 | 0.9000{dense} |", f"| 0.2 | 6.40 | 1.25 | 0.9000 | 0.9000{pruned} |",
        f"| 0.5 | 4.00 | 2.00 | 0.9000 | 0.9000{pruned} |",
    ]  # fmt: skip


def test_latex_is_balanced_and_escapes_special_characters(grid):
    write_result(grid, grid.cells[0])
    table = build_tables(grid)[0]
    table.title = r"50 % of a_b & {c} \ ~ ^ $ #"
    text = latex(table)
    assert text.count(r"\begin") == text.count(r"\end") == 2
    assert r"50 \% of a\_b \& \{c\} \textbackslash{} \textasciitilde{} \textasciicircum{} \$ \#" in text
    assert r"supcon\_in" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    assert {line.count("&") for line in body.splitlines()[1:]} == {8}


def test_markdown_escapes_bars_and_newlines(grid):
    table = build_tables(grid)[0]
    table.columns = ["a|b\nc", *table.columns[1:]]
    assert "a\\|b c F1" in markdown(table).splitlines()[0]


GRIDS = Path(__file__).parents[3] / "launch/grids"


def _curves():
    for path in sorted(GRIDS.glob("*.yaml")):
        for table in load_grid(path)[0].tables:
            if table.layout in ("curve", "pruning"):
                yield pytest.param(path, table.rows, id=f"{path.stem}-{table.rows}")


@pytest.mark.parametrize(("path", "axis"), list(_curves()))
def test_the_tick_labels_of_the_shipped_grids_do_not_overlap(path, axis):
    rows = list(dict.fromkeys(str(cell.labels[axis]) for cell in expand(load_grid(path)).cells))
    rows = [row if row != "null" else "0" for row in rows]
    columns = ["supcon", "tcl"]
    values = {(row, column, "accuracy"): [0.5] for row in rows for column in columns}
    values |= {(row, column, "sparse_mb"): [1.38] for row in rows for column in columns if "prune" in axis}
    figure = chart(TableData("a title", "curve", axis, rows, columns, ("accuracy",), values))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert [label.get_text().splitlines()[0] for label in labels] == rows
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    for (a, b), (left, right) in zip(itertools.combinations(boxes, 2), itertools.combinations(rows, 2), strict=True):
        assert not a.padded(2).overlaps(b.padded(2)), f"{left} and {right} touch"
