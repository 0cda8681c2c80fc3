"""Engines: the same weights as one process, whoever averages gradients and holds the optimiser."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon.training.step import train_step
from tests.dist.ranks import run_ranks
from tests.dist.test_step import DoubleEncoder, build
from tests.loaders.extras import require

require("deepspeed", "pip install 'hpc-supcon[deepspeed]'", "its engine")

SGD = ["optim.name=sgd", "optim.lr=0.1", "optim.weight_decay=0.01"]
ADAMW = ["optim.name=adamw", "optim.lr=0.003", "optim.weight_decay=0.05"]
FP32 = ["loss.learnable_temperature=true", "model.sync_bn=true"]


def copied(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


def steps(rank, world_size, overrides, saved=None, start=0, stop=5):
    """(losses, model, objective, what a checkpoint holds) after the steps from `start` to `stop`."""
    torch.manual_seed(0)
    state, batches = build(rank, world_size, overrides)
    if saved is not None:
        state.load(*saved)
    losses = [float(train_step(state, batch).loss) for batch in (batches * 2)[start:stop]]
    checkpoint = {part: copied(named) for part, named in state.tensors().items()}
    return losses, copied(state.model.state_dict()), dict(state.objective.state_dict()), checkpoint, state.numbers()


def deepspeed(zero):
    return ["train.engine=deepspeed", f"train.deepspeed.zero={zero}"]


def assert_same(got, want, rel):
    assert got[0] == pytest.approx(want[0], rel=rel)
    for part in (1, 2):
        assert got[part].keys() == want[part].keys()
        for name, value in want[part].items():
            distance = (got[part][name].double() - value.double()).norm()
            assert distance <= rel * value.double().norm().clamp(min=1e-3), (name, float(distance))


@pytest.mark.parametrize("optimiser", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_five_steps_under_deepspeed_give_the_weights_of_ddp(zero, optimiser):
    want = run_ranks(steps, 2, [*FP32, *optimiser])
    got = run_ranks(steps, 2, [*FP32, *optimiser, *deepspeed(zero)])
    for one in got:
        assert_same(one, want[0], 1e-6)
