"""Training a part of a model: which parameters get gradients, and BatchNorm layers that keep their statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpc_supcon.errors import ConfigError
from hpc_supcon.models import PretrainingModel, Projection, build_encoder, train_only


def model_of(encoder="resnet18", **heads):
    built = build_encoder(encoder)
    heads = heads or {"projection": Projection(built.feature_dim, 8, 4, norm="all")}
    return PretrainingModel(built, heads)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def below(model, *prefixes):
    return {n for n, _ in model.named_parameters() if any(n.startswith(f"{p}.") for p in prefixes)}


@pytest.mark.parametrize(
    ("names", "prefixes"),
    [
        (["layer4", "head"], ["encoder.layer4", "heads"]),
        (["layer4.1", "projection"], ["encoder.layer4.1", "heads.projection"]),
        (["encoder"], ["encoder"]),
        (["encoder.layer1", "heads.projection.out"], ["encoder.layer1", "heads.projection.out"]),
        (["head"], ["heads"]),
    ],
)
def test_names_stand_for_all_that_is_in_them(names, prefixes):
    model = model_of()
    train_only(model, names)
    assert trained(model) == below(model, *prefixes)


def test_names_end_at_a_dot_and_may_be_those_of_parameters():
    model = PretrainingModel(nn.Sequential(*[nn.Linear(2, 2) for _ in range(11)]), {})
    train_only(model, ["1"])
    assert trained(model) == {"encoder.1.weight", "encoder.1.bias"}
    vit = PretrainingModel(build_encoder("test_vit", image_size=32), {})
    train_only(vit, ["cls_token", "blocks.5.norm1.bias"])
    assert trained(vit) == {"encoder.cls_token", "encoder.blocks.5.norm1.bias"}


def test_head_also_means_a_layer_of_the_encoder_of_that_name():
    model = PretrainingModel(build_encoder("test_vit", image_size=32, out_dim=3), {"classifier": nn.Linear(3, 2)})
    train_only(model, ["head"])
    assert trained(model) == below(model, "encoder.head", "heads")


def test_unknown_names_and_nothing_to_train_are_named_errors():
    with pytest.raises(ConfigError) as error:
        train_only(model_of(), ["layer4", "layr3"])
    assert str(error.value) == (
        "model.train: unknown module 'layr3'; did you mean 'layer3' or 'layer4' or 'layer2'? known: conv1, bn1, "
        "layer1, layer2, layer3, layer4, projection, head, and what is in them"
    )
    with pytest.raises(ConfigError, match=r"model.train=\[maxpool, features\]: .* have no weights"):
        train_only(model_of(features=nn.Identity()), ["maxpool", "features"])


def test_frozen_batchnorm_normalizes_by_its_statistics_and_keeps_them_in_training():
    model = model_of()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    train_only(model, ["layer4", "projection"])
    copies = [model, copy.deepcopy(model)]
    for one in copies:
        one.eval()
        one.train()
        before = copy.deepcopy(one.state_dict())
        out = one(torch.randn(4, 2, 3, 32, 32))["projection"]
        changed = {n for n, value in one.state_dict().items() if not torch.equal(value, before[n])}
        statistics = {n for n in before if "running" in n or "tracked" in n}
        assert changed == {n for n in statistics if n.startswith(("encoder.layer4", "heads.projection"))}
        norms = {n: m.training for n, m in one.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        assert {n for n, training in norms.items() if not training} == set(one.frozen_norms)
        out.sum().backward()
        assert {n for n, p in one.named_parameters() if p.grad is not None} == trained(one)


def test_training_all_freezes_nothing():
    model = model_of()
    train_only(model, ["encoder", "head"])
    assert trained(model) == {n for n, _ in model.named_parameters()}
    assert model.frozen_norms == ()
