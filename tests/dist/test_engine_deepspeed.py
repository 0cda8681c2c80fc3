"""DeepSpeed against DDP: the same weights, the same checkpoint, and runs that change from one to the other."""

from __future__ import annotations

import pytest
import torch

from tests.dist.engine_runs import Case, assert_same, run_all
from tests.loaders.extras import require

require("deepspeed", "pip install 'hpc-supcon[deepspeed]'", "its engine")

OPTIMIZERS = {
    "sgd": ["optim.name=sgd", "optim.lr=0.1", "optim.weight_decay=0.01"],
    "adamw": ["optim.name=adamw", "optim.lr=0.003", "optim.weight_decay=0.05"],
}
LEARNED = ["loss.learnable_temperature=true"]
FORMS = {
    "plain": LEARNED,
    "clipped": [*LEARNED, "optim.clip_norm=0.05"],
    "own statistics on every rank": ["model.sync_bn=false"],
    "two passes": [*LEARNED, "train.micro_batch_size=5"],
    "recomputed": ["train.activation_checkpointing=true"],
    "averaged weights and a queue": ["train.ema=0.9", "model.momentum_encoder=0.9", "loss.queue_size=30"],
    "a momentum target": ["loss.name=byol", "model.momentum_encoder=0.9", "model.momentum_final=1.0"],
    "a constant rate": ["loss.name=simsiam", "optim.predictor_schedule=constant", *OPTIMIZERS["sgd"]],
    "views of two sizes": [
        "loss.name=dino",
        "loss.prototypes=16",
        "model.momentum_encoder=0.9",
        "model.input_size=8",
        "data.views={global: 2, local: 2}",
        "augment.local.image_size=6",
    ],
}


def engine(zero):
    return [] if zero is None else ["train.engine=deepspeed", f"train.deepspeed.zero={zero}"]


ZEROS = (None, 0, 1, 2)


@pytest.fixture(scope="module")
def runs():
    """(name of optimizer or form, zero) -> by rank, five steps; None is DDP."""
    cases = {
        (name, zero): Case(LEARNED, settings, engine(zero)) for name, settings in OPTIMIZERS.items() for zero in ZEROS
    }
    cases |= {
        (name, zero): Case(OPTIMIZERS["adamw"], settings, engine(zero))
        for name, settings in FORMS.items()
        for zero in ZEROS
        if not (zero == 2 and name == "two passes")
    }
    cases["lars", None] = Case(["optim.name=lars"])
    cases["lars", 0] = Case(["optim.name=lars"], engine(0))
    return dict(zip(cases, run_all(2, list(cases.values())), strict=True))


@pytest.mark.parametrize("name", [*OPTIMIZERS, *FORMS, "lars"])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_five_steps_under_deepspeed_give_the_weights_of_ddp(runs, zero, name):
    if (name, zero) not in runs:
        pytest.skip("refused before training")
    for got, want in zip(runs[name, zero], runs[name, None], strict=True):
        assert_same(got, want, 1e-6)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_checkpoints_equal_those_of_ddp(runs, zero, name):
    for got, want in zip(runs[name, zero], runs[name, None], strict=True):
        assert got["saved"][0].keys() == want["saved"][0].keys()
        assert got["optimizer"].keys() == want["optimizer"].keys()
        for slot, value in want["optimizer"].items():
            assert got["optimizer"][slot].shape == value.shape
            assert got["optimizer"][slot].dtype == value.dtype
            assert (got["optimizer"][slot] - value).norm() <= 1e-5 * value.norm(), slot


def test_a_run_is_resumed_under_the_other_engine(tmp_path):
    pairs = [(None, 1), (1, None), (0, 2), (2, None), (None, 0)]
    first = {
        (name, zero): Case(LEARNED, settings, engine(zero), stop=3)
        for name, settings in OPTIMIZERS.items()
        for zero in ZEROS
    }
    whole = {name: Case(LEARNED, settings, stop=6) for name, settings in OPTIMIZERS.items()}
    done = run_all(2, [*first.values(), *whole.values()])
    saved = {}
    for key, ranks in zip(first, done[: len(first)], strict=True):
        saved[key] = tmp_path / f"{key}.pt"
        torch.save(ranks[0]["saved"], saved[key])
    want = dict(zip(whole, done[len(first) :], strict=True))
    changes = [(name, before, after) for name in OPTIMIZERS for before, after in pairs]
    later = run_all(
        2,
        [
            Case(LEARNED, OPTIMIZERS[name], engine(after), saved=saved[name, before], start=3, stop=6)
            for name, before, after in changes
        ],
    )
    for (name, _, _), ranks in zip(changes, later, strict=True):
        for rank, got in enumerate(ranks):
            uninterrupted = {**want[name][rank], "losses": want[name][rank]["losses"][3:]}
            assert_same(got, uninterrupted, 1e-6)


def test_a_step_whose_gradients_overflow_on_one_rank_is_skipped_on_all():
    plain = ["augment.policy=none", *LEARNED]
    scaled = [Case(plain, engine(zero), ["train.precision=fp16"], overflow_at=4) for zero in (0, 1, 2)]
    after = [Case(plain, engine(zero), ["train.precision=fp16"], overflow_at=2) for zero in (0, 1, 2)]
    *runs, want = run_all(2, [*scaled, Case(plain, stop=4)])
    for ranks in runs:
        for got, reference in zip(ranks, want, strict=True):
            assert_same({**got, "losses": got["losses"][:4]}, reference, 1e-6, parts=("objective",))
            for name, value in got["model"].items():
                if "running" not in name and "num_batches" not in name:
                    assert (value - reference["model"][name]).norm() <= 1e-6 * value.norm(), name
            assert got["statistics"]["skipped_steps"] == 1
            assert got["norms"][-1] == float("inf") or got["norms"][-1] != got["norms"][-1]
    unlike = run_all(2, [*after, Case(plain, ["train.precision=fp16"], overflow_at=2)])
    for ranks in unlike[:-1]:
        for got, reference in zip(ranks, unlike[-1], strict=True):
            assert_same(got, reference, 1e-6)  # the dropped gradients have no influence on the steps after it


def test_one_process_without_a_launcher():
    want, got = (run_all(1, [Case(LEARNED, engine(zero))])[0][0] for zero in (None, 1))
    assert_same(got, want, 1e-6)
