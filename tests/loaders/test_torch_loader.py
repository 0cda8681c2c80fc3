"""Claims about the resident loader and the one with worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from hpc_supcon.data import ArraySource, EvalOrder, TrainOrder, build_loader
from hpc_supcon.data.loaders import LoaderOptions, choose_loader, replaced_on_all_ranks
from hpc_supcon.errors import CorruptSample, DataError, LoaderDied

from ..dist.ranks import run_ranks
from ..processes import RUN_TIMEOUT_S
from .contract import BATCH, LoaderContract, N, ProcessResources, assert_nothing_left, open_train


class TestTorch(LoaderContract):
    name = "torch"

    @pytest.fixture
    def source(self, folder):
        return open_train(folder)


class TestResident(LoaderContract):
    name = "resident"

    @pytest.fixture
    def source(self, folder):
        train = open_train(folder)
        return ArraySource(train.stack(), train.labels, train.classes)


class TestTorchOnArrays(TestResident):
    name = "torch"


LOADERS = ["resident", "torch"]


def load_all(name, source, **options):
    order = EvalOrder(len(source), 8)
    options = LoaderOptions(**{"timeout_s": 60, **options})
    loader = build_loader(name, source, order, seed=0, rank=0, world_size=1, device="cpu", options=options)
    try:
        return list(loader.epoch(0)), loader
    finally:
        loader.close()


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "text"])
def test_an_image_that_does_not_decode_is_named(damaged, name, kind):
    source, index, path = damaged(kind)
    with pytest.raises(CorruptSample) as caught:
        load_all(name, source)
    assert str(path) in str(caught.value)
    assert name == "resident" or f"image {index} of the set" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cmyk", {}, "mode CMYK"),
        ("16 bit", {}, "more than 8 bits"),
        ("16 bit", {"channels": 3}, "more than 8 bits"),
        ("gray", {}, "mode L"),
    ],
)
def test_an_image_of_another_format_is_an_error_even_where_corrupt_ones_are_replaced(
    damaged, name, kind, options, message
):
    source, _, path = damaged(kind, **options)
    with pytest.raises(DataError, match=message) as caught:
        load_all(name, source, on_corrupt="replace")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "text"])
def test_every_loader_replaces_a_corrupt_image_by_the_same_valid_one(damaged, kind):
    source, index, _ = damaged(kind)
    replacements = {}
    for name, workers in (("resident", 1), ("torch", 1), ("torch", 3)):
        batches, loader = load_all(name, source, on_corrupt="replace", workers=workers)
        assert loader.replaced == 1
        chosen = torch.cat([b.index for b in batches])
        assert (chosen != torch.arange(N)).nonzero().flatten().tolist() == [index]
        other = int(chosen[index])
        images = torch.cat([b.images for b in batches])
        assert torch.equal(images[index], source.read(other))
        assert torch.equal(torch.cat([b.labels for b in batches]), source.labels[chosen])
        replacements[name, workers] = other
    assert len(set(replacements.values())) == 1


def test_a_set_of_corrupt_images_only_is_an_error(damaged):
    source, index, _ = damaged("text")
    for name in LOADERS:
        with pytest.raises(CorruptSample, match="neither do 100 others"):
            load_all(name, source.subset([index] * 4), on_corrupt="replace")


def replaced_on_a_rank(rank, world_size, root):
    """(images replaced by the loader of this rank, by those of all ranks)."""
    source = open_train(Path(root))
    options = LoaderOptions(on_corrupt="replace")
    order = EvalOrder(len(source), 8)
    loader = build_loader(
        "torch", source, order, seed=0, rank=rank, world_size=world_size, device="cpu", options=options
    )
    list(loader.epoch(0))
    loader.close()
    return loader.replaced, replaced_on_all_ranks(loader)


def test_the_number_of_replaced_images_is_the_same_on_all_ranks(damaged):
    _, _, path = damaged("text")
    assert run_ranks(replaced_on_a_rank, 2, str(path.parents[2])) == [(0, 1), (1, 1)]


# ---- worker processes that die or hang


class SleepingSource(ArraySource):
    """Reading the image of that index never ends."""

    def __init__(self, source, index, folder: Path) -> None:
        super().__init__(source.stack(), source.labels, source.classes)
        self.index, self.folder = index, folder

    def read(self, i):
        (self.folder / str(os.getpid())).touch()
        while i == self.index:
            time.sleep(60)
        return super().read(i)


class KilledSource(ArraySource):
    """Reading image 20 kills the process that reads it."""

    index = 20

    def read(self, i):
        if i == self.index:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(i)


class SignalledSource(ArraySource):
    """Reading an image first sends this process the signals that a scheduler sends to a process group."""

    def read(self, i):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(os.getpid(), number)
        return super().read(i)


def arrays(kind=ArraySource, *args):
    images = torch.arange(N, dtype=torch.uint8).repeat_interleave(3 * 12 * 12).view(N, 3, 12, 12)
    return kind(images, torch.arange(N) % 2, ["a", "b"], *args)


def test_a_worker_killed_while_it_reads_is_reported_at_once():
    before, began = ProcessResources(), time.monotonic()
    with pytest.raises(LoaderDied, match=r"worker process \d \(pid \d+\) was killed by SIGKILL"):
        load_all("torch", arrays(KilledSource), timeout_s=2 * RUN_TIMEOUT_S)
    assert time.monotonic() - began < RUN_TIMEOUT_S  # less than data.timeout_s
    assert_nothing_left(before)


def test_a_worker_killed_between_two_batches_is_reported():
    source = arrays()
    options = LoaderOptions(workers=2, timeout_s=60)
    loader = build_loader(
        "torch", source, EvalOrder(N, 1), seed=0, rank=0, world_size=1, device="cpu", options=options
    )
    batches = loader.epoch(0)
    before = {p.pid for p in multiprocessing.active_children()}
    next(batches)
    for pid in {p.pid for p in multiprocessing.active_children()} - before:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(LoaderDied, match="SIGKILL"):
        list(batches)
    assert {p.pid for p in multiprocessing.active_children()} <= before


def test_a_worker_that_sleeps_forever_is_reported_after_the_timeout_and_killed(tmp_path):
    load_all("torch", arrays())  # starts the server that forks the workers, so that they begin to read within the 8 s
    before = ProcessResources()
    with pytest.raises(LoaderDied, match=r"no batch within data\.timeout_s=8 s"):
        load_all("torch", SleepingSource(arrays(), 9, tmp_path), timeout_s=8)
    assert_nothing_left(before)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_that_cannot_start_are_reported(monkeypatch):
    """As in a script whose work is not under `if __name__ == "__main__"`."""

    def broken(process):
        raise BrokenPipeError("Broken pipe")

    before = ProcessResources()
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", broken)
    with pytest.raises(LoaderDied, match=r"cannot be started.*if __name__ == '__main__'"):
        load_all("torch", arrays())
    assert_nothing_left(before)


def test_a_tmpdir_too_long_for_a_socket_is_named(monkeypatch):
    def broken(process):
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("tempfile.tempdir", "/a/long/folder")
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", broken)
    with pytest.raises(LoaderDied, match=r"TMPDIR=/a/long/folder is too long for the name of a socket") as caught:
        load_all("torch", arrays())
    assert "__main__" not in str(caught.value)


class BusErrorSource(ArraySource):
    """Reading it kills the worker as a page of a full /dev/shm does."""

    def read(self, i):
        os.kill(os.getpid(), signal.SIGBUS)
        return super().read(i)


def test_a_worker_that_finds_shared_memory_full_is_reported_with_advice():
    with pytest.raises(LoaderDied, match=r"killed by SIGBUS: /dev/shm is full.*--shm-size"):
        load_all("torch", arrays(BusErrorSource))


def test_workers_survive_the_signals_of_a_scheduler():
    batches, _ = load_all("torch", arrays(SignalledSource))
    assert torch.equal(torch.cat([b.images for b in batches]), arrays().stack())


def test_a_batch_may_be_kept_and_changed():
    source = arrays()
    loader = build_loader("torch", source, TrainOrder(N, BATCH), seed=0, rank=0, world_size=1, device="cpu")
    kept = []
    for batch in loader.epoch(0):
        kept.append((batch.index.clone(), batch.images))
        batch.labels.zero_()
        batch.index.zero_()
    loader.close()
    for index, images in kept:
        assert torch.equal(images, source.stack()[index])


def test_deleting_a_loader_that_was_not_closed_ends_its_workers():
    before = ProcessResources()
    loader = build_loader("torch", arrays(), TrainOrder(N, BATCH), seed=0, rank=0, world_size=1, device="cpu")
    batches = loader.epoch(0)
    next(batches)
    del batches, loader
    assert_nothing_left(before)


def test_the_global_random_generator_is_not_used():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_all("torch", arrays())
    assert torch.equal(torch.rand(3), expected)


# ---- auto


def test_auto_keeps_a_set_that_fits_in_memory_and_says_why(folder):
    name, reason = choose_loader(open_train(folder), "cpu", LoaderOptions())
    assert name == "resident"
    assert "the set fits into memory" in reason


def test_auto_takes_workers_for_a_set_that_does_not_fit(folder, monkeypatch):
    monkeypatch.setattr("hpc_supcon.data.loaders._free_memory", lambda device: 1000)
    name, reason = choose_loader(open_train(folder), "cpu", LoaderOptions())
    assert (name, "does not fit" in reason) == ("torch", True)
