"""Encoders, stems, heads."""

from __future__ import annotations

import pytest
import timm
import torch

from hpc_supcon.errors import ConfigError
from hpc_supcon.models import LinearHeads, Projection, build_decoder, build_encoder


@pytest.mark.parametrize(
    "name", ["conv", "resnet9", "resnet9_small", "resnet18", "resnet34", "resnet50", "resnet101"]
)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 33), (2, 32), (64, 16)])
def test_every_encoder_maps_images_to_features_of_its_stated_size(name, channels, size):
    encoder = build_encoder(name, in_channels=channels, image_size=size).eval()
    with torch.no_grad():
        features = encoder(torch.randn(2, channels, size, size))
    assert features.shape == (2, encoder.feature_dim)
    assert features.isfinite().all()


@pytest.mark.parametrize("name", ["conv", "resnet9_small", "resnet18"])
def test_out_dim_sets_the_size_of_the_features(name):
    encoder = build_encoder(name, out_dim=48)
    assert encoder.feature_dim == 48
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 48)


# conv: (27*32 + 288*64 + 576*128) weights, 2*(32+64+128) BatchNorm, 2048*128 + 128 linear
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("conv", 864 + 18_432 + 73_728 + 448 + 262_272), ("resnet18", 11_176_512), ("resnet50", 23_508_032)],
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    # torchvision's 11,689,512 and 25,557,032, minus their classifiers (513,000 and 2,049,000)
    size = 32 if name == "conv" else 224
    assert sum(p.numel() for p in build_encoder(name, image_size=size).parameters()) == parameters


@pytest.mark.parametrize(("size", "stem"), [(32, "small"), (64, "small"), (65, "standard"), (224, "standard")])
def test_the_automatic_stem_depends_on_the_image_size(size, stem):
    encoder = build_encoder("resnet18", image_size=size)
    assert encoder.stem_kind == stem
    assert encoder.conv1.kernel_size == ((3, 3) if stem == "small" else (7, 7))
    assert isinstance(encoder.maxpool, torch.nn.MaxPool2d) == (stem == "standard")


def test_the_small_stem_keeps_the_resolution():
    maps = []
    encoder = build_encoder("resnet18", stem="small")
    encoder.layer1.register_forward_hook(lambda m, i, o: maps.append(o.shape[-1]))
    encoder(torch.randn(2, 3, 32, 32))
    assert maps == [32]


def test_the_standard_resnet_has_timms_state_dict():
    ours, theirs = build_encoder("resnet18", image_size=224), timm.create_model("resnet18", num_classes=0)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_errors_for_wrong_names_list_the_right_ones():
    with pytest.raises(ConfigError, match=r"'resnet81'; did you mean 'resnet18' or .*\? known: conv, .* timm"):
        build_encoder("resnet81")
    with pytest.raises(ConfigError, match="unknown stem 'big'"):
        build_encoder("resnet18", stem="big")
    with pytest.raises(ConfigError, match="only its own stem"):
        build_encoder("conv", stem="small")
    with pytest.raises(ConfigError, match=r"needs 16: set model\.input_size=16"):
        build_encoder("resnet9", image_size=8)


def test_the_projection_returns_unit_rows_in_fp32_under_autocast():
    projection = Projection(32, 64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = projection(torch.randn(5, 32))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5), rtol=1e-6, atol=1e-6)
    assert projection.double()(torch.randn(5, 32).double()).dtype == torch.float64


def test_linear_heads_are_independent_linear_layers():
    heads = LinearHeads(3, 4, 5)
    with torch.no_grad():
        for p in heads.parameters():
            p.normal_()
    x = torch.randn(7, 4)
    logits = heads(x)
    for k in range(3):
        torch.testing.assert_close(logits[k], x @ heads.weights[k] + heads.biases[k])
    logits[1].sum().backward()
    assert all(p.grad is None or p.grad.eq(0).all() for p in heads.head_parameters(0) + heads.head_parameters(2))


def test_no_pixel_of_an_autoencoder_stays_white_on_a_black_background():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        build_encoder("conv", in_channels=1, image_size=28), build_decoder("conv", 128, 1, 28)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = -torch.ones(32, 1, 28, 28)
    images[:, :, 10:18, 10:18] = torch.rand(32, 1, 8, 8) * 2 - 1
    for _ in range(50):
        output = model(images)
        optimizer.zero_grad()
        (output - images).square().mean().backward()
        optimizer.step()
    assert output[:, :, :8].max() < 0.0


@pytest.mark.parametrize("channels", [1, 3, 5, 32, 64])
def test_a_decoder_ends_in_tanh_for_any_number_of_channels(channels):
    decoder = build_decoder("conv", 16, channels, 9)
    images = decoder(torch.randn(4, 16) * 50)
    assert images.shape == (4, channels, 9, 9)
    assert images.abs().max() <= 1
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in decoder.modules()) == 2
