"""`probe.corruptions` at the command line: its table, files and mistakes."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from hpc_supcon import run_folder
from hpc_supcon.data.corruptions import BENCHMARK
from tests.commands import run, succeed
from tests.unit.cli.test_probe import FAST

CORRUPTED = [*FAST, "probe.kind=[linear, softmax]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run without corruptions."""
    path = tmp_path_factory.mktemp("corruptions") / "r"
    succeed("run", "default", *CORRUPTED, f"run_dir={path}")
    return path


def results_of(path):
    return {r["probe"]: r for r in json.loads((path / "results.json").read_text())["results"]}


def test_by_default_nothing_is_corrupted(folder):
    assert "corruptions" not in run_folder.read_scores(folder)
    assert not (folder / "plots" / "corruptions.png").exists()
    assert all("corruptions" not in result for result in results_of(folder).values())


def test_errors_are_printed_written_and_drawn(capsys, folder):
    before = results_of(folder)
    code, out, err = run(capsys, "probe", str(folder), "probe.corruptions=all", "probe.corruption_images=9")
    assert code == 0, err
    scores = run_folder.read_scores(folder)["corruptions"]
    table = out[out.index("errors on 9 corrupted test images") :]
    for kind, result in results_of(folder).items():
        summary = result["corruptions"]
        assert result["test"] == before[kind]["test"]
        assert list(scores[kind]["errors"]) == list(BENCHMARK)
        assert (scores[kind]["mce"], scores[kind]["checkpoint"]) == (summary["mce"], result["checkpoint"])
        assert f"{kind} " in table
        assert f"{summary['clean']:.4f}" in table
        assert f"{summary['mce']:.4f}" in table
        assert f"{summary['worst']}: {summary['worst_error']:.4f}" in table
    with Image.open(folder / "plots" / "corruptions.png") as image:
        assert min(image.size) > 400


def test_more_images_than_there_are_is_refused_before_training(capsys, tmp_path):
    command = ["run", "default", *FAST, f"run_dir={tmp_path}/r", "probe.corruptions=fog"]
    code, out, err = run(capsys, *command, "probe.corruption_images=23")
    assert (code, out) == (2, "")
    assert "probe.corruption_images=23 but the test split has 22 images: lower it, or null for all" in err
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_damaged_scores_are_refused_before_the_probes_are_fitted(capsys, folder, tmp_path):
    (folder / "scores.json").rename(tmp_path / "kept")
    (folder / "scores.json").write_text("{")
    try:
        code, _, err = run(capsys, "probe", str(folder), "probe.corruptions=fog")
    finally:
        (tmp_path / "kept").rename(folder / "scores.json")
    assert code == 2
    assert "scores.json: damaged" in err
