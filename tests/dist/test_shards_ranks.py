"""An epoch over WebDataset tars on three ranks: every sample once, whatever the sizes of the tars."""

from __future__ import annotations

import io

import numpy as np
import pytest
import webdataset
from PIL import Image

from hpc_supcon.data import EvalOrder, TrainOrder, build_loader, open_source
from hpc_supcon.data.loaders import LoaderOptions

from .ranks import run_ranks

SIZES = (23, 1, 2, 4)
N, BATCH = sum(SIZES), 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Image i is of brightness i."""
    folder, value = tmp_path_factory.mktemp("shards"), 0
    for shard, size in enumerate((*SIZES, 2)):
        name = f"train-{shard}" if shard < len(SIZES) else "test-0"
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as writer:
            for _ in range(size):
                data = io.BytesIO()
                Image.fromarray(np.full((4, 4), value, np.uint8)).save(data, "PNG")
                writer.write({"__key__": str(value), "png": data.getvalue(), "cls": value % 2})
                value += 1
    return folder


def served(rank, world_size, root, name, is_training, start):
    """Brightness and index of the images that this rank loads in epoch 1 from step `start` on."""
    source = open_source("webdataset", root).train
    order = TrainOrder(N, BATCH) if is_training else EvalOrder(N, BATCH // world_size)
    options = LoaderOptions(workers=2, timeout_s=300)
    loader = build_loader(
        name, source, order, seed=3, rank=rank, world_size=world_size, device="cpu", options=options
    )
    batches = list(loader.epoch(1, start))
    loader.close()
    return [(b.images[:, 0, 0, 0].tolist(), b.index.tolist(), b.labels.tolist()) for b in batches]


@pytest.mark.parametrize(("name", "is_training"), [("torch", True), ("resident", True), ("torch", False)])
def test_every_sample_is_served_once_to_one_of_three_ranks(root, tmp_path, monkeypatch, name, is_training):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ranks = run_ranks(served, 3, root, name, is_training, 0)
    everything = [value for rank in ranks for images, _, _ in rank for value in images]
    assert sorted(everything) == list(range(N))
    for rank in ranks:
        for images, index, labels in rank:
            assert images == index
            assert labels == [value % 2 for value in images]
    if is_training:
        assert {len(rank) for rank in ranks} == {N // BATCH}


def test_an_epoch_goes_on_in_its_middle_with_the_samples_that_are_left(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole, rest = (run_ranks(served, 3, root, "torch", True, start) for start in (0, 2))
    assert rest == [rank[2:] for rank in whole]
