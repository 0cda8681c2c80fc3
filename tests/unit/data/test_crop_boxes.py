"""Claims about the boxes of random resized crops; torchvision's RandomResizedCrop is the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from hpc_supcon.data.crop_boxes import _draw_all_tries, central_boxes, central_size, crop_boxes, draw_boxes
from hpc_supcon.data.sources.source import resize_and_crop

# ---- drawn from a generator


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (28, 40, (0.08, 1.0), (3 / 4, 4 / 3)),
        (8, 64, (0.9, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_drawn_boxes_are_distributed_as_torchvisions(height, width, scale, ratio):
    n = 6000
    ours = draw_boxes(n, height, width, scale=scale, ratio=ratio, generator=torch.Generator().manual_seed(3)).double()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        image = torch.empty(3, height, width)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
        ).double()
    for name, number in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3],
        "log ratio": lambda b: (b[:, 3] / b[:, 2]).log(),
        "top, given the height": lambda b: b[:, 0] * b[:, 2],
    }.items():
        a, b = number(ours), number(theirs)
        error = math.sqrt(float(a.var() + b.var()) / n) + 1e-9
        assert abs(float(a.mean() - b.mean())) < 4.5 * error, name
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.08, abs=1e-9), name
        histograms = [
            torch.histc(x, 12, float(torch.cat((a, b)).min()), float(torch.cat((a, b)).max())) for x in (a, b)
        ]
        assert float((histograms[0] - histograms[1]).abs().max()) < 5 * math.sqrt(n / 2), name
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


def test_where_no_box_fits_drawn_boxes_are_torchvisions_central_one():
    for height, width in ((8, 64), (64, 8), (10, 10)):
        # area above 1 fits nothing, so that both sides fall back
        ours = draw_boxes(2, height, width, scale=(4, 5), ratio=(3 / 4, 4 / 3), generator=torch.Generator())
        expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [4, 5], [3 / 4, 4 / 3])
        assert ours.tolist() == [list(expected)] * 2


def test_of_all_tries_drawn_at_once_the_first_that_fits_is_taken():
    """And the central size where none fits."""
    n, tries = 500, 10
    sizes = torch.randint(1, 60, (tries, n, 2), generator=torch.Generator().manual_seed(0)).double()
    fits = (sizes <= 20).all(dim=2)
    size, found = _draw_all_tries(n, lambda *shape: (sizes, fits), (7, 9))
    for i in range(n):
        first = next((k for k in range(tries) if fits[k, i]), None)
        assert size[i].tolist() == ([7, 9] if first is None else sizes[first, i].tolist())
        assert bool(found[i]) == (first is not None)
    assert 0.1 < float(found.float().mean()) < 0.9


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, (0.2, 1.0)), (20, 28, (0.6, 1.0))])
def test_boxes_drawn_on_a_device_are_distributed_as_those_of_the_cpu(monkeypatch, height, width, scale):
    n, ratio = 8000, (3 / 4, 4 / 3)
    settings = {"scale": scale, "ratio": ratio, "generator": torch.Generator().manual_seed(1)}
    on_cpu = draw_boxes(n, height, width, **settings).double()
    rand = torch.rand  # a device called cuda, but on the CPU
    monkeypatch.setattr(torch, "rand", lambda *shape, device, **kw: rand(*shape, **kw))
    on_device = draw_boxes(n, height, width, **settings, device="cuda").double()
    assert not torch.equal(on_cpu, on_device)
    for a, b in zip(on_cpu.T, on_device.T, strict=True):
        error = math.sqrt(float(a.var() + b.var()) / n) + 1e-9
        assert abs(float(a.mean() - b.mean())) < 4.5 * error
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.05, abs=1e-9)
        counts = [torch.bincount(x.long(), minlength=65) for x in (a, b)]
        assert float((counts[0] - counts[1]).abs().max()) < 5 * math.sqrt(n / 2)


# ---- as a function of seed, epoch, image and view


def boxes(index, seed=0, epoch=0, height=40, width=30, views=3, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    index = np.asarray(index)
    heights, widths = np.full(len(index), height), np.full(len(index), width)
    return crop_boxes(seed, epoch, index, heights, widths, views=views, scale=scale, ratio=ratio)


def test_crop_boxes_depend_on_seed_epoch_index_and_view_only():
    all_at_once = boxes(range(50), seed=2**40 + 1)
    assert np.array_equal(all_at_once[[7, 31, 7]], boxes([7, 31, 7], seed=2**40 + 1))
    for other in (boxes(range(50), seed=1), boxes(range(50), seed=2**40 + 1, epoch=1), boxes(range(1, 51))):
        assert (other != all_at_once).any(axis=-1).mean() > 0.9
    assert (all_at_once[:, 0] != all_at_once[:, 1]).any(axis=-1).mean() > 0.9


def test_crop_boxes_are_distributed_as_torchvisions():
    n, image = 10_000, torch.empty(3, 40, 30)
    ours = boxes(range(n)).reshape(-1, 4).astype(float)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)], dtype=float
    )
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= 40).all()
    assert (ours[:, 1] + ours[:, 3] <= 30).all()
    error = theirs.std(axis=0) * np.sqrt(1 / n + 1 / (3 * n))
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4 * error).all()
    assert np.allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.05)
    for column in range(4):
        edges = np.arange(-0.5, 41)
        a, b = (np.histogram(x[:, column], edges, density=True)[0] for x in (ours, theirs))
        assert np.abs(a - b).sum() < 0.06


def test_where_no_box_fits_crop_boxes_are_torchvisions_central_one():
    square = {"views": 1, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    assert boxes([0], height=40, width=30, **square).tolist() == [[[5, 0, 30, 30]]]
    assert boxes([0], height=30, width=41, **square).tolist() == [[[0, 5, 30, 30]]]
    expected = RandomResizedCrop.get_params(torch.empty(3, 30, 41), [1.0, 1.0], [1.0, 1.0])
    assert boxes([0], height=30, width=41, **square)[0, 0].tolist() == list(expected)


def test_central_boxes_of_whole_pixels_are_the_central_squares():
    assert central_boxes(np.array([10, 7]), np.array([6, 7]), 6).tolist() == [[[2, 0, 6, 6]], [[0, 0, 7, 7]]]


@pytest.mark.parametrize("shape", [(480, 360), (360, 480), (299, 300), (48, 36), (7, 90), (1, 60), (60, 1), (20, 20)])
@pytest.mark.parametrize("size", [1, 19, 64, 65])
def test_central_boxes_are_what_resizing_the_whole_image_and_cropping_it_shows(shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    top, left, h, w = central_boxes(np.array(shape[:1]), np.array(shape[1:]), size)[0, 0].tolist()
    box = left, top, min(left + w, image.width), min(top + h, image.height)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    expected = resize_and_crop(image, size)
    assert np.abs(np.asarray(resized).astype(int) - np.asarray(expected)).max() <= 1


# ---- the central box


EXTREME_SIZES = [
    (1, 1000),
    (1000, 1),
    (1, 1),
    (2, 3),
    (3, 2),
    (1, 2),
    (7, 60_000),
    (60_000, 7),
    (300, 400),
    (400, 300),
]


@pytest.mark.parametrize(("height", "width"), EXTREME_SIZES)
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (0.1, 0.3), (3.0, 8.0), (0.01, 100.0)])
def test_where_no_box_fits_the_central_one_is_torchvisions_and_never_empty(height, width, ratio):
    # an area above 1 fits nothing, so torchvision returns its fallback
    image = torch.empty(1, height, width, device="meta")
    top, left, h, w = RandomResizedCrop.get_params(image, [4.0, 5.0], list(ratio))
    if 0 in (h, w):  # torchvision's box is empty: one pixel is the nearest box that is not
        h, w = max(h, 1), max(w, 1)
        top, left = (height - h) // 2, (width - w) // 2
    assert central_size(height, width, ratio) == (h, w)
    drawn = draw_boxes(3, height, width, scale=(4.0, 5.0), ratio=ratio, generator=torch.Generator())
    assert drawn.tolist() == [[top, left, h, w]] * 3
    counted = boxes([0, 1], height=height, width=width, scale=(4.0, 5.0), ratio=ratio)
    assert counted.tolist() == [[[top, left, h, w]] * 3] * 2


def test_some_of_torchvisions_central_boxes_are_empty():
    image = torch.empty(1, 1, 1000, device="meta")
    assert RandomResizedCrop.get_params(image, [4.0, 5.0], [0.1, 0.3]) == (0, 500, 1, 0)


@pytest.mark.parametrize(("height", "width"), EXTREME_SIZES)
def test_boxes_of_extreme_images_are_within_them(height, width):
    settings = {"scale": (0.01, 1.0), "ratio": (0.02, 50.0)}
    drawn = draw_boxes(400, height, width, **settings, generator=torch.Generator().manual_seed(0)).numpy()
    counted = boxes(range(400), height=height, width=width, **settings).reshape(-1, 4)
    for top, left, h, w in (drawn.T, counted.T):
        assert min(h.min(), w.min()) >= 1
        assert min(top.min(), left.min()) >= 0
        assert (top + h).max() <= height
        assert (left + w).max() <= width
