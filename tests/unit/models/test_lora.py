"""Low-rank adapters: their formula, what stays frozen, merging, and layers that cannot have one."""

from __future__ import annotations

import builtins
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from hpc_supcon.errors import ConfigError, MissingExtra
from hpc_supcon.models import build_encoder
from hpc_supcon.models.lora import add_adapters, choose_layers, merge_adapters

IMAGES = {"in_channels": 3, "image_size": 32}
CONVOLUTIONS = ["layer1.0.conv1", "downsample.0", "layer4.1.conv2"]


def adapted(encoder, targets=None, *, rank=4, alpha=16.0, dropout=0.0):
    """`encoder` with adapters that are no longer zero; the names of their layers."""
    names = add_adapters(encoder, rank=rank, alpha=alpha, dropout=dropout, targets=targets, **IMAGES)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return names


@pytest.fixture(params=[("test_vit", None), ("resnet18", CONVOLUTIONS), ("resnet9_small", ["0"])], ids=lambda p: p[0])
def case(request):
    name, targets = request.param
    if name == "resnet9_small":
        targets = [n for n, m in build_encoder(name, **IMAGES).named_modules() if isinstance(m, nn.Conv2d)][1:3]
    return build_encoder(name, **IMAGES).eval(), targets


@torch.no_grad()
def test_new_adapters_change_nothing_and_merged_ones_what_they_did_before(case):
    encoder, targets = case
    x, before, names = torch.randn(3, 3, 32, 32), copy.deepcopy(encoder), list(encoder.state_dict())
    add_adapters(encoder, rank=4, alpha=16.0, dropout=0.0, targets=targets, **IMAGES)
    assert torch.equal(encoder(x), before(x))
    for name, p in encoder.named_parameters():
        if "lora_B" in name:
            p.normal_(std=0.1)
    with_adapters = encoder(x)
    assert (with_adapters - before(x)).abs().max() > 1e-3
    merge_adapters(encoder)
    torch.testing.assert_close(encoder(x), with_adapters, rtol=1e-5, atol=1e-5)
    assert list(encoder.state_dict()) == names
    assert all(p.requires_grad for p in encoder.parameters())
    assert not hasattr(encoder, "peft_config")


def test_only_adapters_get_gradients_and_no_other_tensor_changes(case):
    encoder, targets = case
    before = copy.deepcopy(encoder.state_dict())
    names = adapted(encoder, targets)
    encoder(torch.randn(3, 3, 32, 32)).square().sum().backward()
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{side}.default.weight" for name in names for side in "AB"}
    after = {name.replace(".base_layer", ""): t for name, t in encoder.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_adapter_adds_alpha_over_rank_times_b_a_x():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)).double()
    weight, bias = encoder[1].weight.detach().clone(), encoder[1].bias.detach().clone()
    assert adapted(encoder, rank=2, alpha=6.0) == ["1"]
    a, b = (encoder[1].get_submodule(f"lora_{side}.default").weight.double() for side in "AB")
    assert a.shape == (2, 3 * 32 * 32)
    assert b.shape == (5, 2)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    want = F.linear(x.flatten(1), weight + 3.0 * b @ a, bias)
    torch.testing.assert_close(encoder(x), want, rtol=1e-5, atol=1e-5)


def test_all_linear_layers_of_a_vision_transformer_are_the_default():
    encoder = build_encoder("test_vit", **IMAGES)
    linear = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    assert choose_layers(encoder, None, **IMAGES) == linear
    assert choose_layers(encoder, ["qkv"], **IMAGES) == [f"blocks.{i}.attn.qkv" for i in range(6)]
    assert choose_layers(encoder, ["blocks.1.attn.qkv"], **IMAGES) == ["blocks.1.attn.qkv"]
    assert choose_layers(encoder, ["patch_embed.proj", "1.attn.proj"], **IMAGES) == [
        "patch_embed.proj", "blocks.1.attn.proj",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"unknown layer 'proj_'; did you mean .*proj"):
        choose_layers(encoder, ["proj_"], **IMAGES)


def test_looking_for_layers_changes_no_statistics_and_no_mode():
    encoder = build_encoder("resnet18", **IMAGES)
    encoder.layer1.eval()
    before = copy.deepcopy(encoder.state_dict())
    choose_layers(encoder, ["conv2"], **IMAGES)
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    assert encoder.training
    assert not encoder.layer1[0].bn1.training
    assert not any(m._forward_pre_hooks for m in encoder.modules())


def test_an_encoder_of_convolutions_needs_targets():
    encoder = build_encoder("resnet18", **IMAGES)
    with pytest.raises(
        ConfigError, match=r"ResNet has no linear layer .*model\.lora\.targets, such as conv1, layer1"
    ):
        choose_layers(encoder, None, **IMAGES)
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: unknown layer 'convv2'; did you mean .*'conv2'"):
        choose_layers(encoder, ["conv1", "convv2"], **IMAGES)
    grouped = build_encoder("mobilenetv3_small_050", **IMAGES)
    with pytest.raises(ConfigError, match="conv_dw: a convolution in groups has no adapter: blocks"):
        choose_layers(grouped, ["conv_dw"], **IMAGES)


class ReadsWeights(nn.Module):
    """Its attention and one of its layers are read, not called."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(96, 4, batch_first=True)
        self.read, self.called = nn.Linear(96, 8), nn.Linear(8, 8)

    def forward(self, x):
        rows = x.flatten(2)[:, :, :96]
        return self.called(F.linear(self.attention(rows, rows, rows)[0].mean(1), self.read.weight))


def test_layers_whose_weights_are_read_are_left_out_or_refused():
    encoder = ReadsWeights()
    assert choose_layers(encoder, None, **IMAGES) == ["called"]
    for name in ("read", "out_proj"):
        with pytest.raises(ConfigError, match=rf"{name}: ReadsWeights reads the weights of .*{name} itself"):
            choose_layers(encoder, [name], **IMAGES)


def test_without_peft_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"model\.lora\.rank needs peft; .* 'hpc-supcon\[lora\]'"):
        adapted(build_encoder("test_vit", **IMAGES))


def test_timm_loads_the_weights_of_merged_adapters():
    encoder = build_encoder("test_vit", **IMAGES).eval()
    adapted(encoder, ["qkv"])
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = encoder(x)
        merge_adapters(encoder)
        model = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
        model.load_state_dict(encoder.state_dict())
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
