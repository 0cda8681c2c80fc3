"""The page of a grid: tables with their charts, what failed and why, runs that are damaged or missing."""

from __future__ import annotations

import json
import statistics

import pytest

from hpc_supcon import cli
from hpc_supcon.config import yaml12
from hpc_supcon.errors import LaunchError
from hpc_supcon.grid import page as grid_page
from hpc_supcon.grid.cells import load as load_grid
from hpc_supcon.grid.expand import expand
from hpc_supcon.grid.folder import FrozenGrid, NodeRecord, append_submission, freeze, write_record
from hpc_supcon.grid.schema import ClusterProfile, TableConfig
from hpc_supcon.pages.page import render
from tests.run_folders import full_run, write_run

SIZES, LOSSES, SEEDS = ["64", "256"], ["supcon_out", "tcl"], 3


def accuracy_of(labels, seed):
    size, loss = SIZES.index(labels["data.batch_size"]), LOSSES.index(labels["loss.name"])
    return 0.6 + 0.05 * size + 0.1 * loss + 0.01 * seed**2


@pytest.fixture
def grid(tmp_path):
    """A frozen grid whose last run has failed in training; all others are done."""
    path = tmp_path / "grid.yaml"
    axes = {"data.batch_size": [64, 256], "loss.name": LOSSES}
    table = {"title": "batch <size>", "layout": "curve", "rows": "data.batch_size", "columns": "loss.name"}
    keys = {"name": "g", "base": "quickstart", "axes": axes, "seeds": SEEDS, "tables": [table]}
    path.write_text(yaml12.dumps(keys))
    frozen = freeze(tmp_path / "out", expand(load_grid(path)), "", "debug", ClusterProfile(cluster="debug"))
    *done, last = frozen.cells
    for cell in done:
        labels = cell.labels
        write_run(
            frozen.run_folder(frozen.nodes[cell.nodes[-1]]),
            *(f"{key}={labels[key]}" for key in axes),
            f"seed={cell.seed}",
            accuracy=accuracy_of(labels, cell.seed),
        )
    for name in (node for cell in frozen.cells for node in cell.nodes):
        failed = name in last.nodes
        append_submission(frozen.root, frozen.nodes[name].stage, {name: "host:1"})
        outcome = "done" if not failed else "failed" if name.endswith("pretrain") else "blocked"
        error = "NonFinite: <b>NaN</b> at step 12" if outcome == "failed" else ""
        write_record(frozen.root, name, NodeRecord(outcome, "host:1", error=error))
    return frozen


def test_every_number_of_a_table_and_of_its_chart_is_the_mean_over_seeds(grid):
    page = grid_page.page_of_grid(grid)
    (table,) = next(section for section in page.sections if section.id == "tables").tables
    (chart,) = page.data["charts"]
    assert (table.charts, chart["numeric"], chart["rows"]) == ([0], True, SIZES)
    for i, size in enumerate(SIZES):
        for j, loss in enumerate(LOSSES):
            seeds = range(SEEDS - 1) if (size, loss) == (SIZES[-1], LOSSES[-1]) else range(SEEDS)
            mean = statistics.fmean(accuracy_of({"data.batch_size": size, "loss.name": loss}, s) for s in seeds)
            assert table.rows[i][1 + j].value == pytest.approx(mean)
            assert chart["columns"][j]["mean"][i] == pytest.approx(mean)
            assert chart["columns"][j]["half"][i] > 0
    assert "(2 of 3)" in table.rows[-1][-1].text


def test_what_failed_is_listed_with_why_and_its_log(grid):
    page = grid_page.page_of_grid(grid)
    (table,) = next(section for section in page.sections if section.id == "failed").tables
    last = grid.cells[-1]
    assert [[cell.text for cell in row[:3]] for row in table.rows] == [
        [last.nodes[0], "failed", "NonFinite: <b>NaN</b> at step 12"],
        [last.nodes[1], "blocked", ""],
    ]
    assert table.rows[0][3].text.endswith(f"logs/{last.nodes[0]}.log")
    assert dict(page.facts)["failed"] == "1"
    assert "<b>NaN" not in render(page)


def test_the_best_cells_are_on_the_first_screen(grid):
    page = grid_page.page_of_grid(grid)
    assert [line.label for line in page.headlines] == [
        "batch_size 256, loss tcl", "batch_size 64, loss tcl", "batch_size 256, loss supcon_out",
        "batch_size 64, loss supcon_out",
    ]  # fmt: skip


