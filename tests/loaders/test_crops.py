"""Claims about the random numbers and boxes that all loaders share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from hpc_supcon.data.loaders.base import CropOptions, LoaderOptions
from hpc_supcon.data.loaders.crops import central_boxes, crop_boxes, philox, replacement
from hpc_supcon.errors import ConfigError

CROP = CropOptions(views=3, image_size=8, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123, the authors' own implementation
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox(np.array(counter, dtype=np.uint64)[:, None], key)[:, 0]
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def boxes(index, seed=0, epoch=0, height=40, width=30, crop=CROP):
    index = np.asarray(index)
    return crop_boxes(seed, epoch, index, np.full(len(index), height), np.full(len(index), width), crop)


def test_a_box_depends_on_seed_epoch_index_and_view_alone():
    all_at_once = boxes(range(50), seed=2**40 + 1)
    assert np.array_equal(all_at_once[[7, 31, 7]], boxes([7, 31, 7], seed=2**40 + 1))
    for other in (boxes(range(50), seed=1), boxes(range(50), seed=2**40 + 1, epoch=1), boxes(range(1, 51))):
        assert (other != all_at_once).any(axis=-1).mean() > 0.9
    assert (all_at_once[:, 0] != all_at_once[:, 1]).any(axis=-1).mean() > 0.9


def test_boxes_are_distributed_as_torchvisions():
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


def test_where_no_box_fits_the_center_is_taken_as_torchvision_does():
    crop = CropOptions(views=1, image_size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert boxes([0], height=40, width=30, crop=crop).tolist() == [[[5, 0, 30, 30]]]
    assert boxes([0], height=30, width=41, crop=crop).tolist() == [[[0, 5, 30, 30]]]
    expected = RandomResizedCrop.get_params(torch.empty(3, 30, 41), [1.0, 1.0], [1.0, 1.0])
    assert boxes([0], height=30, width=41, crop=crop)[0, 0].tolist() == list(expected)


def test_central_boxes_are_squares():
    assert central_boxes(np.array([10, 7]), np.array([6, 7])).tolist() == [[[2, 0, 6, 6]], [[0, 0, 7, 7]]]


def test_replacements_are_spread_over_the_set_and_change_with_the_epoch():
    chosen = [replacement(0, 0, i, 0, 50) for i in range(2000)]
    assert np.bincount(chosen, minlength=50).min() > 15
    assert chosen != [replacement(0, 1, i, 0, 50) for i in range(2000)]
    assert chosen != [replacement(0, 0, i, 1, 50) for i in range(2000)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropOptions(views=0, image_size=8), "views >= 1"),
        (lambda: CropOptions(views=1, image_size=8, scale=(0.5, 0.2)), "crop scale"),
        (lambda: CropOptions(views=1, image_size=8, ratio=(0.0, 2.0)), "crop ratio"),
        (lambda: LoaderOptions(workers=0), r"data\.workers"),
        (lambda: LoaderOptions(timeout_s=float("nan")), r"data\.timeout_s"),
        (lambda: LoaderOptions(on_corrupt="ignore"), r"data\.on_corrupt"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
