"""Views of two sizes, and settings of single views: what each gets, and that pieces and resumes change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from hpc_supcon.config import load_config
from hpc_supcon.data import MultiCrop, Views
from hpc_supcon.data.views.color import solarize
from hpc_supcon.errors import ConfigError
from hpc_supcon.models import PretrainingModel, Projection, build_encoder, check_sizes
from hpc_supcon.training.build import build_views

RGB = {"mean": [0.0] * 3, "std": [1.0] * 3}
UNCHANGED = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "flip": 0.0}


def random_images(n, height=32, width=None, channels=3):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, height, width or height), dtype=torch.uint8, generator=generator)


def multi_crop(**settings):
    large = Views(2, 32, **RGB, crop_scale=(0.4, 1.0), **settings)
    return MultiCrop(large, Views(3, 14, **RGB, crop_scale=(0.05, 0.4), **settings))


def test_both_sizes_have_their_shapes_and_scales():
    views = multi_crop()
    large, small = views(random_images(300, 40))
    assert (large.shape, small.shape) == ((300, 2, 3, 32, 32), (300, 3, 3, 14, 14))
    for drawn, low, high in zip(views.draw(2000, 40, 40), (0.4, 0.05), (1.0, 0.4), strict=True):
        share = drawn.boxes[:, 2:].prod(1) / 1600
        assert low - 0.03 < float(share.min()) < low + 0.06
        assert high - 0.06 < float(share.max()) < high + 0.03


def test_global_views_are_those_of_views_alone_and_local_ones_have_streams_of_their_own():
    images, views = random_images(20), multi_crop()
    views.reseed(7)
    large, _ = views(images)
    assert torch.equal(large, Views(2, 32, **RGB, crop_scale=(0.4, 1.0), seed=7)(images))
    same = MultiCrop(Views(2, 32, **RGB), Views(2, 32, **RGB))
    same.reseed(7)
    first, second = same.draw(50, 32, 32)
    assert not (first.boxes == second.boxes).all(1).any()
    assert not torch.equal(first.flip, second.flip)


@pytest.mark.parametrize("settings", [{}, {"blur": 0.5}, {"policy": "randaugment"}, {"policy": "flip_crop"}])
def test_local_views_equal_torchvision_crops_in_pieces_as_well(settings):
    images, views = random_images(21, 30, 26), multi_crop(**settings)
    views.reseed(3)
    drawn = views.draw(21, 30, 26)
    whole = views.render(images, drawn)
    for start, stop in ((0, 5), (5, 20), (20, 21)):
        piece = slice(start, stop)
        for part, of_all in zip(views.render(images[piece], views.select(drawn, piece)), whole, strict=True):
            torch.testing.assert_close(part, of_all[piece], atol=1e-6, rtol=0)
    if settings == {"policy": "flip_crop"}:
        for b in range(21):
            for v in range(3):
                box, flip = drawn[1].boxes[3 * b + v].tolist(), drawn[1].flip[3 * b + v]
                crop = TF.resized_crop(images[b].float() / 255, *box, [14, 14], antialias=True)
                torch.testing.assert_close(whole[1][b, v], crop.flip(-1) if flip else crop, atol=1e-5, rtol=0)


def test_a_reseeded_module_repeats_its_views():
    images, views = random_images(9), multi_crop()
    views.reseed(5)
    first, second = views(images), views(images)
    views.reseed(5)
    again = views(images)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_local_views_that_are_larger_than_global_ones_are_refused():
    with pytest.raises(ConfigError, match=r"augment\.local\.image_size=40: local views are larger than .* 32 pixels"):
        MultiCrop(Views(2, 32, **RGB), Views(2, 40, **RGB))
    MultiCrop(Views(2, 32, **RGB), Views(2, 32, **RGB))


def test_the_configuration_says_what_each_size_is():
    description = {"encoder": {"image_size": 32}, "normalization": RGB}
    overrides = [
        "loss.name=swav", "data.views={global: 2, local: 4}", "augment.blur=[1.0, 0.1]",
        "augment.solarize=[0.0, 0.2]",
        "augment.local={image_size: 18, crop_scale: [0.1, 0.3], blur: 0.5, solarize: 0.25}", "augment.crop=padded",
    ]  # fmt: skip
    config = load_config("default", overrides, stages=("pretrain",))
    views = build_views(config, description, seed=1)
    large, small = views.parts
    assert (large.count, large.image_size, small.count, small.image_size) == (2, 32, 4, 18)
    assert (large.crops.padding, small.crops.padding, small.crops.scale) == (4, None, (0.1, 0.3))
    assert (large.blur.tolist(), small.blur.tolist()) == (pytest.approx([1.0, 0.1]), [0.5] * 4)
    assert (large.solarize.tolist(), small.solarize.tolist()) == (pytest.approx([0.0, 0.2]), [0.25] * 4)
    assert large.jitter.probability == small.jitter.probability == 0.8
    one = config.augment.of_one_view()  # of a probe that trains on augmented images
    assert (one.blur, one.solarize, one.crop_scale) == (1.0, 0.0, config.augment.crop_scale)
    none = load_config("default", [*overrides, "data.views.local=0"], stages=("pretrain",))
    assert isinstance(build_views(none, description), Views)


# ---- settings of single views


def test_each_view_has_its_own_probabilities_of_blur_and_solarization():
    views = Views(3, 16, **RGB, blur=[1.0, 0.1, 0.0], solarize=[0.0, 0.2, 1.0])
    drawn = views.draw(4000, 16, 16)
    assert (drawn.sigma.view(-1, 3) > 0).double().mean(0).tolist() == pytest.approx([1.0, 0.1, 0.0], abs=0.02)
    assert drawn.solarize.view(-1, 3).double().mean(0).tolist() == pytest.approx([0.0, 0.2, 1.0], abs=0.02)
    with pytest.raises(ConfigError, match=r"augment\.blur has 2 probabilities for 3 views"):
        Views(3, 16, **RGB, blur=[1.0, 0.1])
    with pytest.raises(ConfigError, match=r"solarize is a probability .* not 1\.5"):
        Views(3, 16, **RGB, solarize=1.5)


def test_one_probability_for_all_views_draws_what_it_drew_for_each():
    images = random_images(11)
    assert torch.equal(Views(2, 32, **RGB, blur=0.4)(images), Views(2, 32, **RGB, blur=[0.4, 0.4])(images))
    # whether views are solarized is drawn last: nothing else changes
    without, none = Views(2, 32, **RGB, blur=0.4), Views(2, 32, **RGB, blur=0.4, solarize=1e-12)
    assert torch.equal(without(images), none(images))


def test_solarization_is_that_of_torchvision_after_the_blur():
    images = random_images(40)
    torch.testing.assert_close(solarize(images / 255), TF.solarize(images / 255, 0.5), rtol=0, atol=0)
    settings = {**RGB, **UNCHANGED, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "jitter_probability": 0.0}
    plain = Views(2, 32, **settings, blur=0.5, seed=4)(images)
    views = Views(2, 32, **settings, blur=0.5, solarize=[0.0, 1.0], seed=4)
    got = views(images)
    torch.testing.assert_close(got[:, 0], plain[:, 0])
    torch.testing.assert_close(got[:, 1], TF.solarize(plain[:, 1], 0.5))
    gray = Views(1, 32, mean=[0.0], std=[1.0], policy="simaugment", solarize=1.0)
    assert float(gray(random_images(5, channels=1)).max()) <= 0.5


def test_other_policies_are_not_solarized():
    assert not Views(2, 16, **RGB, policy="flip_crop", solarize=1.0).draw(50, 16, 16).solarize.any()


# ---- the model


def test_the_heads_get_all_views_and_the_encoder_one_size_at_a_time():
    torch.manual_seed(0)
    encoder = build_encoder("resnet9_small", image_size=32)
    model = PretrainingModel(encoder, {"projection": Projection(encoder.feature_dim, 16, 8, norm="hidden")})
    seen = []
    encoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    large, small = torch.randn(3, 2, 3, 32, 32), torch.randn(3, 4, 3, 16, 16)
    found = model((large, small))["projection"]
    assert seen == [(6, 3, 32, 32), (12, 3, 16, 16)]
    encoder.eval()  # its statistics are those of each size; the head's are of all views together
    model.eval()
    found = model((large, small))["projection"]
    want = torch.cat([model(large)["projection"], model(small)["projection"]], dim=1)
    torch.testing.assert_close(found, want)
    assert math.prod(found.shape) == 3 * 6 * 8


@pytest.mark.parametrize("name", ["resnet9_small", "resnet18", "vit_tiny_patch16_224", "vgg16_bn_embed", "conv"])
def test_an_encoder_that_takes_one_size_is_refused(name):
    size = 224 if name.startswith("vit") else 32
    encoder = build_encoder(name, image_size=size)
    if name.startswith("resnet"):
        check_sizes(encoder, name, 3, [size, 16])
        assert encoder.training
        return
    check_sizes(encoder, name, 3, [size])
    with pytest.raises(ConfigError, match=rf"model\.encoder={name} cannot take local views of 16 px beside"):
        check_sizes(encoder, name, 3, [size, 16])
