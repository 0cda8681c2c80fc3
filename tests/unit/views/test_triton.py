"""The fused kernel of small views: its pixels in the interpreter on the CPU, and that it compiles for GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpc_supcon.data import Views
from tests.devices import needs_cuda
from tests.scripts import run_script

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]

# Triton reads TRITON_INTERPRET when it is imported, so the checks run in a process of their own.
PIXELS = """
import torch
from hpc_supcon.data import MultiCrop, Views
from hpc_supcon.data.views.triton import render

torch.set_num_threads(1)


def pixels(views, images, dtype=torch.float32):
    drawn = views.draw(len(images), *images.shape[2:])
    expected = views.render(images, drawn)
    layout = torch.channels_last if views.channels_last else torch.contiguous_format
    got = torch.empty(expected.flatten(0, 1).shape, dtype=dtype, memory_format=layout)
    render(images, drawn, views.jitter.sequences, views.mean, views.std, got, outside=views.crops.outside)
    return got.view_as(expected), expected


# (channels, height, width, size): same size, enlarged, shrunk (wide filter), gray, a block that is not full.
SIZES = ((3, 32, 32, 32), (3, 9, 20, 24), (3, 40, 37, 16), (1, 28, 28, 28), (1, 30, 9, 13))
for channels, height, width, size in SIZES:
    images = torch.randint(0, 256, (5, channels, height, width), dtype=torch.uint8)
    images[0] = images[0, :1]  # no hue, no spread
    normalization = dict(mean=[0.4, 0.5, 0.6][:channels], std=[0.2, 0.3, 0.25][:channels])
    for changes in (
        dict(crop_scale=(0.05, 1.0)),
        dict(policy="flip_crop"),
        dict(hue=0.5, brightness=1.0, contrast=2.0, saturation=2.0, jitter_probability=1.0, channels_last=True),
        dict(hue=0.0, contrast=0.0, grayscale=0.6),
        dict(grayscale=0.5, solarize=[0.0, 0.7]),
    ):
        got, expected = pixels(Views(2, size, **normalization, **changes), images)
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
for channels, mode, size in ((3, "zeros", 32), (1, "reflect", 28), (3, "reflect", 26)):
    images = torch.randint(0, 256, (5, channels, 32, 28), dtype=torch.uint8)
    normalization = dict(mean=[0.4, 0.5, 0.6][:channels], std=[0.2, 0.3, 0.25][:channels])
    for policy in ("pad_crop", "simaugment"):
        views = Views(4, size, **normalization, policy=policy, crop="padded", padding=5, padding_mode=mode)
        got, expected = pixels(views, images)
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
views = Views(3, 32, mean=[0.4] * 3, std=[0.3] * 3, channels_last=True)
got, expected = pixels(views, images, torch.bfloat16)
assert got.dtype == torch.bfloat16
torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=0)
both = MultiCrop(*(Views(n, side, mean=[0.4] * 3, std=[0.3] * 3, solarize=0.5) for n, side in ((2, 32), (3, 14))))
both.reseed(3)
for views in both.parts:
    got, expected = pixels(views, images)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
print("pixels agree")
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hpc_supcon.data.views.triton import _views_kernel as kernel

POINTERS = {
    **{"images": "*u8", "boxes": "*i64", "decisions": "*u8", "sequences": "*i64"},
    **dict.fromkeys(("factors", "mean", "std"), "*fp32"),
}
names = kernel.arg_names
CASES = ((80, "fp32", 3, 2, 32), (90, "bf16", 1, 2, 28), (90, "bf16", 3, 5, 64))
for capability, dtype, channels, taps, size in CASES:
    fixed = dict(S=size, CHANNELS=channels, TAPS_Y=taps, TAPS_X=taps, PADDING=size % 3)
    fixed["BLOCK"] = 4096 if size == 64 else 1024
    types = {**POINTERS, "out": "*" + dtype, **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
    )
    options = dict(num_warps=4 if size <= 32 else 8, enable_fp_fusion=True)
    ptx = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert ".entry _views_kernel" in ptx
    assert ".local" not in ptx, "a view fits into the registers of its program"
print("compiled")
"""


def test_in_the_interpreter_the_kernel_computes_the_pixels_of_the_torch_path():
    assert "pixels agree" in run_script(PIXELS, TRITON_INTERPRET="1")


def test_the_kernel_compiles_without_a_gpu(tmp_path):
    assert "compiled" in run_script(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "height", "fused"),
    [
        ({}, 32, True),
        ({"policy": "flip_crop"}, 64, True),
        ({"policy": "pad_crop"}, 32, True),
        ({}, 65, False),
        ({"solarize": [0.0, 0.2]}, 32, True),
        ({"blur": 0.5}, 32, False),
        ({"blur": [0.0, 0.1]}, 32, False),
        ({"policy": "none"}, 32, False),
        ({"policy": "autoaugment"}, 32, False),
    ],
)
def test_small_images_on_cuda_without_blur_or_operations_take_the_kernel(settings, height, fused):
    class OnCuda(torch.Tensor):
        is_cuda = True

    views = Views(2, 32, mean=[0.5] * 3, std=[0.5] * 3, **settings)
    images = torch.zeros(2, 3, height, 32, dtype=torch.uint8)
    assert views._takes_kernel(images.as_subclass(OnCuda)) == fused
    assert not views._takes_kernel(images)


@needs_cuda
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("height", "size"), [(32, 32), (48, 24), (28, 64)])
def test_on_cuda_the_kernel_computes_the_pixels_of_the_cpu(height, size, channels_last):
    views = Views(2, size, mean=[0.4] * 3, std=[0.3] * 3, channels_last=channels_last)
    images = torch.randint(0, 256, (64, 3, height, height), dtype=torch.uint8)
    drawn = views.draw(64, height, height)
    expected = views.render(images, drawn)
    on_cuda = replace(drawn, boxes=drawn.boxes.cuda(), factors=drawn.factors.cuda())
    ours = views.cuda().render(images.cuda(), on_cuda)
    assert ours.stride() == expected.stride()
    torch.testing.assert_close(ours.cpu(), expected, atol=5e-5, rtol=0)
