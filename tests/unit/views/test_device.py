"""Claims about views on a device that answers late: nothing is asked of it, and what it draws is distributed right.

The meta device has shapes and no values, so an operation that had to wait for a value fails there.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_supcon.data import Views
from hpc_supcon.data.views.resample import _at_once, draw_boxes

RGB = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


class NothingWaits(TorchDispatchMode):
    """Refuses copies between the CPU and the device that would wait for what is queued there."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            there = torch.device(kwargs.get("device") or args[0].device)
            if there != args[0].device:
                assert (args[0].device.type, there.type) == ("cpu", "meta"), "a copy from the device"
                assert kwargs.get("non_blocking"), "a copy that waits"
                NothingWaits.copies += 1
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
def test_neither_drawing_nor_rendering_waits_for_the_device(monkeypatch, settings, cropped):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    views = Views(2, 24, **RGB, **settings).to("meta")
    shape = (40, 2, 3, 24, 24) if cropped else (40, 3, 90, 70)
    images = torch.empty(shape, dtype=torch.uint8, device="meta")
    with NothingWaits():
        made = views(images)
    assert made.shape == (40, 2, 3, 24, 24)
    assert made.device.type == "meta"
    assert NothingWaits.copies > 0


def test_a_value_that_is_waited_for_would_be_noticed():
    with NothingWaits():
        for wait in (
            lambda x: x.cpu(),
            lambda x: torch.ones(2).to(x.device),
            lambda x: x[x > 0],
            lambda x: x.sum().item(),
        ):
            with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
                wait(torch.empty(2, device="meta"))


def test_boxes_of_all_tries_at_once_are_those_of_one_try_after_the_other():
    """Given the sizes of every try, the first that fits is taken, and the center where none does."""
    n, tries = 500, 10
    sizes = torch.randint(1, 60, (tries, n, 2), generator=torch.Generator().manual_seed(0)).double()
    fits = (sizes <= 20).all(dim=2)
    size, found = _at_once(n, lambda *shape: (sizes, fits), (7, 9))
    for i in range(n):
        first = next((k for k in range(tries) if fits[k, i]), None)
        assert size[i].tolist() == ([7, 9] if first is None else sizes[first, i].tolist())
        assert bool(found[i]) == (first is not None)
    assert 0.1 < float(found.float().mean()) < 0.9


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, (0.2, 1.0)), (20, 28, (0.6, 1.0))])
def test_boxes_drawn_on_a_device_are_distributed_as_those_of_the_cpu(monkeypatch, height, width, scale):
    n, ratio = 8000, (3 / 4, 4 / 3)
    settings = {"scale": scale, "ratio": ratio, "generator": torch.Generator().manual_seed(1)}
    here = draw_boxes(n, height, width, **settings).double()
    rand = torch.rand  # for a device called cuda, on the CPU
    monkeypatch.setattr(torch, "rand", lambda *shape, device, **kw: rand(*shape, **kw))
    there = draw_boxes(n, height, width, **settings, device="cuda").double()
    assert not torch.equal(here, there)
    for a, b in zip(here.T, there.T, strict=True):
        error = math.sqrt(float(a.var() + b.var()) / n) + 1e-9
        assert abs(float(a.mean() - b.mean())) < 4.5 * error
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.05, abs=1e-9)
        counts = [torch.bincount(x.long(), minlength=65) for x in (a, b)]
        assert float((counts[0] - counts[1]).abs().max()) < 5 * math.sqrt(n / 2)


def test_a_state_is_taken_up_on_another_kind_of_device_with_its_part_for_the_cpu():
    """A CUDA generator's state is 16 bytes behind that of the CPU."""
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    views = Views(2, 16, **RGB, seed=3)
    views(images)
    state = views.state()
    expected = views(images)
    views.load_state(torch.cat((state, torch.zeros(16, dtype=torch.uint8))))
    assert torch.equal(views(images), expected)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("policy", ["none", "flip_crop", "simaugment", "autoaugment"])
@pytest.mark.parametrize("side", [32, 96])
def test_on_cuda_views_continue_bit_for_bit_from_a_saved_state(policy, side):
    images = torch.randint(0, 256, (16, 3, side, side), dtype=torch.uint8, device="cuda")
    views = Views(2, side, **RGB, seed=7, policy=policy).cuda()
    views(images)
    state = views.state()
    expected = views(images)
    resumed = Views(2, side, **RGB, seed=8, policy=policy).cuda()
    resumed.load_state(state)
    assert torch.equal(resumed(images), expected)


@cuda
@pytest.mark.parametrize("policy", ["flip_crop", "simaugment", "autoaugment"])
@pytest.mark.parametrize("side", [32, 96])
def test_on_cuda_nothing_waits(policy, side):
    images = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8, device="cuda")
    views = Views(2, side, **RGB, policy=policy).cuda()
    views(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        views(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
