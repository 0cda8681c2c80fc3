"""Claims about augmentation policies; torchvision's per-image transforms are the reference."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.v2 import functional as TF

from hpc_supcon.data import POLICIES, Views
from hpc_supcon.data.views.color import gaussian_blur, kernel_size
from hpc_supcon.data.views.ops import OPERATIONS, operate_
from hpc_supcon.data.views.policies import AutoAugment, RandAugment, magnitude
from hpc_supcon.errors import ConfigError

RGB = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}
TABLES = {
    "cifar10": AutoAugmentPolicy.CIFAR10,
    "imagenet": AutoAugmentPolicy.IMAGENET,
    "svhn": AutoAugmentPolicy.SVHN,
}
BLENDS = [-0.9, -0.27, 0.0, 0.1, 0.27, 0.9]
MAGNITUDES = {
    # none that puts pixels half-way between two others, where rounding depends on the processor
    "ShearX": [-0.29, -0.11, 0.0, 0.0333333, 0.21],
    "ShearY": [-0.29, -0.11, 0.0, 0.09, 0.21],
    "TranslateX": [-13.05, 0.0, 4.35, 9.0],
    "TranslateY": [-13.05, 0.0, 4.35, 9.0],
    "Rotate": [-30.0, -9.0, 0.0, 6.6667, 20.0],
    "Brightness": BLENDS,
    "Color": BLENDS,
    "Contrast": BLENDS,
    "Sharpness": BLENDS,
    "Posterize": [4.0, 5.0, 6.0, 7.0, 8.0],
    "Solarize": [0.0, 0.3, float(torch.linspace(1, 0, 10)[3]), float(torch.linspace(1, 0, 31)[9]), 1.0],
}
EVERY_POLICY = [
    {"policy": "none"},
    {"policy": "flip_crop"},
    {"policy": "pad_crop", "padding": 3, "padding_mode": "reflect"},
    {"policy": "simaugment", "blur": 0.5},
    {"policy": "autoaugment", "autoaugment": "cifar10"},
    {"policy": "autoaugment", "autoaugment": "imagenet"},
    {"policy": "randaugment", "randaugment": {"operations": 3, "magnitude": 20}},
]


def random_images(n: int, channels: int = 3, height: int = 32, width: int | None = None) -> torch.Tensor:
    """Noise, and also images of few levels, of one level, gray ones and smooth ones."""
    generator = torch.Generator().manual_seed(n + channels)
    x = torch.randint(0, 256, (n, channels, height, width or height), dtype=torch.uint8, generator=generator)
    if n >= 5:
        x[0] = x[0] // 4 + 60
        x[1] = x[1, :1]
        x[2] = 77
        x[3] = (x[3] > 200) * 200
        x[4] = torch.arange(height, dtype=torch.uint8)[:, None] * 3 + torch.arange(channels)[:, None, None]
    return x


def torchvision_operation(image: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    return T.RandAugment()._apply_image_or_video_transform(
        image, name, strength, interpolation=InterpolationMode.NEAREST, fill={}
    )


def operate(images: torch.Tensor, names: list[str], strengths: list[float]) -> torch.Tensor:
    codes = torch.tensor([OPERATIONS.index(name) for name in names])
    return operate_(images.clone(), codes, torch.tensor(strengths, dtype=torch.float64))


# ---- operations


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 24, 24), (3, 24, 48)])
def test_every_operation_equals_torchvisions_exactly(name, channels, height, width):
    images = random_images(8, channels, height, width)
    for strength in MAGNITUDES.get(name, [0.0]):
        expected = torch.stack([torchvision_operation(image, name, strength) for image in images])
        ours = operate(images, [name] * 8, [strength] * 8)
        assert torch.equal(ours, expected), (strength, int((ours != expected).sum()))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("height", "width"), [(13, 17), (2, 5), (1, 1)])
def test_at_odd_sizes_operations_differ_by_at_most_one_gray_level(name, height, width):
    # torchvision rounds its sums twice in the last pixels of a row, which do not fill a vector register
    images = random_images(4, 3, height, width)
    for strength in MAGNITUDES.get(name, [0.0]):
        expected = torch.stack([torchvision_operation(image, name, strength) for image in images])
        difference = (operate(images, [name] * 4, [strength] * 4).int() - expected.int()).abs()
        assert int(difference.max()) <= 1, strength


def test_each_image_of_a_batch_gets_its_own_operation_and_magnitude():
    wanted = [(name, strength) for name in OPERATIONS for strength in MAGNITUDES.get(name, [0.0])]
    wanted = [wanted[i] for i in torch.randperm(len(wanted))]
    images = random_images(len(wanted))
    ours = operate(images, [name for name, _ in wanted], [strength for _, strength in wanted])
    for i, (name, strength) in enumerate(wanted):
        assert torch.equal(ours[i], torchvision_operation(images[i], name, strength)), (name, strength)


# ---- random choices of operations


@pytest.mark.parametrize("name", TABLES)
def test_autoaugment_policies_are_torchvision_operation(name):
    assert list(AutoAugment(name).policies) == T.AutoAugment(TABLES[name])._policies


@pytest.mark.parametrize(("transform", "levels"), [(T.AutoAugment, 10), (T.RandAugment, 31)])
def test_magnitudes_are_torchvision_operation(transform, levels):
    for name, (values, _) in transform._AUGMENTATION_SPACE.items():
        theirs = values(levels, 24, 40)
        for level in range(levels):
            expected = 0.0 if theirs is None else float(theirs[level])
            assert magnitude(name, level, levels, 24, 40) == expected, (name, level)


def recorded(monkeypatch, transform, n):
    """How often n runs of a torchvision transform had each set of (operation, magnitude)."""
    seen = []
    monkeypatch.setattr(
        transform,
        "_apply_image_or_video_transform",
        lambda image, name, strength, **_: seen.append((name, strength)) or image,
    )
    image, runs = torch.zeros(3, 32, 32, dtype=torch.uint8), []
    for _ in range(n):
        seen.clear()
        transform(image)
        runs.append(tuple(sorted((name, round(strength, 5)) for name, strength in seen if name != "Identity")))
    return Counter(runs)


@pytest.mark.parametrize("name", [*TABLES, "randaugment"])
def test_operations_are_drawn_as_often_as_torchvision_operation(monkeypatch, name):
    n = 6000
    theirs = recorded(monkeypatch, T.RandAugment() if name == "randaugment" else T.AutoAugment(TABLES[name]), n)
    policy = RandAugment() if name == "randaugment" else AutoAugment(name)
    codes, strengths = policy.draw(n, 32, 32, torch.Generator().manual_seed(1))
    ours = Counter(
        tuple(sorted((OPERATIONS[c], round(m, 5)) for c, m in zip(cs, ms, strict=True) if c))
        for cs, ms in zip(codes.tolist(), strengths.tolist(), strict=True)
    )
    assert {k for k, count in theirs.items() if count > 12} <= set(ours)
    assert {k for k, count in ours.items() if count > 12} <= set(theirs)
    for what in theirs:
        assert abs(ours[what] - theirs[what]) < 5 * math.sqrt(ours[what] + theirs[what]) + 1, what
    for what in (lambda m: m < 0, lambda m: m > 0, lambda m: m == 0):
        a, b = (sum(count for run, count in c.items() for _, m in run if what(m)) for c in (ours, theirs))
        assert abs(a - b) < 5 * math.sqrt(a + b)


@pytest.mark.parametrize("policy", EVERY_POLICY[1:])
def test_pixels_are_distributed_as_torchvisions_whole_pipeline(policy):
    image, n, size = random_images(9, height=20)[8], 1200, 16
    image = TF.gaussian_blur(image, [5, 5])
    image[0] //= 2
    crop = [T.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True), T.RandomHorizontalFlip()]
    if policy["policy"] == "pad_crop":
        crop[0] = T.RandomCrop(size, padding=3, padding_mode="reflect")
    operations = {
        "flip_crop": list,
        "pad_crop": list,
        "simaugment": lambda: [
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(3, (0.1, 2.0))], p=0.5),
        ],
        "autoaugment": lambda: [T.AutoAugment(TABLES[policy["autoaugment"]])],
        "randaugment": lambda: [T.RandAugment(num_ops=3, magnitude=20)],
    }[policy["policy"]]()
    theirs = T.Compose([*crop, *operations])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.stack([theirs(image).float() / 255 for _ in range(n)])
    ours = Views(n, size, **PLAIN, **policy)(image[None])[0]
    for name, number in {
        "mean": lambda x: x.mean((2, 3)),
        "contrast": lambda x: x.std((2, 3)),
        "brightest channel": lambda x: x.amax(1).mean((1, 2))[:, None],
        "corners": lambda x: x[:, :, 0, 0],
        "detail": lambda x: (x[..., 1:] - x[..., :-1]).abs().mean((2, 3)),
    }.items():
        a, b = number(ours), number(expected)
        error = ((a.var(0) + b.var(0)) / n).sqrt() + 1e-3
        assert float(((a.mean(0) - b.mean(0)).abs() / error).max()) < 4.5, name
        torch.testing.assert_close(a.std(0), b.std(0), rtol=0.15, atol=2e-3)
        histograms = [torch.histc(x, 10, 0, 1) / a.shape[1] for x in (a, b)]
        spread = (histograms[0] + histograms[1]).sqrt() * 5 + 3
        assert ((histograms[0] - histograms[1]).abs() < spread).all(), name


# ---- blur


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 3), (24, 40, 5), (9, 9, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_equals_torchvision_operation(height, width, size, channels):
    x = torch.rand(channels, 4, height, width)
    sigma = torch.tensor([0.1, 0.7, 1.3, 2.0])
    expected = torch.stack([TF.gaussian_blur(x[:, i], [size, size], [float(sigma[i])] * 2) for i in range(4)], dim=1)
    torch.testing.assert_close(gaussian_blur(x, sigma, size), expected, atol=1e-6, rtol=0)


def test_blur_kernels_are_odd_and_a_tenth_of_the_image():
    assert [kernel_size(size) for size in (2, 28, 32, 64, 96, 224)] == [3, 3, 3, 7, 9, 23]


def test_blur_comes_last_with_the_given_probability_and_simclrs_widths():
    views = Views(2, 32, **PLAIN, blur=0.3)
    drawn = views.draw(8000, 32, 32)
    blurred = drawn.sigma[drawn.sigma > 0]
    assert len(blurred) / 16_000 == pytest.approx(0.3, abs=0.02)
    assert float(blurred.min()) >= 0.1
    assert float(blurred.max()) <= 2.0
    assert float(blurred.mean()) == pytest.approx(1.05, abs=0.03)
    images, drawn = random_images(12), views.draw(12, 32, 32)
    ours = views.render(images, drawn).flatten(0, 1)
    sigma, sharp = drawn.sigma, views.render(images, replace(drawn, sigma=torch.zeros(24))).flatten(0, 1)
    for i in range(24):
        expected = TF.gaussian_blur(sharp[i], [3, 3], [float(sigma[i])] * 2) if sigma[i] else sharp[i]
        torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=0)


# ---- the module, for every policy


def test_none_only_resizes_and_its_views_are_equal():
    images = random_images(6, height=24)
    ours = Views(3, 32, **RGB, policy="none")(images)
    expected = TF.normalize(TF.resize(images.float() / 255, [32, 32], antialias=True), RGB["mean"], RGB["std"])
    for v in range(3):
        torch.testing.assert_close(ours[:, v], expected, atol=1e-4, rtol=0)


def test_flip_crop_equals_torchvisions_crop_and_flip_with_the_same_parameters():
    images, views = random_images(20), Views(2, 24, **RGB, policy="flip_crop")
    drawn = views.draw(20, 32, 32)
    ours = views.render(images, drawn).flatten(0, 1)
    for i in range(40):
        x = TF.resized_crop(images[i // 2].float() / 255, *drawn.boxes[i].tolist(), [24, 24], antialias=True)
        x = TF.normalize(x.flip(-1) if drawn.flip[i] else x, RGB["mean"], RGB["std"])
        torch.testing.assert_close(ours[i], x, atol=1e-4, rtol=0)


def test_operations_on_the_crop_equal_torchvision_operation():
    images, views = random_images(30), Views(2, 32, **PLAIN, policy="randaugment")
    drawn = views.draw(30, 32, 32)
    ours = views.render(images, drawn).flatten(0, 1)
    views.operations = None
    crops = (views.render(images, drawn).flatten(0, 1) * 255).round().to(torch.uint8)
    for i in range(60):
        x = crops[i]
        for code, strength in zip(drawn.operations[i], drawn.magnitudes[i], strict=True):
            x = torchvision_operation(x, OPERATIONS[code], float(strength))
        torch.testing.assert_close(ours[i], x / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("channels", [1, 3])
def test_rendering_parts_of_a_batch_gives_the_views_of_the_batch(policy, channels):
    images = random_images(23, channels)
    views = Views(2, 24, mean=[0.4] * channels, std=[0.3] * channels, **policy)
    drawn = views.draw(23, 32, 32)
    whole = views.render(images, drawn)
    assert whole.shape == (23, 2, channels, 24, 24)
    assert whole.isfinite().all()
    slices = [slice(0, 7), slice(7, 8), slice(8, 23)]
    parts = [views.render(images[part], views.select(drawn, part)) for part in slices]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_every_policy_repeats_bit_for_bit_after_reseeding(policy):
    images, views = random_images(9), Views(2, 32, **RGB, **policy, seed=7)
    views(images)
    views.reseed(3)
    expected = views(images)
    resumed = Views(2, 32, **RGB, **policy, seed=8)
    resumed.reseed(3)
    assert torch.equal(resumed(images), expected)


# not pad_crop: a loader that crops while decoding resizes its crops
@pytest.mark.parametrize("policy", [policy for policy in EVERY_POLICY if policy["policy"] != "pad_crop"])
def test_cropped_images_get_everything_but_the_crop(policy):
    images = random_images(9)
    whole = {"crop_scale": (1, 1), "crop_ratio": (1, 1)}  # a crop of everything, which changes nothing
    expected = Views(2, 32, **RGB, **policy, **whole)(images)
    ours = Views(2, 32, **RGB, **policy, **whole)(images[:, None].expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_layout_of_cropped_images_changes_no_value(policy, channels_last):
    images = random_images(18).view(9, 2, 3, 32, 32)
    packed = images.movedim(2, -1).contiguous().movedim(-1, 2)  # the layout of a resizer
    before = packed.clone()
    ours, expected = (Views(2, 32, **RGB, **policy, channels_last=channels_last)(x) for x in (packed, images))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert ours.flatten(0, 1).is_contiguous(memory_format=layout)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 200])  # of 200 px, several chunks
def test_cropped_images_are_flipped_and_normalized_as_torchvision_does(dtype, size):
    images = random_images(24, height=size).view(12, 2, 3, size, size)
    views = Views(2, size, **RGB, policy="flip_crop", channels_last=True, dtype=dtype)
    drawn = views.draw(12, size, size)
    for layout in (images, images.movedim(2, -1).contiguous().movedim(-1, 2)):
        ours = views.render(layout, drawn).flatten(0, 1)
        for i, image in enumerate(images.flatten(0, 1)):
            expected = TF.normalize((image.flip(-1) if drawn.flip[i] else image) / 255, RGB["mean"], RGB["std"])
            torch.testing.assert_close(ours[i].float(), expected, atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=0)


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_bfloat16_views_are_the_rounded_float32_views(policy):
    images = random_images(6)
    expected = Views(2, 24, **RGB, **policy)(images)
    ours = Views(2, 24, **RGB, **policy, channels_last=True, dtype=torch.bfloat16)(images)
    assert ours.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, expected.bfloat16())


def test_every_named_policy_is_tested():
    assert {policy["policy"] for policy in EVERY_POLICY} == set(POLICIES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "simaugmnt"}, "unknown augment.policy 'simaugmnt'; did you mean 'simaugment'?"),
        ({"policy": "autoaugment", "autoaugment": "cifar"}, "unknown augment.autoaugment 'cifar'.*cifar10"),
        ({"policy": "randaugment", "randaugment": {"magnitude": 31}}, "magnitude must be within 0..30, not 31"),
        ({"policy": "randaugment", "randaugment": {"operations": -1}}, "operations must be at least 0"),
        ({"blur": 1.1}, "blur is a probability and must be within 0..1, not 1.1"),
        ({"blur": 0.5, "image_size": 1}, "augment.blur needs images of at least 2 pixels"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        Views(**{"count": 2, "image_size": 32, **RGB, **values})
