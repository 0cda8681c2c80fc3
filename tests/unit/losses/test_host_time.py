"""What a call of a loss costs the host: few operations, as many for any number of rows, and no wait for the device.

The rows are on the meta device, which has no numbers: where the host would wait for one on CUDA, it raises. A number
on the CPU, such as a fixed temperature, may be read.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_supcon import losses
from hpc_supcon.losses import gathered, pairwise
from hpc_supcon.losses.autograd import RowSums

triton_backend = pytest.importorskip("hpc_supcon.losses.triton_backend", exc_type=ImportError)
from hpc_supcon.losses import triton_formula, triton_rows  # noqa: E402 - without triton, there is nothing to test

BACKENDS = ["tiled", "reference", "triton"]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class NoNumberIsRead(TorchDispatchMode):
    """Fails where the host reads a floating-point number of a tensor: on CUDA it would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = func.overloadpacket is torch.ops.aten._local_scalar_dense and args[0].is_floating_point()
        assert not read, "the host reads a number"
        return func(*args, **(kwargs or {}))


class Tiles:
    """In place of the tiled backend, which waits for the classes of its tiles: numbers of the right shapes."""

    def __init__(self, *_, **__):
        pass

    def row_sums(self, rows, temperature):
        sums = torch.ones(5, len(rows.n_pos), device="meta").unbind()
        return RowSums(*sums) if temperature is not None else RowSums(*sums[:3], None, None)

    def row_gradients(self, rows, weights_M4, temperature):
        return torch.empty(len(rows.n_pos), rows.u.shape[1], device="meta")


class Launches(Counter):
    """Counts the launches of Triton kernels, which are not operations of PyTorch, and computes nothing."""

    def kernel(self, name):
        launches = self

        class Kernel:
            def __getitem__(self, grid):
                return lambda *_, **__: launches.update([name])

        return Kernel()


@pytest.fixture
def launches(monkeypatch):
    """The path of a CUDA device: kernels for the tiles and for the normalization of rows."""
    found = Launches()
    for module, names in (
        (triton_rows, ("_forward_kernel", "_backward_kernel", "_bounds_kernel")),
        (triton_formula, ("_formula_kernel", "_mean_kernel")),
        (triton_backend, ("arrange_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, found.kernel(name))
    monkeypatch.setattr(triton_backend, "launch_kernel", lambda kernel, *_: found.update([kernel.__name__]))
    monkeypatch.setattr(triton_backend, "column_span", lambda n, m, *_, **__: m)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know the meta device
    monkeypatch.setattr(pairwise.torch_tiled, "TorchTiledBackend", Tiles)
    monkeypatch.setattr(gathered, "_has_kernel", lambda *_: True)
    return found


LOSSES = {
    "out": lambda **options: losses.SupConLoss(0.1, **options),
    "in": lambda **options: losses.SupConLoss(0.1, form="in", **options),
    "tcl": lambda **options: losses.TCLLoss(0.1, **options),
    "simclr": lambda **options: losses.SimCLRLoss(0.1, **options),
}


def make(name, backend, learned=False):
    precision = "bf16" if backend == "triton" else "auto"  # for which autocast would be asked
    loss = LOSSES[name](backend=backend, precision=precision, validate=False, learnable_temperature=learned)
    return loss.to("meta") if learned else loss


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


@pytest.mark.parametrize(("backend", "most"), [("tiled", 105), ("triton", 35)])
@pytest.mark.parametrize("name", LOSSES)
def test_a_call_dispatches_as_few_operations_for_any_number_of_rows(launches, name, backend, most):
    found = []
    for rows in (64, 40_000):
        operations_of(make(name, backend), rows)  # what is made once
        launches.clear()
        found.append((operations_of(make(name, backend), rows), dict(launches)))
    assert found[0] == found[1]
    operations, kernels = found[0]
    assert operations.total() + sum(kernels.values()) <= most, found[0]
    if backend == "triton":
        assert all(count == 1 for count in kernels.values()), kernels


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("launches")
def test_a_call_never_makes_the_host_wait(name, backend, learned):
    past, labels = torch.empty(6, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    for queue in (None, (past, labels), (past, None)):
        operations_of(make(name, backend, learned), 24, queue)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_host_reads_no_learned_temperature(name, backend):
    """The same on the CPU with the real tiles, which on CUDA make the host wait for the classes alone."""
    x, labels = torch.randn(12, 2, 5, requires_grad=True), torch.arange(12) % 3
    loss = LOSSES[name](backend=backend, validate=False, learnable_temperature=True)
    with NoNumberIsRead():
        loss(x, labels).backward()
    assert loss.log_temperature.grad.abs() > 0
    with NoNumberIsRead(), pytest.raises(AssertionError, match="the host reads a number"):
        float(loss.temperature)


def test_the_statistics_for_the_log_are_computed_when_they_are_read():
    loss = losses.SupConLoss(0.1)
    assert loss.stats == {}
    loss(torch.randn(4, 2, 3))
    with Operations() as operations:
        found = loss.stats
    assert set(found) == {"anchors_without_positives", "mean_positives"}
    assert operations.calls