def test_a_damaged_run_is_a_notice_and_a_new_grid_has_a_page(grid, tmp_path):
    first = grid.run_folder(grid.nodes[grid.cells[0].nodes[-1]])
    (first / "results.json").write_text("{")
    (first / "config.yaml").unlink()
    page = grid_page.page_of_grid(grid)
    assert any("not a run folder" in notice for notice in page.notices)
    assert any("results.json: cannot be read" in notice for notice in page.notices)
    path = tmp_path / "new.yaml"
    path.write_text(yaml12.dumps({"name": "new", "base": "quickstart", "axes": {"loss.name": LOSSES}}))
    new = freeze(tmp_path / "new", expand(load_grid(path)), "", "debug", ClusterProfile(cluster="debug"))
    assert dict(grid_page.page_of_grid(new).facts) == {"missing": "4"}
    render(grid_page.page_of_grid(new))


def test_without_the_scheduler_states_are_those_that_the_jobs_recorded(grid, monkeypatch):
    def down(_frozen):
        raise LaunchError("squeue: the controller does not answer")

    monkeypatch.setattr(grid_page, "node_states", down)
    page = grid_page.page_of_grid(grid)
    assert dict(page.facts)["failed"] == "1"
    assert any("the controller does not answer" in notice for notice in page.notices)


def test_the_command_writes_the_page_into_the_grid_s_folder(grid, capsys):
    for arguments, code, said in (
        ([grid.root], 0, f"{grid.root}/report.html\n"),
        ([grid.root, "--out", grid.root / "x"], 2, "drop --out"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["grid", "report", "--html", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert ((stopped.value.code or 0), said in out + err) == (code, True)
    assert "<h1>g</h1>" in (grid.root / "report.html").read_text()


def test_a_score_that_is_asked_for_has_a_chart_and_other_splits_are_dashed(grid):
    table = {"title": "t", "layout": "scores", "rows": "data.batch_size", "columns": "loss.name",
             "scores": ["accuracy", "f1", "mae"], "splits": ["validation", "test"]}  # fmt: skip
    tables = (TableConfig.model_validate_json(json.dumps(table)),)
    page = grid_page.page_of_grid(FrozenGrid(**{**vars(grid), "tables": tables}))
    (shown,) = next(section for section in page.sections if section.id == "tables").tables
    charts = page.data["charts"]
    assert [charts[i]["score"] for i in shown.charts] == ["accuracy", "F1"]  # no run has any MAE
    assert [(c["label"], c["color"], c["dash"]) for c in charts[0]["columns"]] == [
        ("supcon_out, validation", 0, "6 4"), ("supcon_out, test", 0, ""), ("tcl, validation", 1, "6 4"),
        ("tcl, test", 1, ""),
    ]  # fmt: skip
    assert shown.headings[5] == "supcon_out validation MAE"
    assert [row[5].text for row in shown.rows] == ["–", "–"]
    assert shown.numeric == [True] * 5 + [False] * 2 + [True] * 4 + [False] * 2
    for i, row in enumerate(shown.rows):
        assert row[1].value == pytest.approx(charts[0]["columns"][0]["mean"][i])
    assert render(page).count('data-widget="chart"') == 2


def test_where_all_runs_logged_responses_they_are_shown_first(grid):
    folders = [grid.root / "runs" / node.folder for node in grid.nodes.values() if node.stage == "pretrain"]
    folders = [folder for folder in folders if folder.is_dir()]
    event = {"event": "train", "step": 2, "time": 1.0, "response_positives": 0.5, "response_negatives": 0.1}
    for folder in folders:
        if folder is folders[-1]:  # all but one have them
            assert next(iter(grid_page.page_of_grid(grid).data["curves"]["series"])) == "loss"
        with (folder / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(event) + "\n")
    names = list(grid_page.page_of_grid(grid).data["curves"]["series"])
    assert names[:3] == ["response_positives", "response_negatives", "loss"]


def test_curves_of_many_runs_stay_small(grid):
    folder = full_run(grid.root / "runs" / grid.nodes[grid.cells[0].nodes[-1]].folder, steps=20_000)
    assert folder.is_dir()
    data = grid_page.page_of_grid(grid).data["curves"]
    assert max(len(series["y"]) for all_runs in data["series"].values() for series in all_runs) <= 2002
    assert len(json.dumps(data)) < 1_000_000
