"""The benchmark of the loaders runs and writes its table and plot."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from hpc_supcon import cli

from .contract import write_folder


def bench(tmp_path, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "loader", "--out", str(tmp_path), "--seconds", "0.1", "--rounds", "1", *arguments])
    return stopped.value.code or 0


def test_every_contender_is_measured_and_plotted(tmp_path, monkeypatch, capsys):
    from hpc_supcon.bench import loader

    monkeypatch.setattr(loader, "make_large_set", lambda folder: write_folder(folder, suffix="jpg", size=(64, 64)))
    small = write_folder(tmp_path / "small", suffix="jpg", size=(32, 32))
    only = ["--only", "resident", "--only", "torch", "--only", "torchvision", "--workers", "1"]
    Image.open(small / "train/a/01.jpg").convert("L").save(small / "train/a/00.jpg")
    given = ["--data", str(small), "--batch-size", "8", *only]
    assert bench(tmp_path, *given) == 2
    assert "data.channels=3" in capsys.readouterr().err
    assert bench(tmp_path, *given, "data.channels=3") == 0
    (table,) = tmp_path.glob("*.json")
    results = json.loads(table.read_text())["results"]
    assert {(r["data"], r["name"]) for r in results} >= {("small", "resident"), ("small", "torch")}
    assert all(r["images_per_s"] > 0 for r in results)
    with Image.open(table.with_suffix(".png")) as picture:
        assert picture.size[0] > 300


def test_an_unknown_contender_is_refused(tmp_path, capsys):
    assert bench(tmp_path, "--only", "webdataset") == 2
    assert "unknown contenders webdataset; known: torchvision" in capsys.readouterr().err


def test_a_round_has_a_batch_of_each_worker_however_short_it_is():
    from hpc_supcon.bench.loader import rate

    served = iter([[0] * 4] * 6)
    images_per_s, cpu = rate(served, 0.0, workers=3, device="cpu")
    assert images_per_s > 0
    assert cpu >= 0
    assert list(served) == [], "three to warm up, three that are measured"
