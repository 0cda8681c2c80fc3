"""Claims about augmented views; torchvision's per-image transforms are the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

from hpc_supcon.data import EvalTransform, Views
from hpc_supcon.data.crop_boxes import draw_boxes
from hpc_supcon.data.views.color import BRIGHTNESS, CONTRAST, SATURATION, adjust_hue, blend, grayscale
from hpc_supcon.data.views.ops import operate_
from hpc_supcon.data.views.pixels import resample
from hpc_supcon.errors import ConfigError
from hpc_supcon.seeding import stream

NO_COLOR = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0}
RGB = {"mean": [0.0] * 3, "std": [1.0] * 3}


def random_images(n: int, channels: int = 3, height: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + channels)
    return torch.randint(0, 256, (n, channels, height, width or height), dtype=torch.uint8, generator=generator)


def planes(n: int, size: int = 13) -> torch.Tensor:
    """[C, N, H, W] in 0..1, some pixels gray, some with two equal channels."""
    x = torch.rand(3, n, size, size, generator=torch.Generator().manual_seed(n))
    x[:, :, 0] = x[:1, :, 0]
    x[1, :, 1] = x[0, :, 1]
    x[2, :, 2] = x[0, :, 2]
    x[2, :, 3] = x[1, :, 3]
    x[:, :, 4, 0], x[:, :, 4, 1] = 0, 1
    return x


# ---- crop, resize and flip


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (28, 28, 28), (37, 37, 16), (17, 29, 24), (9, 9, 31)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_resampling_equals_torchvision_resized_crop(height, width, size, channels):
    images = random_images(6, channels, height, width)
    boxes = draw_boxes(
        18, height, width, scale=(0.05, 1.0), ratio=(0.5, 2.0), generator=torch.Generator().manual_seed(0)
    ).view(6, 3, 4)
    boxes[0, 0] = torch.tensor([0, 0, height, width])
    boxes[0, 1] = torch.tensor([height - 1, width - 1, 1, 1])
    flip = torch.arange(18).view(6, 3) % 2 == 0
    views = resample(images, boxes, flip, size)
    for b in range(6):
        for v in range(3):
            expected = TF.resized_crop(images[b].float() / 255, *boxes[b, v].tolist(), [size, size], antialias=True)
            expected = expected.flip(-1) if flip[b, v] else expected
            torch.testing.assert_close(views[:, b, v], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mode", "torchvisions"), [("zeros", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (28, 21, 19), (9, 9, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_padded_crops_equal_those_of_torchvisions_padded_image(mode, torchvisions, height, width, size, channels):
    images = random_images(5, channels, height, width)
    normalization = {"mean": [0.0] * channels, "std": [1.0] * channels}
    views = Views(7, size, **normalization, policy="pad_crop", padding=6, padding_mode=mode)
    drawn = views.draw(5, height, width)
    got = views.render(images, drawn)
    for i, (top, left, h, w) in enumerate(drawn.boxes.tolist()):
        padded = TF.pad(images[i // 7], [6], padding_mode=torchvisions)
        expected = TF.crop(padded, top + 6, left + 6, h, w)
        expected = expected.flip(-1) if drawn.flip[i] else expected
        assert torch.equal((got[i // 7, i % 7] * 255).round().to(torch.uint8), expected)


def test_padded_crops_are_uniform_over_all_places_as_torchvisions_random_crop():
    views = Views(2, 32, **RGB, policy="pad_crop", padding=4)
    boxes = views.draw(20_000, 32, 32).boxes
    assert boxes[:, 2:].unique().tolist() == [32]
    for corner in (boxes[:, 0], boxes[:, 1]):
        values, counts = corner.unique(return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert counts / len(boxes) == pytest.approx([1 / 9] * 9, abs=0.008)
    together = torch.stack((boxes[:, 0], boxes[:, 1])).double().corrcoef()
    assert abs(float(together[0, 1])) < 0.03


def test_operations_follow_a_padded_crop():
    images, settings = random_images(16), {"policy": "autoaugment", "crop": "padded"}
    views = Views(2, 32, **RGB, **settings)
    drawn = views.draw(16, 32, 32)
    assert set(drawn.boxes[:, 0].tolist()) > {-4, 4}
    cropped = Views(2, 32, **RGB, policy="pad_crop").render(images, drawn).flatten(0, 1).mul(255).round()
    for step in range(2):
        cropped = operate_(cropped.to(torch.uint8), drawn.operations[:, step], drawn.magnitudes[:, step])
    assert torch.equal(views.render(images, drawn).flatten(0, 1).mul(255).round(), cropped.float())


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"padding": 2}, 40, "images of 32x32 pixels with augment.padding=2 have no square of 40 pixels"),
        ({"padding": 32, "padding_mode": "reflect"}, 32, "augment.padding=32 mirrors more than images of 32x32"),
    ],
)
def test_padding_that_does_not_fit_is_refused(settings, size, message):
    with pytest.raises(ConfigError, match=message):
        Views(2, size, **RGB, policy="pad_crop", **settings)(random_images(2))


def test_the_rate_of_flips_is_the_probability():
    views = Views(2, 32, **RGB, flip=0.3)
    assert float(views.draw(5000, 32, 32).flip.float().mean()) == pytest.approx(0.3, abs=0.02)


# ---- color


@pytest.mark.parametrize(
    ("operation", "reference", "channels"),
    [
        (BRIGHTNESS, TF.adjust_brightness, 1),
        (BRIGHTNESS, TF.adjust_brightness, 3),
        (CONTRAST, TF.adjust_contrast, 1),
        (CONTRAST, TF.adjust_contrast, 3),
        (SATURATION, TF.adjust_saturation, 3),
    ],
)
def test_blends_equal_torchvisions(operation, reference, channels):
    x = planes(5)[:channels]
    factors = torch.tensor([0.0, 0.4, 1.0, 1.3, 3.0])
    expected = torch.stack([reference(x[:, i], float(f)) for i, f in enumerate(factors)], dim=1)
    ours = blend(x.clone(), torch.full((5,), operation), factors)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_one_blend_applies_different_operations_to_different_images():
    x, factors = planes(3), torch.tensor([0.7, 0.5, 1.4])
    together = blend(x.clone(), torch.tensor([SATURATION, BRIGHTNESS, CONTRAST]), factors)
    for i, reference in enumerate((TF.adjust_saturation, TF.adjust_brightness, TF.adjust_contrast)):
        torch.testing.assert_close(together[:, i], reference(x[:, i], float(factors[i])), atol=1e-5, rtol=0)


def test_hue_equals_torchvisions():
    factors = torch.tensor([-0.5, -0.31, -0.1, 0.0, 0.05, 0.2, 0.4, 0.5])
    x = planes(8, size=40)
    expected = torch.stack([TF.adjust_hue(x[:, i], float(f)) for i, f in enumerate(factors)], dim=1)
    torch.testing.assert_close(adjust_hue(x.clone(), factors), expected, atol=1e-5, rtol=0)


def test_gray_equals_torchvisions():
    x = planes(4)
    torch.testing.assert_close(grayscale(x)[0], TF.rgb_to_grayscale(x.transpose(0, 1))[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "strengths",
    [
        {},
        {"hue": 0.0},
        {"saturation": 0.0, "contrast": 0.0},
        {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0},
        NO_COLOR,
    ],
)
def test_views_equal_torchvisions_with_the_same_parameters(strengths):
    images, views = random_images(40), Views(2, 24, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], **strengths)
    drawn = views.draw(40, 32, 32)
    ours = views.render(images, drawn).flatten(0, 1)
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for i in range(80):
        x = TF.resized_crop(images[i // 2].float() / 255, *drawn.boxes[i].tolist(), [24, 24], antialias=True)
        x = x.flip(-1) if drawn.flip[i] else x
        for k in views.jitter.permutations[drawn.permutation[i]] if drawn.permutation[i] >= 0 else ():
            x = operations[k](x, float(drawn.factors[i, k]))
        x = TF.rgb_to_grayscale(x, 3) if drawn.grayscale[i] and views.grayscale else x
        x = TF.normalize(x, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
        torch.testing.assert_close(ours[i], x, atol=1e-4, rtol=0)


def test_parameters_have_the_ranges_and_rates_of_color_jitter():
    drawn = Views(2, 32, **RGB, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1).draw(10_000, 32, 32)
    for column, (low, high) in enumerate(((0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1))):
        factor = drawn.factors[:, column]
        assert float(factor.min()) >= low - 1e-6
        assert float(factor.max()) <= high + 1e-6
        assert float(factor.mean()) == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert float(factor.std()) == pytest.approx((high - low) / math.sqrt(12), rel=0.03)
    assert float((drawn.permutation >= 0).float().mean()) == pytest.approx(0.8, abs=0.015)
    assert float(drawn.grayscale.float().mean()) == pytest.approx(0.2, abs=0.015)
    counts = torch.bincount(drawn.permutation[drawn.permutation >= 0], minlength=24)
    assert len(counts) == 24  # every order of four operations, about 667 times each
    assert float((counts - counts.float().mean()).abs().max()) < 5 * math.sqrt(667)


def test_pixels_are_distributed_as_torchvisions_whole_pipeline():
    image, n, size = random_images(1, height=16)[0], 700, 16
    image[0] //= 2  # not gray on average, so that hue and grayscale change the means
    strength = {"brightness": 0.6, "contrast": 0.5, "saturation": 0.8, "hue": 0.3}
    theirs = T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(**strength)], p=0.8),
            T.RandomGrayscale(0.2),
        ]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.stack([theirs(image.float() / 255) for _ in range(n)])
    ours = Views(n, size, **RGB, **strength)(image[None])[0]
    for number in (
        lambda x: x.mean((2, 3)),
        lambda x: x.std((2, 3)),
        lambda x: x.amax(1).mean((1, 2), keepdim=True)[..., 0],
    ):
        a, b = number(ours), number(expected)
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        assert float(((a.mean(0) - b.mean(0)).abs() / error).max()) < 4.5
        torch.testing.assert_close(a.std(0), b.std(0), rtol=0.1, atol=0)


# ---- the module


def test_every_image_and_view_gets_parameters_of_its_own():
    image = random_images(1).expand(8, -1, -1, -1)
    views = Views(3, 32, **RGB)(image).flatten(0, 1)
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + torch.eye(24) * 1e9
    assert float(distances.min()) > 0.1


def test_views_repeat_bit_for_bit_after_reseeding_and_no_earlier():
    images, views = random_images(16), Views(2, 32, **RGB, seed=7)
    first, second = views(images), views(images)
    assert not torch.equal(first, second)
    views.reseed(7)
    assert torch.equal(views(images), first)
    assert torch.equal(views(images), second)


def test_views_neither_use_nor_disturb_the_global_generator():
    images = random_images(4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = Views(2, 32, **RGB)(images)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert torch.equal(Views(2, 32, **RGB)(images), first)


def test_every_seed_rank_and_step_has_its_own_views():
    seeds = [stream(seed, "views", rank, step) for seed in (0, 1) for rank in (0, 1) for step in (0, 1)]
    boxes = [Views(2, 32, **RGB, seed=seed).draw(50, 32, 32).boxes for seed in seeds]
    assert all(not torch.equal(boxes[i], boxes[j]) for i in range(8) for j in range(i))


def test_one_channel_images_get_brightness_and_contrast_only():
    views = Views(2, 28, mean=[0.1], std=[0.3])
    assert {k for permutation in views.jitter.permutations for k in permutation} == {BRIGHTNESS, CONTRAST}
    out = views(random_images(5, 1, 28))
    assert out.shape == (5, 2, 1, 28, 28)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_with_everything_off_views_are_only_normalized():
    images = random_images(5)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    views = Views(1, 32, mean=mean, std=std, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, **NO_COLOR)
    expected = TF.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(views(images)[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(EvalTransform(mean, std)(images), expected, atol=1e-5, rtol=0)


def test_views_ignore_autocast_and_need_no_gradient():
    images = random_images(4)
    expected = Views(2, 32, **RGB)(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = Views(2, 32, **RGB)(images)
    assert torch.equal(ours, expected)
    assert not ours.requires_grad


def test_channels_last_changes_the_layout_and_no_value():
    images = random_images(6)
    plain, last = Views(2, 32, **RGB)(images), Views(2, 32, **RGB, channels_last=True)(images)
    assert torch.equal(plain, last)
    assert plain.flatten(0, 1).is_contiguous()
    assert last.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_views_have_nothing_to_save_in_a_checkpoint():
    assert Views(2, 32, **RGB).state_dict() == {}
    assert EvalTransform(**RGB).state_dict() == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "views >= 1"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.2)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"flip": 1.5}, r"flip is a probability and must be within 0\.\.1, not 1\.5"),
        ({"hue": 0.6}, "hue must be at least 0 and at most 0.5"),
        ({"brightness": -1.0}, "brightness must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Views(**{"count": 2, "image_size": 32, **RGB, **values})
