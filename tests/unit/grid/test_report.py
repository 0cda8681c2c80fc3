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
from hpc_supcon.grid.charts import chart
from hpc_supcon.grid.expand import Cell, expand
from hpc_supcon.grid.folder import FrozenGrid, FrozenNode, freeze
from hpc_supcon.grid.folder import load as load_frozen_grid
from hpc_supcon.grid.report import latex, markdown, to_csv, write_report
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


def write_results(frozen, cell, *entries, node=-1):
    folder = frozen.run_folder(frozen.nodes[cell.nodes[node]])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"results": list(entries)}))


def probe_entry(**splits):
    """Each split has its value as every score, F1 a tenth less."""
    numbers = {s: {**dict.fromkeys(SCORES, value), "f1": value - 0.1} for s, value in splits.items()}
    return {"stage": "probe", "probe": "linear", **numbers}


def with_table(frozen, **config):
    table = {"title": "t", "layout": "scores", "rows": "model.encoder", "columns": "loss.name"} | config
    return FrozenGrid(**{**vars(frozen), "tables": (TableConfig.model_validate_json(json.dumps(table)),)})


def test_splits_stand_beside_each_other_and_one_that_was_not_measured_is_no_missing_result(grid):
    for cell in grid.cells:
        if cell.labels["model.encoder"] == "conv":
            value = 0.5 + 0.1 * cell.seed
            splits = {"train": value + 0.3, "validation": value + 0.1, "test": value}
            if cell.labels["loss.name"] == "tcl":
                del splits["train"]
            write_results(grid, cell, probe_entry(**splits))
    one = with_table(grid, splits=["train", "validation", "test"], scores=["f1", "accuracy"])
    (table,) = build_tables(one)
    heading, _, conv, resnet = markdown(table).splitlines()
    assert heading.startswith(
        "| model.encoder | supcon_in training F1 | supcon_in validation F1 | supcon_in test F1 "
        "| supcon_in training accuracy |"
    )
    cells = [cell.strip() for cell in conv.split("|")[2:-1]]
    shown = [cell.partition(" ")[0] for cell in cells]
    assert shown == [
        "0.8000", "0.6000", "0.5000", "0.9000", "0.7000", "0.6000", "–", "0.6000", "0.5000", "–", "0.7000", "0.6000",
    ]  # fmt: skip
    assert resnet.count("missing") == 12
    lines = list(csv.DictReader(io.StringIO(to_csv([table]))))
    of_train = [line for line in lines if line["split"] == "train" and line["mean"]]
    assert [(line["row"], line["column"], line["score"]) for line in of_train] == [
        ("conv", "supcon_in", "f1"), ("conv", "supcon_in", "accuracy"),
    ]  # fmt: skip
    assert float(of_train[1]["mean"]) == pytest.approx(0.9)


def test_the_chart_has_a_panel_for_each_score_and_a_bar_for_each_split(grid):
    for cell in grid.cells:
        value = 0.2 if cell.labels["loss.name"] == "tcl" else 0.4
        write_results(grid, cell, probe_entry(validation=value + 0.05, test=value))
    (table,) = build_tables(with_table(grid, splits=["validation", "test"], scores=["accuracy", "f1"]))
    figure = chart(table)
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "F1"]
    for axes, lower in zip(figure.axes, (0.0, 0.1), strict=True):
        bars = sorted((bar.get_x(), bar.get_height() + lower, bar.get_hatch()) for bar in axes.patches)
        assert [height for _, height, _ in bars] == pytest.approx([0.45, 0.4, 0.25, 0.2] * 2)
        assert [hatch is None for _, _, hatch in bars] == [False, True] * 4
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["supcon_in", "tcl", "validation", "test"]


def test_the_errors_of_an_autoencoder_stand_beside_the_accuracy_of_its_probe(grid):
    """They are in the folder in which it was trained; a loss without a decoder has none."""
    for cell in grid.cells:
        entries = [probe_entry(test=0.9)]
        if cell.labels["loss.name"] == "tcl":
            errors = {"test": {"mae": 0.1 + cell.seed / 100, "mse": 0.03}, "validation": {"mae": 0.2, "mse": 0.04}}
            entries.append({"stage": "reconstruction", "probe": None, **errors})
        write_results(grid, cell, *entries)
    (table,) = build_tables(with_table(grid, scores=["accuracy", "mae", "mse"]))
    heading, _, conv, _ = markdown(table).splitlines()
    assert heading.endswith("| tcl accuracy | tcl MAE | tcl MSE |")
    assert [cell.strip().partition(" ")[0] for cell in conv.split("|")[2:-1]] == [
        "0.9000", "–", "–", "0.9000", "0.1100", "0.0300",
    ]  # fmt: skip
    (table,) = build_tables(with_table(grid, scores=["mae"], splits=["train", "validation", "test"]))
    assert table.scores == ("validation mae", "mae")
    assert table.interval("conv", "tcl", "validation mae")[0] == pytest.approx(0.2)
    assert [axes.get_ylabel() for axes in chart(table).axes] == ["MAE"]


def test_the_errors_are_found_where_probes_share_a_pre_training(tmp_path):
    nodes = {
        "a.pretrain": FrozenNode("a.pretrain", "pretrain", "a", None, Resources(), ""),
        "b.probe": FrozenNode("b.probe", "probe", "b", None, Resources(), ""),
    }
    cell = Cell("b", {"probe.kind": "mlp", "seed": "0"}, 0, ("a.pretrain", "b.probe"))
    tables = (TableConfig(title="t", layout="scores", rows="probe.kind", scores=("mse",)),)
    frozen = FrozenGrid(tmp_path, "g", "debug", ClusterProfile(cluster="debug"), "c", 1, (cell,), nodes, tables)
    write_results(frozen, cell, {"stage": "reconstruction", "test": {"mae": 0.5, "mse": 0.25}}, node=0)
    assert build_tables(frozen)[0].interval("mlp", "", "mse") is None  # its probe has not run
    write_results(frozen, cell, probe_entry(test=0.5))
    assert build_tables(frozen)[0].interval("mlp", "", "mse") == (0.25, 0.0)


def test_a_split_or_score_that_is_named_twice_or_unknown_is_refused(tmp_path):
    path = tmp_path / "grid.yaml"
    for changed, told in (
        ({"splits": ["test", "test"]}, r"tables.0.splits: 'test' is named twice"),
        ({"scores": ["mae", "mae"]}, r"tables.0.scores: 'mae' is named twice"),
        ({"scores": ["auc"]}, r"tables.0.scores.0: input should be 'f1', 'accuracy'"),
        ({"splits": []}, r"tables.0.splits: .*at least 1 item"),
    ):
        table = {"title": "t", "layout": "matrix", "rows": "loss.name", **changed}
        path.write_text(yaml12.dumps({"name": "g", "base": "quickstart", "axes": AXES, "tables": [table]}))
        with pytest.raises(ConfigError, match=told):
            load_grid(path)


def test_a_grid_with_such_a_table_is_frozen_and_read_again(tmp_path):
    table = {"title": "t", "layout": "matrix", "rows": "loss.name", "splits": ["train", "test"], "scores": ["f1"]}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml12.dumps({"name": "g", "base": "quickstart", "axes": AXES, "tables": [table]}))
    made = freeze(tmp_path / "out", expand(load_grid(path)), "", "debug", ClusterProfile(cluster="debug"))
    assert load_frozen_grid(tmp_path / "out").tables == made.tables
    assert made.tables[0].splits == ("train", "test")
