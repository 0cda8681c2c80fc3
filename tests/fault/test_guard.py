"""NaN and Inf, looked at at once (CPU) and on the device without waiting: the weights never see them."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.errors import NonFinite
from hpc_supcon.training.finite_check import Guard
from hpc_supcon.training.step import train_step

from ..dist.ranks import run_ranks
from ..dist.test_step import build
from .runs import Run, steps

EVERYTHING = [
    "train.ema=0.9", "loss.queue_size=40", "model.momentum_encoder=0.9", "loss.learnable_temperature=true",
    "optim.clip_norm=1.0",
]  # fmt: skip


def everything(state):
    saved = state.tensors()
    return {
        f"{stem}/{name}": t.clone() for stem, named in saved.items() if stem != "rng" for name, t in named.items()
    }


def poison(state, at):
    """NaN in the outputs of this rank, in its calls from number `at` on."""
    calls = 0

    def hook(module, inputs, output):
        nonlocal calls
        calls += 1
        return output * math.nan if calls >= at else output

    state.model.heads["projection"].hidden.register_forward_hook(hook)


def poisoned(rank, world, optimizer, deferred):
    """(message, state before the bad step, state after it all), one rank's input being bad from step 3 on."""
    nesterov = ["optim.nesterov=true"] if optimizer in ("sgd", "lars") else []
    state, batches = build(rank, world, [*EVERYTHING, f"optim.name={optimizer}", *nesterov])
    state.guard = Guard(state.device, deferred=deferred)
    if rank == world - 1:
        poison(state, 3)
    for batch in batches[:2]:
        train_step(state, batch)
    before = everything(state)
    with pytest.raises(NonFinite) as caught:  # noqa: PT012
        for batch in batches[2:]:
            train_step(state, batch)
    state.guard = Guard(state.device)
    return str(caught.value), before, everything(state), state.step


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "lamb"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_the_device_a_bad_step_and_all_after_it_change_nothing(ranks, optimizer):
    """Weights, momenta, step counters on the device, average, queue, momentum encoder, BatchNorm's statistics."""
    for message, before, after, done in run_ranks(poisoned, ranks, optimizer, True):
        assert message.startswith(f"step 3: outputs of rank {ranks - 1} became NaN or Inf; stopped before the update")
        assert done == 3, "noticed before the update of the next step"
        for name in before:
            assert torch.equal(before[name], after[name]), name
        assert all(t.isfinite().all() for t in after.values() if t.is_floating_point())


@pytest.mark.parametrize("ranks", [1, 2])
def test_looked_at_at_once_nothing_but_statistics_has_changed(ranks):
    for message, before, after, done in run_ranks(poisoned, ranks, "sgd", False):
        assert message.startswith(f"step 3: outputs of rank {ranks - 1} became NaN or Inf (loss nan); stopped before")
        assert done == 2
        for name in before:
            if "running_" not in name and "num_batches" not in name:
                assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "lamb"])
def test_finite_steps_are_the_same_to_the_bit_either_way(optimizer):
    got = []
    for deferred in (False, True):
        torch.manual_seed(0)
        state, batches = build(0, 1, [*EVERYTHING, f"optim.name={optimizer}"])
        state.guard = Guard(state.device, deferred=deferred)
        for batch in batches:
            train_step(state, batch)
        got.append(everything(state))
    assert got[0].keys() == got[1].keys()
    for name, t in got[0].items():
        assert torch.equal(t, got[1][name]), name


def test_what_is_not_finite_is_not_given_out_to_be_saved():
    state, batches = build(0, 1, [])
    state.guard = Guard(state.device, deferred=True)
    poison(state, 2)
    train_step(state, batches[0])
    before = copy.deepcopy(state.tensors())
    train_step(state, batches[1])
    with pytest.raises(NonFinite, match="step 2"):
        state.tensors()
    after = state.tensors()
    assert all(torch.equal(t, after["model"][name]) for name, t in before["model"].items())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
@pytest.mark.parametrize("deferred", [False, True])
def test_every_kind_of_number_that_is_none_is_found(bad, where, deferred):
    guard = Guard(torch.device("cpu"), deferred=deferred)
    weights = torch.tensor([1.0, -2.0, 3.0])
    guard.begin(lambda: [weights])
    numbers = {"loss": torch.tensor(1.0), "norm": torch.tensor(2.0), where: torch.tensor(bad)}
    with pytest.raises(NonFinite, match="step 7: loss or gradients"):  # noqa: PT012
        guard.check(7, numbers["loss"], numbers["norm"], {"projection": torch.ones(3)})
        weights.mul_(bad)
        guard.end()
        guard.settle()
    assert weights.tolist() == [1.0, -2.0, 3.0]


def test_a_run_with_a_bad_rank_ends_on_all_ranks_and_keeps_its_good_checkpoint(tmp_path):
    it = Run(2, tmp_path / "r", "optim.lr=1e30", "optim.warmup_epochs=2", "train.epochs=20")
    assert it.end() == [NonFinite.exit_code] * 2, it.stderr
    assert it.stderr.count("hpc-supcon: error: step ") == 1
    assert "became NaN or Inf" in it.stderr
    done = steps(tmp_path / "r")
    assert f"error: step {len(done) + 1}: " in it.stderr
    for step in checkpoint.list_steps(tmp_path / "r" / "checkpoints"):
        found = checkpoint.load_checkpoint(tmp_path / "r" / "checkpoints" / f"step-{step}")
        assert all(t.isfinite().all() for t in found.tensors["model"].values())
