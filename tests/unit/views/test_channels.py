"""Views of images of other than 1 or 3 channels and of 16 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from hpc_supcon.data import EvalTransform, Views
from hpc_supcon.errors import ConfigError, DataError

FORMS = [(1, 16), (2, 8), (3, 16), (5, 8), (5, 16), (64, 16)]


def images_of(channels, bits, n=6, side=20, seed=0):
    dtype = np.uint8 if bits == 8 else np.uint16
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, np.iinfo(dtype).max, (n, channels, side, side), dtype, endpoint=True))


def build(channels, bits, **options):
    rng = np.random.default_rng(1)
    mean, std = rng.uniform(0.2, 0.6, channels).tolist(), rng.uniform(0.1, 0.3, channels).tolist()
    return Views(2, options.pop("image_size", 16), mean=mean, std=std, bits=bits, **options)


def normalized(views, x):
    """float64 [C, S, S] in 0..1"""
    return (x - views.mean.double().view(-1, 1, 1)) / views.std.double().view(-1, 1, 1)


@pytest.mark.parametrize(("channels", "bits"), FORMS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_flip_crop_is_that_of_torchvision_image_by_image(channels, bits, channels_last):
    images, views = images_of(channels, bits), build(channels, bits, policy="flip_crop", channels_last=channels_last)
    drawn = views.draw(len(images), 20, 20)
    found = views.render(images, drawn)
    assert found.shape == (6, 2, channels, 16, 16)
    for k, view in enumerate(found.flatten(0, 1)):
        x = images[k // 2].double() / (2**bits - 1)
        x = tv.resized_crop(x, *drawn.boxes[k].tolist(), [16, 16], antialias=True)
        x = tv.horizontal_flip(x) if drawn.flip[k] else x
        torch.testing.assert_close(view.double(), normalized(views, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("channels", "bits"), FORMS)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_pad_crop_is_a_window_of_the_padded_image(channels, bits, mode):
    images, views = images_of(channels, bits), build(channels, bits, policy="pad_crop", padding_mode=mode)
    drawn = views.draw(len(images), 20, 20)
    found = views.render(images, drawn)
    for k, view in enumerate(found.flatten(0, 1)):
        padding = [(0, 0), (4, 4), (4, 4)]
        numbers = images[k // 2].numpy()
        padded = np.pad(numbers, padding, "constant") if mode == "zeros" else np.pad(numbers, padding, "reflect")
        top, left = (drawn.boxes[k, :2] + 4).tolist()
        window = padded[:, top : top + 16, left : left + 16]
        window = window[:, :, ::-1] if drawn.flip[k] else window
        expected = normalized(views, torch.from_numpy(window.astype(np.float64)) / (2**bits - 1))
        torch.testing.assert_close(view.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("policy", ["none", "flip_crop", "pad_crop", "simaugment"])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_of_16_bits_are_those_of_the_same_image_in_8(policy, channels):
    coarse = images_of(channels, 8)
    fine = (coarse.int() * 257).to(torch.uint16)  # the same shares of full scale
    found = [
        build(channels, bits, policy=policy, blur=0.5, seed=3)(images) for bits, images in ((8, coarse), (16, fine))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 16])
def test_crops_that_a_loader_took_are_flipped_and_normalized(bits):
    images = torch.stack([images_of(5, bits, side=16), images_of(5, bits, side=16, seed=1)], dim=1)
    views = build(5, bits, policy="flip_crop")
    drawn = views.draw(len(images), 16, 16)
    for k, view in enumerate(views.render(images, drawn).flatten(0, 1)):
        x = images.flatten(0, 1)[k].double() / (2**bits - 1)
        expected = normalized(views, x.flip(2) if drawn.flip[k] else x)
        torch.testing.assert_close(view.double(), expected, rtol=0, atol=2e-5)


def test_simaugment_of_five_channels_is_crop_flip_and_blur_and_says_so():
    images = images_of(5, 16)
    sharp, blurred = (build(5, 16, policy="simaugment", blur=blur, seed=2) for blur in (0.0, 1.0))
    assert sharp.left_out == "augment.policy=simaugment: no color jitter and no gray views, for images of 5 channels"
    assert not sharp.jitters
    flip_crop = build(5, 16, policy="flip_crop", seed=2)
    torch.testing.assert_close(sharp(images), flip_crop(images), rtol=0, atol=0)
    drawn = blurred.draw(6, 20, 20)
    without = replace(drawn, sigma=torch.zeros_like(drawn.sigma))
    assert (blurred.render(images, drawn) - blurred.render(images, without)).abs().max() > 0.1
    for channels in (1, 3):
        assert build(channels, 16, policy="simaugment").left_out == ""


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
@pytest.mark.parametrize(("channels", "bits"), [(2, 8), (5, 8), (1, 16), (3, 16)])
def test_policies_of_gray_levels_refuse_other_images_by_name(policy, channels, bits):
    with pytest.raises(ConfigError, match=f"augment.policy={policy} changes 8-bit .* {channels} of {bits} bits"):
        build(channels, bits, policy=policy)


@pytest.mark.parametrize(("channels", "bits"), FORMS)
def test_no_kernel_is_taken_for_images_that_it_is_not_written_for(channels, bits):
    class OnCuda:
        is_cuda, ndim, shape = True, 4, (6, channels, 20, 20)

    assert not build(channels, bits, policy="flip_crop")._takes_kernel(OnCuda())


def test_images_of_another_depth_than_the_statistics_are_refused():
    for module in (build(5, 16, policy="flip_crop"), EvalTransform([0.0] * 5, [1.0] * 5, bits=16)):
        with pytest.raises(DataError, match="images of 8 bits per channel, but the model is for 16"):
            module(images_of(5, 8))


@pytest.mark.parametrize(("channels", "bits"), FORMS)
def test_evaluation_normalizes_by_full_scale(channels, bits):
    images, views = images_of(channels, bits), build(channels, bits)
    found = EvalTransform(views.mean, views.std, bits=bits)(images)
    torch.testing.assert_close(found.double(), normalized(views, images.double() / (2**bits - 1)), rtol=0, atol=2e-5)
