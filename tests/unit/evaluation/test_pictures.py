"""Images of many channels and of 16 bits as what can be looked at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpc_supcon.evaluation.pictures import pictures_of


@pytest.mark.parametrize("channels", [1, 3])
def test_8_bit_gray_and_rgb_are_shown_as_they_are(channels):
    images = torch.randint(0, 256, (4, channels, 6, 5)).to(torch.uint8)
    assert pictures_of(images) is images


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_others_are_stretched_between_the_percentiles_of_each_channel(channels, shown):
    images = np.random.default_rng(0).integers(100, 4096, (7, channels, 9, 8), dtype=np.uint16)
    images[:, 0] //= 8  # channels of unlike range
    found = pictures_of(torch.from_numpy(images))
    assert found.shape == (7, shown, 9, 8)
    assert found.dtype == torch.uint8
    for c in range(shown):
        low, high = np.percentile(images[:, c].astype(np.float64), (2, 98))
        expected = np.clip((images[:, c] - low) / (high - low), 0, 1) * 255
        assert np.abs(found[:, c].numpy() - expected).max() <= 0.51


@pytest.mark.parametrize("level", [0, 1234, 65535])
def test_a_channel_of_one_level_is_no_division_by_zero(level):
    images = torch.full((2, 4, 3, 3), level, dtype=torch.int32).to(torch.uint16)
    assert pictures_of(images).eq(0).all()
