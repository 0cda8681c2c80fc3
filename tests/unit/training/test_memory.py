"""Out of memory: the proposed settings fit into the memory that is free, by measurement."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from hpc_supcon.errors import OutOfMemory
from hpc_supcon.training import memory
from hpc_supcon.training.fit import fit
from hpc_supcon.training.plan import TrainingPlan
from hpc_supcon.training.state import Training
from tests.dist.test_step import build

GIB = 2**30


def test_live_bytes_are_those_of_tensors_that_are_alive():
    with memory._LiveBytes() as live:
        a = torch.zeros(1000)
        b = a * 2  # 8000 bytes
        view = b[10:]
        del a, b
        c = view + 1  # 4000 + 3960
        d = c.clone()  # and 3960 more
        c.add_(1)
        del d, c, view
        torch.zeros(10)
    assert live.peak == 4000 + 2 * 3960
    assert live.now == 0


def test_live_bytes_include_the_backward_pass():
    n, depth = 512, 6
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(n, n, bias=False), nn.Sigmoid()) for _ in range(depth)))
    x = torch.randn(64, n)
    with memory._LiveBytes() as live:
        torch.autograd.grad(layers(x).sum(), list(layers.parameters()))
    weights, activation = depth * n * n * 4, 64 * n * 4
    # every Sigmoid's output is kept to the end of the forward pass, every gradient of a weight to the end
    assert weights + activation < live.peak < weights + (depth + 4) * activation


@pytest.fixture
def short_of_memory(monkeypatch):
    """fail(error, used, limit, overrides) -> the message of a training step on a machine with `limit` bytes."""

    def fail(error, used, limit, overrides=()):
        state, options, batches = build(0, 1, overrides)
        monkeypatch.setattr(memory, "used_and_limit", lambda device: (used, limit))
        with pytest.raises(OutOfMemory) as caught, memory.memory_advice(state, batches[0], options):
            raise error
        assert caught.value.__context__ is None or caught.value.__suppress_context__
        return str(caught.value), state, batches[0]

    return fail


CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [CUDA_ERROR, CPU_ERROR, MemoryError()])
def test_the_piece_proposed_fits_and_twice_as_large_does_not(short_of_memory, error):
    state, options, batches = build(0, 1, [])
    used = 10_000_000
    need = [memory.peak_bytes(state, batches[0], options, n) for n in (4, 8)]
    limit = round((used + (need[0] + need[1]) / 2) / memory.SHARE["cpu"])  # room for 4 images, not for 8
    message, _, _ = short_of_memory(error, used, limit)
    assert re.search(r"step 0: out of memory on cpu with 24 images in one pass \(about ", message)
    assert re.search(r"set train\.micro_batch_size=4 \(about 0\.0 GiB\)", message)
    assert state.model.training


def test_pieces_that_are_too_large_become_smaller_ones(short_of_memory):
    message, _, _ = short_of_memory(CPU_ERROR, 0, 100 * GIB, ["train.micro_batch_size=16"])
    assert "with 16 images in one pass" in message
    assert "set train.micro_batch_size=8 " in message  # whatever the estimate says: 16 did not fit


def test_for_losses_without_pieces_a_smaller_batch_is_proposed(short_of_memory):
    message, _, _ = short_of_memory(CPU_ERROR, 0, 100 * GIB, ["loss.name=reconstruction"])
    assert "set data.batch_size=16 (about" in message
    assert "micro_batch_size" not in message


def test_where_nothing_fits_activation_checkpointing_is_proposed(short_of_memory):
    message, _, _ = short_of_memory(CPU_ERROR, 10, 20)
    assert "not even one fits; set train.activation_checkpointing=true" in message


def test_other_errors_are_not_changed():
    state, options, batches = build(0, 1, [])
    with pytest.raises(RuntimeError, match="sizes of tensors"), memory.memory_advice(state, batches[0], options):
        raise RuntimeError("sizes of tensors must match")


def test_the_training_loop_raises_the_error_with_the_proposal(monkeypatch):
    state, options, batches = build(0, 1, [])

    def step(state, batch, options):
        raise CPU_ERROR

    class Loader:
        @staticmethod
        def epoch(epoch, start):
            return iter(batches)

    plan = TrainingPlan(
        steps=5, steps_per_epoch=5, images_per_step=24, lr=lambda step: 0.1, log_every=1, save_at=lambda step: False
    )
    monkeypatch.setattr("hpc_supcon.training.fit.train_step", step)
    with pytest.raises(OutOfMemory, match=r"set train\.micro_batch_size="):
        fit(Training(state, options, Loader(), plan, {}), None, log=None, progress=None)


def test_memory_of_this_process_is_between_zero_and_that_of_the_machine():
    used, limit = memory.used_and_limit(torch.device("cpu"))
    assert 10 * 2**20 < used < limit < 2**50
