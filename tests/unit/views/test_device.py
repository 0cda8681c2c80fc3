"""Claims about views on a device: the host waits for nothing, and states are restored.

The meta device has shapes but no values, so an operation that needs a value on the host fails there.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_supcon.data import Views
from tests.devices import needs_cuda

RGB = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


class RefuseWaits(TorchDispatchMode):
    """Refuses copies between the CPU and the device that would wait for the work queued there."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            if target != args[0].device:
                assert (args[0].device.type, target.type) == ("cpu", "meta"), "a copy from the device"
                assert kwargs.get("non_blocking"), "a copy that waits"
                RefuseWaits.copies += 1
        elif func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            raise AssertionError("a copy that waits")
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "none"},
        {"policy": "flip_crop"},
        {"policy": "simaugment", "blur": 0.5},
        {"policy": "simaugment", "channels_last": True, "dtype": torch.bfloat16},
        {"policy": "autoaugment"},
        {"policy": "randaugment", "randaugment": {"operations": 3, "magnitude": 20}},
    ],
)
@pytest.mark.parametrize("cropped", [False, True])
def test_neither_draw_nor_render_waits_for_the_device(monkeypatch, settings, cropped):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not support the meta device
    views = Views(2, 24, **RGB, **settings).to("meta")
    shape = (40, 2, 3, 24, 24) if cropped else (40, 3, 90, 70)
    images = torch.empty(shape, dtype=torch.uint8, device="meta")
    with RefuseWaits():
        rendered = views(images)
    assert rendered.shape == (40, 2, 3, 24, 24)
    assert rendered.device.type == "meta"
    assert RefuseWaits.copies > 0


def test_the_check_notices_operations_that_wait():
    with RefuseWaits():
        for wait in (
            lambda x: x.cpu(),
            lambda x: torch.ones(2).to(x.device),
            lambda x: x[x > 0],
            lambda x: x.sum().item(),
        ):
            with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
                wait(torch.empty(2, device="meta"))


@needs_cuda
@pytest.mark.parametrize("policy", ["none", "flip_crop", "simaugment", "autoaugment"])
@pytest.mark.parametrize("side", [32, 96])
def test_on_cuda_views_repeat_bit_for_bit_after_reseeding(policy, side):
    images = torch.randint(0, 256, (16, 3, side, side), dtype=torch.uint8, device="cuda")
    views = Views(2, side, **RGB, seed=7, policy=policy).cuda()
    views(images)
    views.reseed(3)
    expected = views(images)
    resumed = Views(2, side, **RGB, seed=8, policy=policy)
    resumed.reseed(3)  # before the generator on the device exists
    assert torch.equal(resumed.cuda()(images), expected)


@needs_cuda
@pytest.mark.parametrize("policy", ["flip_crop", "simaugment", "autoaugment"])
@pytest.mark.parametrize("side", [32, 96])
def test_on_cuda_the_host_does_not_wait(policy, side):
    images = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8, device="cuda")
    views = Views(2, side, **RGB, policy=policy).cuda()
    views(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        views(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
