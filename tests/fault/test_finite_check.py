"""NaN and Inf: checked at once (CPU) or one step later (CUDA), the run ends and nothing non-finite is ever saved."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.config import load_config
from hpc_supcon.distributed import collectives
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import NonFinite
from hpc_supcon.training.checkpointer import Checkpointer
from hpc_supcon.training.fit import fit
from hpc_supcon.training.metrics import MetricLog, ProgressLine
from hpc_supcon.training.plan import TrainingPlan
from hpc_supcon.training.state import FiniteCheck, Training
from hpc_supcon.training.step import train_step

from ..dist.ranks import run_ranks
from ..dist.test_step import SETTINGS, build
from .runs import Run, events, steps

EVERYTHING = [
    "train.ema=0.9", "loss.queue_size=40", "model.momentum_encoder=0.9", "loss.learnable_temperature=true",
    "optim.clip_norm=1.0",
]  # fmt: skip


def deferring(options, deferred):
    """The options of the step with the check as on CUDA (deferred) or as on the CPU."""
    return replace(options, defer_finite_check=deferred)


def everything(state):
    saved = state.tensors()
    return {
        f"{stem}/{name}": t.clone() for stem, named in saved.items() if stem != "rng" for name, t in named.items()
    }


def poison(state, step):
    """NaN in the outputs of this rank, from this step on."""

    def hook(module, inputs, output):
        return output * math.nan if state.step + 1 >= step else output

    state.model.heads["projection"].hidden.register_forward_hook(hook)


def poisoned(rank, world, overrides, deferred):
    """(message, state before the non-finite step, state after it, steps done); the last rank's outputs are NaN from
    step 3 on."""
    state, options, batches = build(rank, world, overrides)
    options = deferring(options, deferred)
    if rank == world - 1:
        poison(state, 3)
    for batch in batches[:2]:
        train_step(state, batch, options)
    before = everything(state)
    with pytest.raises(NonFinite) as caught:  # noqa: PT012
        for batch in batches[2:]:
            train_step(state, batch, options)
    for _ in range(2):
        with pytest.raises(NonFinite, match="step 3"):
            state.tensors()
    state.pending_check = None  # only here: to see what the state is
    return str(caught.value), before, everything(state), state.step


@pytest.mark.parametrize("overrides", [[], EVERYTHING, [*EVERYTHING, "train.micro_batch_size=5"]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_deferred_check_ends_the_run_one_step_later_and_names_step_and_rank(ranks, overrides):
    for message, _, _, done in run_ranks(poisoned, ranks, overrides, True):
        assert message.startswith(f"step 3: outputs of rank {ranks - 1} became NaN or Inf (loss nan); training ends")
        assert done == 3, "found during the next step, before its update"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_check_at_once_ends_the_run_before_the_update(ranks):
    for message, before, after, done in run_ranks(poisoned, ranks, EVERYTHING, False):
        assert message.startswith(f"step 3: outputs of rank {ranks - 1} became NaN or Inf (loss nan); training ends")
        assert done == 2
        for name in before:
            if "running_" not in name and "num_batches" not in name:
                assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "lamb"])
def test_finite_steps_are_the_same_to_the_bit_either_way(optimizer):
    got = []
    for deferred in (False, True):
        torch.manual_seed(0)
        state, options, batches = build(0, 1, [*EVERYTHING, f"optim.name={optimizer}"])
        for batch in batches:
            train_step(state, batch, deferring(options, deferred))
        got.append(everything(state))
    assert got[0].keys() == got[1].keys()
    for name, t in got[0].items():
        assert torch.equal(t, got[1][name]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_every_non_finite_number_is_found(bad, where):
    numbers = {"loss": torch.tensor(1.0), "norm": torch.tensor(2.0), where: torch.tensor(bad)}
    outputs = {"projection": torch.ones(3), "classifier": torch.ones(2, 2, dtype=torch.bfloat16)}
    check = FiniteCheck(7, numbers["loss"], numbers["norm"], outputs)
    with pytest.raises(NonFinite, match="step 7: loss or gradients became NaN or Inf"):
        check.confirm()


def test_loss_and_norm_alone_decide_and_large_finite_ones_pass():
    outputs = {"projection": torch.tensor([math.nan])}
    FiniteCheck(1, torch.tensor(3e38), torch.tensor(3e38), outputs).confirm()


def test_a_loaded_state_is_not_judged_by_the_step_before_it():
    state, options, batches = build(0, 1, [])
    good = {stem: {name: t.clone() for name, t in named.items()} for stem, named in state.tensors().items()}
    poison(state, 1)
    train_step(state, batches[0], deferring(options, True))
    state.load(good, {"step": 0})
    assert all(torch.equal(t, good["model"][name]) for name, t in state.tensors()["model"].items())


# ---- the ways out of the training loop: the step at which it saves, validates or leaves is the non-finite one

BAD = 4
WAYS = {
    "saves": {"save_at": lambda step: step == BAD},
    "validates": {"validate_at": lambda step: step == BAD},
    "leaves": {},
    "is done": {"steps": BAD},
    "logs": {"log_every": BAD},
}


def fit_with_a_non_finite_step(rank, world, folder, way):
    """Steps 1 to 5 with a deferred check, of which step 4 is not finite; (message, validations)."""
    state, options, batches = build(rank, world, ["train.ema=0.9"])
    config = load_config("default", [*SETTINGS, f"run_dir={folder}", "checkpoint.max_failed_saves=5"])
    if rank == world - 1:
        poison(state, BAD)
    plan = {"steps": 5, "save_at": lambda step: step == 2, "validate_at": lambda step: False, "log_every": 100}
    plan = TrainingPlan(steps_per_epoch=5, images_per_step=24, lr=lambda step: 0.1, **{**plan, **WAYS[way]})

    class Loader:
        replaced = 0

        @staticmethod
        def epoch(epoch, start):
            return iter(batches[start:])

    validations = []

    def validate():
        validations.append(state.step)
        return {"loss": 1.0}

    training = Training(state, deferring(options, True), Loader(), plan, {})
    runtime = Runtime(Launch(rank=rank, world_size=world), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if way == "leaves":
            patch.setattr("hpc_supcon.training.fit.current_watchdog", Preempting)
        with (
            MetricLog(folder if rank == 0 else None) as log,
            ProgressLine(5, 1, shown=False) as progress,
            pytest.raises(NonFinite) as caught,
            Checkpointer(config, {}, runtime) as checkpointer,
        ):
            fit(training, checkpointer, validate, log=log, progress=progress)
    return str(caught.value), validations, state.step


class Preempting:
    """A watchdog that preempts the run after the non-finite step."""

    def training(self):
        return self.phase("")

    def phase(self, *args, **kwargs):
        return nullcontext()

    def completed(self, step):
        return step == BAD


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_the_loop_does_with_a_non_finite_step_nothing_of_it_is_saved_or_logged(tmp_path, ranks, way):
    (tmp_path / "config.yaml").touch()
    for message, validations, done in run_ranks(fit_with_a_non_finite_step, ranks, tmp_path, way):
        assert message.startswith(f"step {BAD}: outputs of rank {ranks - 1} became NaN or Inf")
        assert validations == []
        assert done == BAD, "found before the next step"
    saved = [] if way == "saves" else [2]
    assert checkpoint.list_steps(tmp_path / "checkpoints") == saved
    for step in saved:
        found = checkpoint.load_checkpoint(tmp_path / "checkpoints" / f"step-{step}")
        assert all(t.isfinite().all() for stem in ("model", "ema") for t in found.tensors[stem].values())
    assert not (tmp_path / "metrics.jsonl").exists(), "made with its first event"


def test_a_snapshot_of_a_non_finite_step_is_refused_and_an_earlier_one_is_finite(tmp_path):
    """As for the phase of validation, in which the run may be ended from another thread."""
    (tmp_path / "config.yaml").touch()
    state, options, batches = build(0, 1, ["train.ema=0.9"])
    poison(state, 3)
    config = load_config("default", [*SETTINGS, f"run_dir={tmp_path}"])
    with Checkpointer(config, {}, Runtime(Launch(), torch.device("cpu"))) as checkpointer:
        for batch in batches[:2]:
            train_step(state, batch, deferring(options, True))
        save = checkpointer.snapshot(state)
        with state.ema.applied():  # as validation does
            save()
        train_step(state, batches[2], deferring(options, True))
        with pytest.raises(NonFinite, match="step 3"):
            checkpointer.snapshot(state)
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [2]
    found = checkpoint.load_checkpoint(tmp_path / "checkpoints" / "step-2")
    assert all(t.isfinite().all() for t in found.tensors["model"].values())
    assert any(not torch.equal(t, found.tensors["ema"][name]) for name, t in found.tensors["model"].items())


def test_ranks_send_no_message_for_a_finite_step(monkeypatch):
    monkeypatch.setattr(collectives.dist, "all_gather_object", None)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    FiniteCheck(1, torch.tensor(1.0), torch.tensor(1.0), {"projection": torch.ones(3)}).confirm()


def test_a_run_with_a_bad_rank_ends_on_all_ranks_and_keeps_its_good_checkpoint(tmp_path):
    it = Run(2, tmp_path / "r", "optim.lr=1e30", "optim.warmup_epochs=2", "train.epochs=20")
    assert it.end() == [NonFinite.exit_code] * 2, it.stderr
    assert it.stderr.count("hpc-supcon: error: step ") == 1
    assert "became NaN or Inf" in it.stderr
    done = steps(tmp_path / "r")
    assert f"error: step {len(done) + 1}: " in it.stderr
    assert all(math.isfinite(e["loss"]) for e in events(tmp_path / "r", "train"))
    for step in checkpoint.list_steps(tmp_path / "r" / "checkpoints"):
        found = checkpoint.load_checkpoint(tmp_path / "r" / "checkpoints" / f"step-{step}")
        assert all(t.isfinite().all() for t in found.tensors["model"].values())
