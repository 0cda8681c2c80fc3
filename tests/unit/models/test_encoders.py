"""Every encoder by name: published sizes, a training step on real images, and image sizes that it refuses."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from hpc_supcon import config as cfg
from hpc_supcon.data import Batch, load_splits
from hpc_supcon.distributed.collectives import world_size
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import ConfigError
from hpc_supcon.models import build_encoder, build_model, synchronize_batchnorm
from hpc_supcon.training.build import build_training, describe_model
from hpc_supcon.training.step import train_step
from tests.dist.test_step import in_memory

# name -> (published parameters with the 1000-class layer, width of the features below it)
PUBLISHED = {
    "resnet18": (11_689_512, 512),
    "resnet34": (21_797_672, 512),
    "resnet50": (25_557_032, 2048),
    "resnet101": (44_549_160, 2048),
    "densenet169": (14_149_480, 1664),
    "densenet201": (20_013_928, 1920),
    "inception_v3": (23_834_568, 2048),
    "inception_resnet_v2": (55_843_464, 1536),
    "vgg16_bn": (138_365_992, 4096),
}
SMALLEST = {"inception_v3": 75, "inception_resnet_v2": 75, "vgg16_bn": 32, "vgg16_bn_embed": 32}
EVERY = [*PUBLISHED, "conv", "resnet9", "resnet9_small", "vgg16_bn_embed", "vit_tiny_patch16_224", "efficientnet_b0"]


@lru_cache
def digits():
    return load_splits("digits", validation_fraction=0.1, seed=0)


def count(module):
    return sum(p.numel() for p in module.parameters())


def shapes(module):
    return {name: value.shape for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", EVERY)
def test_every_encoder_does_a_training_step_and_an_evaluation_on_real_digits(name):
    size = SMALLEST.get(name, 16)
    config = cfg.load_config(
        "default",
        [f"model.encoder={name}", f"model.input_size={size}", "data.batch_size=4", "model.projection_hidden=16",
         "model.projection_dim=8", "optim.lr=0.01", "augment.policy=flip_crop", "train.precision=fp32",
         "train.channels_last=false"],
    )  # fmt: skip
    splits, runtime = digits(), Runtime(Launch(rank=0, world_size=1), torch.device("cpu"))
    training = build_training(config, in_memory(splits), runtime)
    model = training.state.model
    before = {k: v.clone() for k, v in model.encoder.named_parameters()}
    index = torch.arange(4)
    images = torch.stack([splits.train.read(i) for i in index])
    result = train_step(training.state, Batch(images, splits.train.labels[:4], index), training.options)
    assert result.loss.isfinite()
    assert result.gradient_norm > 0
    moved = [k for k, p in model.encoder.named_parameters() if not torch.equal(p, before[k])]
    assert len(moved) > len(before) / 2
    with torch.no_grad():
        features = model.encoder.eval()(images.float() / 255)
    assert features.shape == (4, model.encoder.feature_dim)
    assert features.isfinite().all()
    assert world_size() == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_of_parameters_are_the_published_ones_and_names_are_timms(name):
    published, width = PUBLISHED[name]
    size = 299 if "inception" in name else 224
    with torch.device("meta"):
        ours, theirs = build_encoder(name, input_size=size), timm.create_model(name, num_classes=0)
    assert ours.feature_dim == width
    assert count(ours) == published - (width * 1000 + 1000)
    assert shapes(ours) == shapes(theirs)
    assert ours.stem_kind in ("standard", "own")


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg11_bn"])
def test_with_out_dim_the_encoder_is_torchvisions_whole_network(name):
    with torch.device("meta"):
        ours, theirs = build_encoder(name, image_size=224, out_dim=1000), getattr(torchvision.models, name)()
    assert ours.feature_dim == 1000
    assert count(ours) == count(theirs)


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "resnetrs50", "inception_v3", "regnetx_002"])
def test_with_out_dim_names_and_shapes_are_those_of_timms_classifier(name):
    with torch.device("meta"):
        ours = build_encoder(name, in_channels=1, image_size=32, input_size=224, out_dim=24)
        theirs = timm.create_model(name, num_classes=24, in_chans=1)
    assert shapes(ours) == shapes(theirs)
    assert all(any(key.startswith(f"{layer}.") for key in shapes(ours)) for layer in ours.output_layers)


def test_vgg16_bn_embed_has_the_documented_number_of_parameters():
    assert count(build_encoder("vgg16_bn_embed")) == 16_328_832
    assert build_encoder("vgg16_bn_embed").feature_dim == 64
    # 25,088 x 32 weights and 32 biases fewer
    assert count(build_encoder("vgg16_bn_embed", out_dim=32)) == 16_328_832 - 25_089 * 32


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("resnet18", "layer1"),
        ("resnext50_32x4d", "layer1"),
        ("resnet50d", "layer1"),  # deep stem
        ("resnetrs50", "layer1"),  # pools by a convolution
        ("densenet121", "features.denseblock1"),
    ],
)
@pytest.mark.parametrize("stem", ["small", "standard"])
def test_the_small_stem_keeps_the_resolution_and_the_standard_one_divides_it_by_4(name, first, stem):
    sides = []
    with torch.device("meta"):
        encoder = build_encoder(name, image_size=64, stem=stem).eval()
        encoder.get_submodule(first).register_forward_pre_hook(
            lambda m, args: sides.append((args[0][0] if isinstance(args[0], list) else args[0]).shape[-1])
        )
        encoder(torch.empty(2, 3, 64, 64))
    assert (encoder.stem_kind, sides) == (stem, [64 if stem == "small" else 16])


def test_the_automatic_stem_depends_on_the_input_size_of_the_encoder():
    with torch.device("meta"):
        assert build_encoder("densenet121", image_size=32).stem_kind == "small"
        assert build_encoder("densenet121", image_size=32, input_size=128).stem_kind == "standard"
        assert build_encoder("resnet18", image_size=128, input_size=48).stem_kind == "small"


@pytest.mark.parametrize("name", ["vgg16_bn", "inception_v3", "convnext_atto", "vit_tiny_patch16_224"])
def test_an_encoder_with_only_one_stem_refuses_another(name):
    with torch.device("meta"), pytest.raises(ConfigError, match=f"{name} has only its own stem"):
        build_encoder(name, image_size=224, stem="small")


@pytest.mark.parametrize(("name", "size"), [(k, v) for k, v in SMALLEST.items() if k != "inception_resnet_v2"])
def test_the_error_for_small_images_names_the_smallest_size(name, size):
    # the training step above shows that this size works
    message = rf"{name} cannot take images of {size - 1} px, it needs {size}: set model\.input_size={size}"
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build_encoder(name, image_size=size - 1)


def test_an_input_size_too_small_is_the_same_error():
    with torch.device("meta"), pytest.raises(ConfigError, match="cannot take images of 16 px, it needs 32"):
        build_encoder("vgg16_bn", image_size=64, input_size=16)


def test_models_with_a_fixed_input_size_are_built_for_the_size_of_the_images():
    encoder = build_encoder("vit_tiny_patch16_224", image_size=32)
    assert encoder.pos_embed.shape[1] == 2 * 2 + 1
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 192)
    with torch.device("meta"), pytest.raises(ConfigError, match="224 cannot take images of 12 px, it needs 16"):
        build_encoder("vit_tiny_patch16_224", image_size=12)


def test_the_error_for_wrong_channels_has_timms_message():
    with (
        torch.device("meta"),
        pytest.warns(UserWarning, match="3-channel"),
        pytest.raises(ConfigError, match=r"csatv2 cannot take .* 1 channel.*data\.channels"),
    ):
        build_encoder("csatv2", in_channels=1, image_size=512)


@pytest.mark.parametrize("wrong", ["densenet200", "resnet18.a1_in1k", "hf-hub:a/b", "local-dir:/tmp/x", ""])
def test_unknown_names_and_addresses_are_refused(wrong):
    with pytest.raises(ConfigError, match="unknown encoder"):
        build_encoder(wrong)
    if wrong == "densenet200":
        with pytest.raises(ConfigError, match="did you mean 'densenet201' or "):
            build_encoder(wrong)


@pytest.mark.parametrize(("image_size", "input_size"), [(28, 40), (33, 32), (40, 17), (32, 32)])
def test_an_encoder_with_an_input_size_gives_the_features_of_resized_images(image_size, input_size):
    resized = build_encoder("resnet9_small", image_size=image_size, input_size=input_size).eval()
    plain = build_encoder("resnet9_small", image_size=input_size).eval()
    plain.load_state_dict(resized.state_dict())
    x = torch.rand(3, 3, image_size, image_size)
    by_torchvision = torchvision.transforms.functional.resize(x, [input_size, input_size], antialias=True)
    want = plain(by_torchvision)
    torch.testing.assert_close(resized(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(resized)(x), want, rtol=1e-4, atol=1e-5)  # as a momentum encoder


def test_resizing_works_in_bf16_and_keeps_the_memory_layout():
    encoder = build_encoder("conv", image_size=8, input_size=20)
    seen = []
    encoder.convs.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(x).dtype == torch.bfloat16
    encoder.bfloat16()(x.bfloat16())
    assert all(t.shape[-1] == 20 and t.is_contiguous(memory_format=torch.channels_last) for t in seen)


def test_an_encoder_with_an_input_size_is_rebuilt_from_the_description_in_a_checkpoint():
    config = cfg.load_config("default", ["model.encoder=resnet18", "model.input_size=80"])
    description = describe_model(config, digits())
    assert description["encoder"]["input_size"] == 80
    encoder = build_model(description).encoder
    assert encoder.stem_kind == "standard"
    del description["encoder"]["input_size"]  # a checkpoint from before there was such a setting
    assert build_model(description).encoder.stem_kind == "small"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_synchronizing_keeps_the_activation_inside_timms_batchnorm(device):
    block = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4)).eval()
    with torch.no_grad():
        block[1].running_mean.normal_()
        block[1].bias.normal_()
    x = torch.randn(2, 3, 5, 5)
    mean, var, w, b = block[1].running_mean, block[1].running_var, block[1].weight, block[1].bias
    want = F.relu(F.batch_norm(block[0](x), mean, var, w, b))
    got = synchronize_batchnorm(block, torch.device(device))  # converted for `device`, run on the CPU
    assert type(got[1]).__name__ != "BatchNormAct2d"
    torch.testing.assert_close(got(x), want)
    assert np.array_equal((got(x) == 0).numpy(), (want == 0).numpy())
