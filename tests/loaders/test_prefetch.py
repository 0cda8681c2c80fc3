"""Claims about how batches reach the device."""

from __future__ import annotations

import threading
import time
from contextlib import closing, contextmanager

import pytest
import torch

from hpc_supcon.data import ArraySource, Batch, EvalOrder, TrainOrder, build_loader
from hpc_supcon.data.loaders import LoaderOptions, torch_workers
from hpc_supcon.data.loaders.base import EpochSteps
from hpc_supcon.data.loaders.prefetch import DEPTH, DaemonThreadPool, ThreadedEpochs, to_device
from hpc_supcon.errors import CorruptSample, LoaderDied

from ..devices import needs_cuda
from .contract import ProcessResources, assert_nothing_left


def batches(n: int):
    for i in range(n):
        yield Batch(torch.full((4, 3, 8, 8), i, dtype=torch.uint8), torch.full((4,), i), torch.arange(4) + i)


def test_on_the_cpu_batches_pass_through_untouched():
    source = batches(3)
    assert to_device(source, "cpu") is source


def test_the_device_gets_every_batch_in_order_and_errors_come_through():
    def failing():
        yield from batches(2)
        raise ZeroDivisionError

    loaded = to_device(failing(), "cpu")
    assert [int(next(loaded).labels[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(loaded)


# ---- batches prepared by threads


def threaded(job, threads: int = 3, timeout_s: float = 20.0) -> ThreadedEpochs:
    """12 batches of 2 images; job(first index of the batch) runs in a thread."""

    def start(pool, epoch, index):
        return lambda: Batch(index, index + epoch, index), [pool.submit(lambda: job(int(index[0])))]

    steps = EpochSteps(EvalOrder(24, 2), 0, 0, 1)
    return ThreadedEpochs("test", steps, start, threads=threads, timeout_s=timeout_s, join_s=5.0)


def test_batches_come_in_order_although_their_jobs_end_in_another():
    with closing(threaded(lambda first: time.sleep(0.02 if first % 4 == 0 else 0))) as epochs:
        for epoch in (0, 3):
            loaded = list(epochs.epoch(epoch, 5))
            assert [batch.index.tolist() for batch in loaded] == [[i, i + 1] for i in range(10, 24, 2)]
            assert [int(batch.labels[0]) for batch in loaded] == [i + epoch for i in range(10, 24, 2)]


def test_only_a_few_batches_are_prepared_ahead():
    started = []
    with closing(threaded(started.append)) as epochs:
        batches = epochs.epoch(0, 0)
        for step in range(5):
            next(batches)
            assert len(started) <= step + 1 + DEPTH


@pytest.mark.parametrize("error", [ZeroDivisionError("in a thread"), TimeoutError("of the job")])
def test_an_error_of_a_job_ends_the_loader_and_names_the_error(error):
    def job(first):
        if first == 6:
            raise error

    before = ProcessResources()
    batches = threaded(job).epoch(0, 0)
    assert [int(next(batches).index[0]) for _ in range(3)] == [0, 2, 4]
    with pytest.raises(LoaderDied, match=rf"data\.loader=test: {type(error).__name__}.*{error}"):
        next(batches)
    assert_nothing_left(before)


def test_a_named_error_of_a_job_is_raised_as_it_is():
    def job(first):
        raise CorruptSample(f"image {first}")

    with closing(threaded(job)) as epochs, pytest.raises(CorruptSample, match=r"^image 0$"):
        next(epochs.epoch(0, 0))


def test_a_job_that_hangs_is_reported_after_the_timeout():
    release, before, began = threading.Event(), ProcessResources(), time.monotonic()
    with pytest.raises(LoaderDied, match=r"data\.loader=test: no batch within data\.timeout_s=0\.3 s"):
        next(threaded(lambda first: release.wait(), timeout_s=0.3).epoch(0, 0))
    assert time.monotonic() - began < 3, "it waited for the thread that hangs"
    release.set()
    assert_nothing_left(before)


def test_a_new_epoch_ends_the_one_before_and_close_ends_both():
    epochs = threaded(lambda first: None)
    first, second = epochs.epoch(0, 0), epochs.epoch(1, 0)
    next(first)
    next(second)
    assert list(first) == []
    epochs.close()
    assert list(second) == []
    with pytest.raises(RuntimeError, match="closed"):
        epochs.epoch(2, 0)


# ---- batches copied to a GPU


@needs_cuda
@pytest.mark.parametrize("n", [0, 1, 50])
def test_on_a_gpu_batches_are_complete_while_it_computes(n):
    weights = torch.randn(2048, 2048, device="cuda")
    seen = []
    for batch in to_device(batches(n), "cuda"):
        weights = weights @ weights / weights.norm()  # keeps the stream busy during the next copy
        seen.append((batch.images.float().mean(), batch.labels, batch.index))
    assert [(int(m), v.tolist(), i.tolist()) for m, v, i in seen] == [
        (k, [k] * 4, list(range(k, k + 4))) for k in range(n)
    ]


@needs_cuda
def test_batches_of_worker_processes_reach_a_gpu():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    source = ArraySource(images, torch.arange(64) % 2, ["a", "b"])
    loader = build_loader("torch", source, TrainOrder(64, 16), seed=0, rank=0, world_size=1, device="cuda")
    for batch in loader.epoch(0):
        assert torch.equal(batch.images.cpu(), images[batch.index.cpu()])
    loader.close()


# ---- CUDA, without a device: what would be asked of it


def test_every_thread_that_computes_on_cuda_has_a_stream_of_its_own(monkeypatch):
    here = threading.local()

    @contextmanager
    def use(stream):
        here.stream = stream
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: (device, threading.get_ident()))
    monkeypatch.setattr(torch.cuda, "stream", use)
    both = threading.Barrier(2)

    def stream():
        both.wait(20)  # both threads have a job
        return getattr(here, "stream", None)

    for device in (torch.device("cuda", 1), torch.device("cpu"), None):
        pool = DaemonThreadPool(2, device)
        streams = [job.result(20) for job in [pool.submit(stream) for _ in range(2)]]
        pool.close(20)
        if device is not None and device.type == "cuda":
            assert [found for found, _ in streams] == [device, device]
            assert len({thread for _, thread in streams}) == 2
        else:
            assert streams == [None, None]


def test_the_torch_loader_copies_a_batch_for_cuda_once_and_into_pinned_memory(monkeypatch):
    copies = []

    def pin_memory(tensor):
        if tensor.data_ptr() not in copies:  # PyTorch's returns a tensor that is pinned already as it is
            tensor = tensor.clone()
            copies.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch_workers, "to_device", lambda batches, device: batches)
    source = ArraySource(torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8), torch.zeros(8).long(), ("a",))
    loader = build_loader(
        "torch",
        source,
        EvalOrder(8, 4),
        seed=0,
        rank=0,
        world_size=1,
        device="cuda",
        options=LoaderOptions(workers=1),
    )
    with closing(loader):
        loaded = list(loader.epoch(0))
        assert torch.equal(torch.cat([b.images for b in loaded]), source.stack())
        assert [b.images.data_ptr() for b in loaded] == copies
        assert [b.images.pin_memory().data_ptr() for b in loaded] == copies  # as the copy to the device does
