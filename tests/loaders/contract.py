"""Claims about every loader: a class of tests that the test module of each loader inherits."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon.data import EvalOrder, Order, Source, TrainOrder, build_loader, load_splits
from hpc_supcon.data.loaders import CropOptions, LoaderOptions

from ..processes import RUN_TIMEOUT_S

N, BATCH = 26, 6
CROP = CropOptions(views=2, image_size=8)


def save(path: Path, seed: int = 0, size: tuple[int, int] = (80, 64), mode: str = "RGB", **options: object) -> Path:
    """Save a smooth random image, for which resampling filters agree."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **options)
    return path


def write_folder(root: Path, suffix: str = "png", **options: object) -> Path:
    """train/{a,b} with 13 images each, test/{a,b} with one."""
    for name in "ab":
        for i in range(N // 2):
            save(root / "train" / name / f"{i:02d}.{suffix}", seed=ord(name) * 100 + i, **options)
        save(root / "test" / name / f"0.{suffix}", **options)
    return root


def open_train(root: Path, **options: object) -> Source:
    return load_splits("image_folder", root=root, validation_fraction=0, **{"image_size": 16, **options}).train


def load_all(
    name: str, source: Source, order: Order | None = None, device: str = "cpu", **options: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(images, index, the loader, which is closed) of an epoch."""
    order, options = order or EvalOrder(len(source), 8), {"timeout_s": 60, **options}
    loader = build_loader(
        name, source, order, seed=0, rank=0, world_size=1, device=device, options=LoaderOptions(**options)
    )
    try:
        batches = list(loader.epoch(0))
    finally:
        loader.close()
    return torch.cat([b.images for b in batches]), torch.cat([b.index for b in batches]), loader


def listing(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


class ProcessResources:
    """Threads, children, shared memory and open files of this process: what a loader could leave behind."""

    def __init__(self) -> None:
        gc.collect()
        self.threads = {t.ident for t in threading.enumerate()} | set(listing("/proc/self/task"))
        self.children = {p.pid for p in multiprocessing.active_children()}
        # other processes have some too: the names of torch's files contain the process id
        self.shared = [name for name in listing("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")]
        self.mapped = Path("/proc/self/maps").read_text().count("/dev/shm")
        self.files = len(listing("/proc/self/fd"))


def assert_nothing_left(before: ProcessResources) -> None:
    """Threads, processes, shared memory and open files are those of before, at once or soon."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while True:
        now = ProcessResources()
        extra = len(now.threads - before.threads)
        fewer = now.children <= before.children and now.files <= before.files and now.mapped <= before.mapped
        if extra <= 0 and fewer and now.shared == before.shared:
            return
        if time.monotonic() > deadline:
            raise AssertionError((extra, vars(now), vars(before)))
        time.sleep(0.05)


class LoaderContract:
    """Subclasses define `name` and a fixture `source` of N images."""

    name: str
    workers = 2

    def open(self, source, order=None, rank=0, world_size=1, seed=0, **options):
        options = LoaderOptions(**{"workers": self.workers, "timeout_s": 60, **options})
        order = order or TrainOrder(len(source), BATCH)
        return build_loader(
            self.name, source, order, seed=seed, rank=rank, world_size=world_size, device="cpu", options=options
        )

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_ranks_load_the_batches_of_the_order_and_together_the_whole_epoch(self, source, world_size):
        order = TrainOrder(len(source), BATCH)
        per_rank = []
        for rank in range(world_size):
            loader = self.open(source, order, rank, world_size)
            try:
                epochs = [list(loader.epoch(epoch)) for epoch in (0, 1)]
            finally:
                loader.close()
            for epoch, batches in enumerate(epochs):
                expected = order.epoch(0, epoch, rank, world_size)
                assert [b.index.tolist() for b in batches] == expected.tolist()
                assert loader.steps_per_epoch == len(expected)
                for batch in batches:
                    assert torch.equal(batch.labels, source.labels[batch.index])
                    assert batch.images.shape == (BATCH // world_size, 3, 16, 16)
                    assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
            per_rank.append(epochs)
        for epoch in (0, 1):
            loaded = torch.cat([b.index for epochs in per_rank for b in epochs[epoch]])
            assert sorted(loaded.tolist()) == sorted(order.epoch(0, epoch, 0, 1).flatten().tolist())
        first, second = ([b.index.tolist() for b in epochs] for epochs in per_rank[0])
        assert first != second

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_evaluation_loads_every_image_once(self, source, world_size):
        loaded = []
        for rank in range(world_size):
            loader = self.open(source, EvalOrder(len(source), 5), rank, world_size)
            loaded += [i for batch in loader.epoch(0) for i in batch.index.tolist()]
            loader.close()
        assert loaded == list(range(N))

    def test_images_are_those_of_the_index(self, source):
        loader = self.open(source, EvalOrder(len(source), 10))
        images = torch.cat([batch.images for batch in loader.epoch(0)])
        loader.close()
        self.check_images(images, source)

    def check_images(self, images, source):
        assert torch.equal(images, source.stack())

    @pytest.mark.parametrize("crop", [None, CROP])
    def test_an_epoch_resumed_at_step_k_has_the_same_pixels(self, source, crop):
        loader = self.open(source, crop=crop)
        whole = list(loader.epoch(3))
        loader.close()
        loader = self.open(source, crop=crop, workers=1)
        tail = list(loader.epoch(3, start=2))
        assert list(loader.epoch(0, start=loader.steps_per_epoch)) == []
        loader.close()
        assert len(whole) - 2 == len(tail)
        for a, b in zip(whole[2:], tail, strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.images, b.images)

    def test_crops_differ_between_views_and_epochs(self, source):
        loader = self.open(source, crop=CROP)
        first, again, second = (list(loader.epoch(epoch)) for epoch in (0, 0, 1))
        loader.close()
        assert first[0].images.shape == (BATCH, 2, 3, 8, 8)
        assert torch.equal(first[0].images, again[0].images)
        a, b = (torch.cat([batch.images for batch in epoch]) for epoch in (first, second))
        order = [torch.cat([batch.index for batch in epoch]).argsort() for epoch in (first, second)]
        common = min(len(a), len(b)) // 2
        assert (a[order[0]][:common] != b[order[1]][:common]).float().mean() > 0.2
        assert (a[:, 0] != a[:, 1]).float().mean() > 0.2

    def test_crops_are_those_of_torchvision(self, source, reference_crops):
        """Boxes are the same for every loader; the filters differ, but little for smooth images."""
        loader = self.open(source, EvalOrder(len(source), 10), crop=CROP)
        images = torch.cat([batch.images for batch in loader.epoch(5)])
        loader.close()
        difference = (images.float() - reference_crops(source, 5).float()).abs()
        assert difference.mean() < 6
        assert difference.flatten(1).mean(dim=1).max() < 16

    def test_an_epoch_abandoned_halfway_leaves_nothing_behind(self, source):
        self.open_and_abandon(source)  # libraries start some threads once and keep them
        before = ProcessResources()
        for _ in range(3):
            self.open_and_abandon(source)
        assert_nothing_left(before)

    def open_and_abandon(self, source):
        loader = self.open(source)
        batches = loader.epoch(0)
        next(batches)
        other = loader.epoch(1)
        assert torch.equal(next(other).index, TrainOrder(N, BATCH).epoch(0, 1, 0, 1)[0])
        assert list(batches) == []
        loader.close()
        assert list(other) == []
        with pytest.raises(RuntimeError, match="closed"):
            loader.epoch(0)

    @pytest.mark.parametrize("crop", [None, CROP])
    def test_memory_does_not_grow_over_20_epochs(self, source, crop):
        """Of this process and its workers; some epochs are abandoned halfway."""
        loader = self.open(source, crop=crop)
        sizes = []
        for epoch in range(24):
            for step, _ in enumerate(loader.epoch(epoch)):
                if epoch % 5 == 4 and step == 1:
                    break
            if epoch in (2, 3, 20, 21, 22, 23):
                sizes.append(resident_kib())
        loader.close()
        assert min(sizes[2:]) - min(sizes[:2]) < 4096, sizes

    def test_close_frees_everything_after_20_epochs(self, source):
        self.open_and_abandon(source)
        before = ProcessResources()
        loader = self.open(source)
        for epoch in range(20):
            for step, _ in enumerate(loader.epoch(epoch)):
                if epoch == 19 and step == 1:
                    break
        loader.close()
        assert_nothing_left(before)

    def test_a_step_that_does_not_exist_is_refused(self, source):
        loader = self.open(source)
        with pytest.raises(ValueError, match="step 5 is not in an epoch of 4 steps"):
            loader.epoch(0, start=5)
        loader.close()


def resident_kib() -> int:
    """Memory of this process and its descendants that belongs to no file, in KiB."""
    parents, sizes = {}, {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # processes come and go
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
            pid = int(path.parent.name)
            kinds = ("RssAnon", "RssShmem")
            parents[pid], sizes[pid] = int(fields["PPid"]), sum(int(fields.get(k, "0 kB").split()[0]) for k in kinds)
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(sizes[pid] for pid in mine)
