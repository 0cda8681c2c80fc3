"""The benchmark of the loss: what does not fit is told and leaves the rest, parts of a call, waits of the host."""

from __future__ import annotations

import warnings

import pytest
import torch

from hpc_supcon.bench import loss
from hpc_supcon.bench.common import host_waits, seconds_of
from hpc_supcon.bench.loss_contenders import dense_supcon


def run(names, **options):
    rows, told = [], []

    def skipped(*entry):
        told.append(entry)

    found = loss.run([256], 8, names, "cpu", 2, memory=False, measured=rows.append, skipped=skipped, **options)
    assert found == rows
    return rows, told


def test_forward_and_backward_add_up_and_the_gradient_is_compared_with_the_first():
    precision = torch.get_float32_matmul_precision()
    (dense, tf32, tiled), told = run(["dense", "dense-tf32", "tiled"])
    assert told == []
    for row in (dense, tf32, tiled):
        assert row.seconds == row.forward_s + row.backward_s
        assert row.seconds <= row.seconds_median <= row.seconds_worst
        assert (row.host_waits, row.extra_bytes) == (None, None)
    assert dense.gradient_error is None
    assert tiled.gradient_error < 1e-5
    assert torch.get_float32_matmul_precision() == precision


def test_dense_contenders_above_the_limit_are_told_and_the_others_measured():
    (row,), told = run(["dense", "tiled", "pml"], dense_limit_bytes=1 << 10)
    assert row.name == "tiled"
    assert [what for what, _ in told] == ["dense, N 256, D 8", "pml, N 256, D 8"]
    assert all("more than 0.0 GiB" in why for _, why in told)


@pytest.mark.parametrize("calls", [0, 1])
def test_a_contender_that_runs_out_of_memory_is_told_and_the_others_are_measured(calls, monkeypatch):
    left = [calls]

    def full(z, labels):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dense_supcon(z, labels)

    monkeypatch.setattr(loss, "contender", lambda name, real=loss.contender: full if name == "dense" else real(name))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    (row,), told = run(["dense", "tiled"])
    assert row.name == "tiled"
    assert told == [("dense, N 256, D 8", "out of memory")]
    assert (row.gradient_error is None) == (calls == 0), "compared with the first that was measured"


def test_waits_of_the_host_are_counted_and_nothing_else_and_the_mode_is_restored(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        for message in (
            "called a synchronizing CUDA operation",
            "deprecated",
            "called a synchronizing CUDA operation",
        ):
            warnings.warn(message, stacklevel=1)

    assert host_waits(call, torch.device("cuda")) == 2
    assert modes == ["default", "warn", "default"]
    with pytest.raises(ZeroDivisionError):
        host_waits(lambda: 1 / 0, torch.device("cuda"))
    assert modes[-1] == "default"
    assert host_waits(call, torch.device("cpu")) is None, "and the call is not made"


def test_the_fastest_of_several_calls_counts():
    calls = []
    assert seconds_of(lambda: calls.append(1), torch.device("cpu"), rounds=4) >= 0
    assert len(calls) == 4
