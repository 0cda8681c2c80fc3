"""Activation checkpointing: the same outputs, gradients, statistics and random draws with less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpc_supcon.errors import ConfigError
from hpc_supcon.models import apply_activation_checkpointing, build_encoder, frozen_running_statistics
from hpc_supcon.training.memory import _LiveBytes

ENCODERS = {
    "conv": (16, 2),
    "resnet9_small": (16, 2),
    "vgg16_bn_embed": (32, 4),
    "resnet10t": (32, 4),
    "densenet121": (32, 4),
    "mobilenetv3_small_050": (32, 4),
    "convnext_atto": (32, 4),
    "vit_tiny_patch16_224": (32, 12),
    "swin_tiny_patch4_window7_224": (56, 12),
}


def trained_once(encoder, x):
    torch.manual_seed(1)
    with _LiveBytes() as live:
        out = encoder.train()(x)
        kept = live.now
        out.square().sum().backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters()}
    return out.detach(), gradients, dict(encoder.named_buffers()), kept


@pytest.mark.parametrize("name", ENCODERS)
def test_checkpointing_changes_no_bit_and_takes_less_memory(name):
    size, blocks = ENCODERS[name]
    torch.manual_seed(0)
    plain = build_encoder(name, image_size=size)
    for dropout in (m for m in plain.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.3
    other = copy.deepcopy(plain)
    names = list(other.state_dict())
    assert apply_activation_checkpointing(other) >= blocks
    assert list(other.state_dict()) == names
    x = torch.randn(4, 3, size, size)
    out, gradients, buffers, kept = trained_once(plain, x)
    out_2, gradients_2, buffers_2, kept_2 = trained_once(other, x)
    assert torch.equal(out, out_2)
    for key, value in gradients.items():
        assert value is None or torch.equal(value, gradients_2[key]), key
    for key, value in buffers.items():
        assert torch.equal(value, buffers_2[key]), key
    assert kept_2 < kept


def test_evaluation_and_copies_give_the_same_outputs():
    torch.manual_seed(0)
    plain = build_encoder("resnet10t", image_size=32)
    other = copy.deepcopy(plain)
    apply_activation_checkpointing(other)
    copied = copy.deepcopy(other)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copied.eval()(x), plain.eval()(x))
    with torch.no_grad():
        assert torch.equal(copied(x), plain(x))


def test_an_encoder_without_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing: Linear has no repeated blocks"):
        apply_activation_checkpointing(nn.Linear(3, 2))


def test_running_statistics_change_only_outside_of_frozen_running_statistics():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(8, 3) + 4
    with frozen_running_statistics(norm):
        inside = norm(x)
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(norm(x), inside)
    assert int(norm.num_batches_tracked) == 1
