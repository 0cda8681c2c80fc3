"""Runs beside each other: groups, paired differences, and runs that cannot be compared."""

from __future__ import annotations

import csv
import io
import json
import random

import pytest
from scipy import stats

from hpc_supcon import run_folder
from hpc_supcon.pages.compare import as_csv, as_latex, as_markdown, compare, table_of
from hpc_supcon.pages.read import read_runs
from tests.commands import run
from tests.run_folders import write_run, write_scores, write_state

SECTION = "linear, test"


@pytest.fixture
def seeds(tmp_path):
    """Folders of two losses and three seeds, with accuracies that are drawn for each."""
    rng, folders, drawn = random.Random(0), [], {}
    for loss in ("supcon_out", "tcl"):
        for seed in range(3):
            drawn[loss, seed] = rng.random()
            folder = tmp_path / f"{loss}-{seed}"
            folders.append(
                write_run(folder, f"loss.name={loss}", f"seed={seed}", accuracy=drawn[loss, seed], name=folder.name)
            )
    return folders, drawn


def test_runs_that_differ_only_in_their_seed_are_one_group_with_the_interval_of_scipy(seeds):
    folders, drawn = seeds
    comparison = compare(read_runs(folders))
    assert [group.label for group in comparison.groups] == ["loss supcon_out", "loss tcl"]
    for group, loss in zip(comparison.groups, ("supcon_out", "tcl"), strict=True):
        values = [drawn[loss, seed] for seed in range(3)]
        mean, half = group.interval(SECTION, "accuracy")
        low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
        assert (mean - half, mean + half) == pytest.approx((low, high))


def test_differences_are_paired_by_seed(seeds):
    folders, drawn = seeds
    comparison = compare(read_runs([*folders[:3], *reversed(folders[3:])]))  # the order of runs is not that of seeds
    mean, half, pairs = comparison.difference(comparison.groups[1], SECTION, "accuracy")
    a, b = ([drawn[loss, seed] for seed in range(3)] for loss in ("supcon_out", "tcl"))
    found = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert pairs == 3
    assert (mean - half, mean + half) == pytest.approx((found.low, found.high))


def test_settings_that_change_no_result_make_no_group(tmp_path):
    a = write_run(tmp_path / "a", "seed=0", "data.workers=1", "runtime.threads=2", name="a")
    b = write_run(tmp_path / "b", "seed=1", "data.workers=3", name="b")
    assert len(compare(read_runs([a, b])).groups) == 1
    c = write_run(tmp_path / "c", "seed=1", "probe.linear.epochs=7", name="c")
    assert len(compare(read_runs([a, c])).groups) == 2, "settings of a probe change its scores"


def test_two_runs_of_one_seed_count_once_and_are_told(tmp_path):
    folders = [write_run(tmp_path / str(i), accuracy=0.5 + 0.2 * i, name=f"n{i}") for i in range(2)]
    comparison = compare(read_runs(folders))
    assert comparison.groups[0].interval(SECTION, "accuracy") == (pytest.approx(0.6), 0.0)
    assert "several runs of seed 0" in comparison.notices[0]


def test_runs_of_different_data_sets_are_said_to_be_so_and_have_no_differences(tmp_path):
    a = write_run(tmp_path / "a", name="a")
    b = write_run(tmp_path / "b", "data.source=synthetic", name="b")
    comparison = compare(read_runs([a, b]))
    assert "different data sets (digits, synthetic)" in comparison.notices[0]
    assert comparison.difference(comparison.groups[1], SECTION, "accuracy") is None


def test_other_test_images_of_the_same_source_are_noticed(tmp_path):
    a, b = write_run(tmp_path / "a", name="a"), write_run(tmp_path / "b", "optim.lr=0.1", name="b")
    write_state(b, 20, ["cat"], labels="other")
    comparison = compare(read_runs([a, b]))
    assert "not all runs have the same test images" in comparison.notices[0]
    assert comparison.difference(comparison.groups[1], SECTION, "accuracy") is None


def test_every_number_of_the_csv_is_that_of_the_comparison(seeds):
    folders, drawn = seeds
    lines = list(csv.DictReader(io.StringIO(as_csv(compare(read_runs(folders))))))
    line = next(x for x in lines if (x["section"], x["score"], x["runs"]) == (SECTION, "accuracy", "loss tcl"))
    assert float(line["mean"]) == pytest.approx(sum(drawn["tcl", s] for s in range(3)) / 3)
    assert float(line["difference"]) == pytest.approx(
        sum(drawn["tcl", s] - drawn["supcon_out", s] for s in range(3)) / 3
    )
    assert (line["n"], line["pairs"]) == ("3", "3")


def test_one_run_has_no_interval_in_any_format(tmp_path):
    comparison = compare(read_runs([write_run(tmp_path / "a", accuracy=0.75)]))
    assert table_of(comparison, SECTION)[1] == [["run", "0", "0.7500", "0.7400", "0.7400", "0.7400"]]
    (line,) = [
        x for x in csv.DictReader(io.StringIO(as_csv(comparison))) if (x["section"], x["score"]) == (SECTION, "f1")
    ]
    assert (line["half_width"], line["difference"], line["pairs"]) == ("", "", "0")


def test_names_of_runs_are_no_formulas_and_no_commands(tmp_path):
    a = write_run(tmp_path / "a", name="=cmd|' /C calc'!A0")
    b = write_run(tmp_path / "b", "data.source=synthetic", "optim.lr=0.3", "train.epochs=3", "loss.name=tcl",
                  "model.projection_dim=7", "model.encoder=resnet18", name=r"\input{secret} | <b>")  # fmt: skip
    comparison = compare(read_runs([a, b]))
    cells = [cell for row in csv.reader(io.StringIO(as_csv(comparison))) for cell in row]
    assert any(cell.startswith("'=cmd") for cell in cells)
    assert not any(cell.startswith("=") for cell in cells)
    assert r"\input" not in as_latex(comparison)
    assert "<b>" not in as_markdown(comparison).replace("&lt;b>", "")


@pytest.mark.parametrize("format", ["terminal", "markdown", "latex", "csv"])
def test_every_format_has_every_section(capsys, seeds, format):
    folders, _ = seeds
    write_scores(folders[0])
    code, out, err = run(capsys, "compare", *folders, "--format", format)
    assert (code, err) == (0, "")
    for text in ("linear, test", "embedding, encoder", "out of distribution, noise, knn", "corruptions, linear"):
        assert text in out


def test_mistakes_are_one_line_and_exit_code_2(capsys, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "empty", results=False)
    for arguments, message in [
        ([], "which run?"),
        ([tmp_path], "no config.yaml in it, so this is not a run folder"),
        ([tmp_path / "a", tmp_path / "a"], "given twice"),
        ([tmp_path / "a", "--format", "html"], "unknown format 'html'"),
        ([tmp_path / "empty"], "no results yet"),
    ]:
        code, out, err = run(capsys, "compare", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err


def test_numbers_that_are_none_are_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    entry = {"stage": "probe", "probe": "knn", "test": {"accuracy": float("nan"), "f1": "high", "recall": 0.5}}
    run_folder.add_result(folder, entry)
    assert "NaN" in (folder / "results.json").read_text()
    assert compare(read_runs([folder])).sections["knn, test"] == ["recall"]
    (folder / "results.json").write_text(json.dumps({"results": [{"test": 3}, {}]}))
    assert compare(read_runs([folder])).sections == {}
