"""Claims about how batches reach the device."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon.data import ArraySource, Batch, TrainOrder, build_loader
from hpc_supcon.data.loaders.prefetch import to_device


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_of_worker_processes_reach_a_gpu():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    source = ArraySource(images, torch.arange(64) % 2, ["a", "b"])
    loader = build_loader("torch", source, TrainOrder(64, 16), seed=0, rank=0, world_size=1, device="cuda")
    for batch in loader.epoch(0):
        assert torch.equal(batch.images.cpu(), images[batch.index.cpu()])
    loader.close()
