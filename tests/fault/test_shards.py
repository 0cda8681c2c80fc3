"""Runs on WebDataset tars: three ranks that are killed within an epoch end with the bits of an uninterrupted run."""

from __future__ import annotations

import io

import numpy as np
import pytest
import webdataset
from PIL import Image

from . import runs
from .test_resume import kill_after_a_checkpoint

SIZES = {"train-0": 50, "train-1": 1, "train-2": 39, "test-0": 12}
STEPS_PER_EPOCH = 81 // 12
EPOCHS = 4


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, rng = tmp_path / "shards", np.random.default_rng(0)
    root.mkdir()
    for name, size in SIZES.items():
        with webdataset.TarWriter(str(root / f"{name}.tar")) as writer:
            for i in range(size):
                data = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data, "PNG")
                writer.write({"__key__": f"{name}-{i}", "png": data.getvalue(), "cls": i % 3})
    own = [f"data.root={root}", "data.source=webdataset", "data.loader=torch", "data.workers=1"]
    return [text for text in runs.SETTINGS if not text.startswith(("data.source", "data.synthetic"))] + own


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, settings, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.run(3, whole, settings=settings)
    steps = EPOCHS * STEPS_PER_EPOCH
    at = kill_after_a_checkpoint(3, killed, last=steps // 2, settings=settings)
    assert at % STEPS_PER_EPOCH, "the kill is in the middle of an epoch"
    stderr = runs.run(3, killed, "--resume", settings=settings)
    assert f"going on from step {at}" in stderr
    assert runs.hashes(killed, steps) == runs.hashes(whole, steps)
