"""What a call of a loss costs the host: few operations, as many for any number of rows, and no wait for the device.

The rows are on the meta device, which has no numbers: where the host would wait for one on CUDA, it raises. A number
on the CPU, such as a fixed temperature, may be read.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_supcon import losses
from hpc_supcon.losses import gathered, pairwise
from hpc_supcon.losses.autograd import RowSums


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Kernels:
    """In place of the Triton backend, whose kernels are not operations of PyTorch: numbers of the right shapes."""

    def __init__(self, *_, **__):
        pass

    def row_sums(self, rows, temperature):
        sums = torch.ones(5, len(rows.n_pos), device="meta").unbind()
        return RowSums(*sums) if temperature is not None else RowSums(*sums[:3], None, None)

    def row_gradients(self, rows, weights_M4, temperature):
        return torch.empty(len(rows.n_pos), rows.u.shape[1], device="meta")


@pytest.fixture
def kernels(monkeypatch):
    """The path of a CUDA device: kernels for the tiles and for the normalization of rows."""

    class Rows:
        @staticmethod
        def normalize(x, order, scale, zero_row):
            return torch.empty(x.shape, device="meta"), torch.empty(len(x), 1, device="meta")

        @staticmethod
        def normalize_backward(grad_u, u, order, scale, inverse, dtype):
            return torch.empty(u.shape, dtype=dtype, device="meta"), torch.empty(len(u), device="meta")

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know the meta device
    monkeypatch.setattr(pairwise.torch_tiled, "TorchTiledBackend", Kernels)
    monkeypatch.setattr(gathered, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(losses, "triton_rows", Rows, raising=False)
    monkeypatch.setitem(sys.modules, "hpc_supcon.losses.triton_rows", Rows)


LOSSES = {
    "out": lambda backend: losses.SupConLoss(0.1, backend=backend, validate=False),
    "in": lambda backend: losses.SupConLoss(0.1, form="in", backend=backend, validate=False),
    "tcl": lambda backend: losses.TCLLoss(0.1, backend=backend, validate=False),
    "simclr": lambda backend: losses.SimCLRLoss(0.1, backend=backend, validate=False),
}


def operations_of(loss, rows, queue=None):
    x = torch.empty(rows // 2, 2, 8, device="meta", requires_grad=True)
    labels = torch.empty(rows // 2, dtype=torch.int64, device="meta")
    with Operations() as operations:
        loss(x, labels, queue=queue, rows_per_rank=[rows]).backward()
    return operations.calls


@pytest.mark.parametrize(
    "wait", [lambda x: x[0].item(), lambda x: bool(x[0]), lambda x: x.unique(), lambda x: x[x > 0]]
)
def test_the_meta_device_finds_waits(wait):
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.ones(3, device="meta"))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", LOSSES)
def test_a_call_dispatches_as_few_operations_for_any_number_of_rows(name):
    few, many = (operations_of(LOSSES[name]("tiled"), rows) for rows in (64, 40_000))
    assert few == many
    assert few.total() < 105, few


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_call_never_makes_the_host_wait(name, backend):
    past, labels = torch.empty(6, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    for queue in (None, (past, labels), (past, None)):
        operations_of(LOSSES[name](backend), 24, queue)


def test_the_statistics_for_the_log_are_computed_when_they_are_read():
    loss = losses.SupConLoss(0.1)
    assert loss.stats == {}
    loss(torch.randn(4, 2, 3))
    with Operations() as operations:
        found = loss.stats
    assert set(found) == {"anchors_without_positives", "mean_positives"}
    assert operations.calls
