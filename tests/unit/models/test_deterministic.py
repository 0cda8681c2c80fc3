"""Every encoder of the recipes trains with deterministic=true on CUDA: no operation that PyTorch refuses there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from timm.models.vgg import ConvMlp
from torch import nn

import hpc_supcon
from hpc_supcon.config import load_config
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import ConfigError
from hpc_supcon.evaluation.probes.finetune import FINETUNE
from hpc_supcon.models import build_encoder, check_deterministic
from hpc_supcon.models.determinism import raising_operations
from hpc_supcon.models.encoders import ENCODERS
from hpc_supcon.models.pooling import AveragePool2d, GlobalMaxPool2d
from hpc_supcon.models.timm_encoders import _fill_kernel

IMAGES = {"in_channels": 3, "image_size": 5}
RECIPES = Path(hpc_supcon.__file__).parent / "config" / "recipes"
# named in the comments of recipes, as alternatives
ALSO = {"resnet34", "inception_v3", "inception_resnet_v2", "vgg16_bn"}
SMALLEST = {"inception_v3": 75, "inception_resnet_v2": 75}
SIZES = [(1, 1), (2, 2), (3, 5), (7, 7), (8, 8), (14, 21), (9, 14), (10, 3), (13, 13)]


def encoders_of_recipes():
    found = (yaml.safe_load(path.read_text()).get("model", {}).get("encoder") for path in RECIPES.glob("*.yaml"))
    return sorted({name for name in found if name} | ALSO | set(ENCODERS))


@pytest.mark.parametrize("name", encoders_of_recipes())
def test_training_an_encoder_of_a_recipe_has_a_deterministic_form_of_every_operation(name):
    size = SMALLEST.get(name, 32)
    with torch.device("meta"):
        encoder = build_encoder(name, image_size=size)
    assert raising_operations(encoder, 3, size) == []


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("encoder", "operation"),
    [
        (nn.AdaptiveMaxPool2d(1), "adaptive_max_pool2d_backward"),
        (nn.AdaptiveAvgPool2d(7), "_adaptive_avg_pool2d_backward"),
        (nn.ReflectionPad2d(1), "reflection_pad2d_backward"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "upsample_bilinear2d_backward"),
        (ConvMlp(3, 4), "_adaptive_avg_pool2d_backward"),
    ],
)
def test_operations_whose_training_would_raise_are_found(encoder, operation):
    assert raising_operations(nn.Sequential(nn.Conv2d(3, 3, 1), encoder), 3, 5) == [operation]


@pytest.mark.usefixtures("deterministic")
def test_an_encoder_whose_training_would_raise_is_refused_with_the_operation():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReflectionPad2d(1))
    with pytest.raises(ConfigError, match=r"model.encoder=odd uses reflection_pad2d_backward, .* or deterministic=f"):
        check_deterministic(model, "odd", IMAGES, torch.device("cuda"))


def test_without_cuda_or_where_any_algorithm_may_be_used_no_encoder_is_refused(deterministic):
    encoder = nn.AdaptiveMaxPool2d(1)
    check_deterministic(encoder, "odd", IMAGES, torch.device("cpu"))
    torch.use_deterministic_algorithms(False)
    check_deterministic(encoder, "odd", IMAGES, torch.device("cuda"))


@pytest.mark.usefixtures("deterministic")
def test_fine_tuning_refuses_an_encoder_as_pre_training_does():
    encoder = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveMaxPool2d(1))
    task = SimpleNamespace(
        config=load_config("default", ["model.encoder=odd"]),
        runtime=Runtime(Launch(), torch.device("cuda")),
        settings=None,
        encoder=encoder,
        description={"encoder": IMAGES},
    )
    with pytest.raises(ConfigError, match=r"deterministic=true: model.encoder=odd uses adaptive_max_pool2d_backward"):
        FINETUNE.fit(task)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("ours", "theirs"), [(GlobalMaxPool2d(), nn.AdaptiveMaxPool2d(1)), (AveragePool2d(7), nn.AdaptiveAvgPool2d(7))]
)
def test_deterministic_pooling_has_the_values_and_gradients_of_pytorchs(ours, theirs, size):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randint(-3, 4, (2, 3, *size), dtype=torch.float64)  # with ties, of which the first is the largest
        results = []
        for module in (ours, theirs):
            leaf = x.clone(memory_format=layout).requires_grad_()
            y = module(leaf)
            (y * torch.arange(y.numel()).view_as(y)).sum().backward()
            results.append((y.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 9), (7, 7), (9, 8)])
def test_the_classifier_of_timms_vgg_averages_small_maps_as_timm_does(size):
    with torch.device("meta"):
        assert _fill_kernel in build_encoder("vgg11", image_size=32).pre_logits._forward_pre_hooks.values()
    classifier, x = ConvMlp(4, 5), torch.randn(2, 4, *size)
    want = classifier.eval()(x)
    classifier.register_forward_pre_hook(_fill_kernel)
    torch.testing.assert_close(classifier(x), want)
