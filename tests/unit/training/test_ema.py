"""The moving average of weights: its formula, checkpoints, and use in evaluation."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from hpc_supcon import checkpoint
from hpc_supcon.config import load_config
from hpc_supcon.data import ArraySource, Splits
from hpc_supcon.stages.probe import load_model
from hpc_supcon.training.build import describe_model
from hpc_supcon.training.ema import WeightAverage
from hpc_supcon.training.engine.base import load_optimizer
from hpc_supcon.training.step import train_step
from tests.dist.test_step import SETTINGS, build


def test_the_average_follows_its_formula():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    ema = WeightAverage(model, 0.9)
    want = [p.detach().clone() for p in model.parameters()]
    for step in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(5, 3, dtype=torch.float64))
        ema.update()
        want = [0.9 * w + 0.1 * p.detach() for w, p in zip(want, model.parameters(), strict=True)]
        assert step == int(model[1].num_batches_tracked) - 1
    other = copy.deepcopy(model)
    other.load_state_dict(ema.state_dict())
    for p, w in zip(other.parameters(), want, strict=True):
        torch.testing.assert_close(p, w, rtol=1e-12, atol=1e-14)
    for own, models in zip(other.buffers(), model.buffers(), strict=True):
        assert torch.equal(own, models)


def test_the_average_shares_no_memory_with_the_model():
    model = nn.Linear(2, 2)
    ema = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.zero_()
    assert ema.state_dict()["weight"].abs().sum() > 0


def test_the_model_has_the_average_inside_applied_and_its_own_weights_afterwards():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    ema = WeightAverage(model, 0.5)
    with torch.no_grad():
        model[0].weight.mul_(3)
    ema.update()
    own, average = copy.deepcopy(model.state_dict()), copy.deepcopy(ema.state_dict())
    where = [p.data_ptr() for p in model.parameters()]
    with contextlib.suppress(KeyError), ema.applied():
        assert all(torch.equal(t, average[name]) for name, t in model.state_dict().items())
        raise KeyError
    assert all(torch.equal(t, own[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, average[name]) for name, t in ema.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == where


RUNS = [
    ["train.ema=0.9"],
    ["train.ema=0.9", "optim.name=lars", "optim.lars_eta=0.02", "optim.clip_norm=0.5"],
    ["optim.name=lamb", "optim.lr=0.01", "loss.learnable_temperature=true"],
    ["optim.name=lars", "optim.nesterov=true", "loss.learnable_temperature=true"],
    ["optim.name=adamw", "optim.lr=0.001", "train.ema=0.5"],
]


@pytest.mark.parametrize("overrides", RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, overrides):
    state, options, batches = build(0, 1, overrides)
    for batch in batches[:2]:
        train_step(state, batch, options)
    path = checkpoint.save_checkpoint(tmp_path, 2, state.tensors(), {"step": 2}, world_size=1, config_digest="")
    assert (path / "ema.safetensors").exists() == (state.ema is not None)
    for batch in batches[2:]:
        train_step(state, batch, options)
    other, other_options, _ = build(0, 1, overrides)
    other.load(checkpoint.load_checkpoint(path).tensors, {"step": 2})
    for batch in batches[2:]:
        train_step(other, batch, other_options)
    want, got = state.tensors(), other.tensors()
    assert want.keys() == got.keys()
    for part, named in want.items():
        assert named.keys() == got[part].keys()
        for name, tensor in named.items():
            assert torch.equal(tensor, got[part][name]), (part, name)


def test_evaluation_uses_the_average_where_there_is_one(tmp_path):
    state, options, batches = build(0, 1, ["train.ema=0.9"])
    for batch in batches[:2]:
        train_step(state, batch, options)
    source = ArraySource(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(5), tuple("abcde"))
    config = load_config("default", SETTINGS)
    description = describe_model(config, Splits(source, source, source))
    for tensors, want in ((state.tensors(), state.ema.state_dict()), (None, state.model.state_dict())):
        parts = tensors or {"model": state.model.state_dict()}
        folder = tmp_path / ("with" if tensors else "without")
        checkpoint.save_checkpoint(
            folder / "checkpoints", 2, parts, {"step": 2, **description}, world_size=1, config_digest=""
        )
        model, _ = load_model(folder)
        for name, value in model.state_dict().items():
            assert torch.equal(value, want[name]), name
    first = next(iter(state.model.named_parameters()))
    assert not torch.equal(first[1], state.ema.state_dict()[first[0]])


def test_clipping_bounds_the_update_and_the_norm_reported_is_the_one_before():
    moved = []
    for overrides in ([], ["optim.clip_norm=0.01"]):
        state, options, batches = build(0, 1, ["optim.momentum=0", "optim.weight_decay=0", *overrides])
        before = [p.detach().clone() for p in state.model.parameters()]
        norm = train_step(state, batches[0], options).gradient_norm
        moved.append((norm, [p.detach() - b for p, b in zip(state.model.parameters(), before, strict=True)]))
    (free_norm, free), (clipped_norm, clipped) = moved
    assert free_norm == clipped_norm > 0.01
    total = torch.nn.utils.get_total_norm(clipped)
    torch.testing.assert_close(total, torch.tensor(0.1 * 0.01), rtol=1e-2, atol=0)
    for a, b in zip(free, clipped, strict=True):
        torch.testing.assert_close(b, a * 0.01 / free_norm, rtol=1e-2, atol=1e-7)


def test_the_optimizer_state_of_a_0_dim_parameter_is_loaded_to_its_device():
    for settings, counts_on in (({"foreach": True}, "cpu"), ({"fused": True}, "meta")):
        temperature = nn.Parameter(torch.empty((), device="meta"))
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, **settings)
        load_optimizer({"t": temperature}, optimizer, {"t/exp_avg": torch.tensor(1.0), "t/step": torch.tensor(3.0)})
        assert optimizer.state[temperature]["exp_avg"].device.type == "meta"
        assert optimizer.state[temperature]["step"].device.type == counts_on
