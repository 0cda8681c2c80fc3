"""Training adapters, or a part of the encoder: equal on ranks, frozen weights untouched, resumed bit for bit."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon.training.step import train_step
from tests.dist.ranks import run_ranks
from tests.dist.test_step import build

VIT = ["model.encoder=test_vit", "model.input_size=32", "augment.policy=none", "optim.lr=0.05"]
CASES = {
    "lora": [*VIT, "model.lora={rank: 2, alpha: 4}"],
    "lora of attention, with dropout": [*VIT, "model.lora={rank: 2, targets: [qkv], dropout: 0.1}"],
    "last block": [*VIT, "model.train=[blocks.5, head]"],
    "last layer": ["augment.policy=none", "model.train=[latent, head]"],
    "a target and an average": [
        *VIT, "model.lora.rank=2", "loss.name=byol", "model.momentum_encoder=0.9", "train.ema=0.9",
    ],
    "a queue": [
        "augment.policy=none", "model.train=[latent, head]", "loss.queue_size=32", "model.momentum_encoder=0.9",
    ],
    "adamw": [*VIT, "model.train=[norm, head]", "optim.name=adamw", "optim.lr=0.01"],
    "in pieces": [*VIT, "model.lora.rank=2", "train.micro_batch_size=4"],
    "recomputed": [*VIT, "model.lora.rank=2", "train.activation_checkpointing=true"],
}  # fmt: skip


def steps(rank, world_size, overrides, saved=None, start=0, stop=4):
    torch.manual_seed(0)
    state, options, batches = build(rank, world_size, overrides)
    state.parallel.train()
    first = {name: t.clone() for name, t in state.model.state_dict().items()}
    if saved is not None:
        state.load(*saved)
    losses = [float(train_step(state, batches[step], options).loss) for step in range(start, stop)]
    tensors = {file: {n: t.clone() for n, t in named.items()} for file, named in state.tensors().items()}
    trained = {name for name, p in state.model.named_parameters() if p.requires_grad}
    return {"first": first, "losses": losses, "tensors": tensors, "numbers": state.numbers(), "trained": trained}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_trained_changes_and_has_a_place_in_the_optimizer(case):
    got = steps(0, 1, CASES[case])
    assert got["trained"]
    for file in ("model", "ema"):
        named = got["tensors"].get(file, got["tensors"]["model"])
        changed = {name for name, t in named.items() if not same(t, got["first"][name])}
        statistics = {n for n in changed if "running" in n or "tracked" in n}
        assert changed - statistics == got["trained"]
        assert all(n.startswith("heads.") for n in statistics)
    assert {name.rpartition("/")[0] for name in got["tensors"]["optimizer"]} == got["trained"]
    for file, prefix in (("objective", "target.network."), ("queue", "key_model.")):
        copied = {n.removeprefix(prefix): t for n, t in got["tensors"].get(file, {}).items() if n.startswith(prefix)}
        changed = {n for n, t in copied.items() if not same(t, got["first"][n])}
        assert not {n for n in changed if n.startswith("encoder.")} - got["trained"]


def same(a, b):
    return torch.equal(a, b)


@pytest.mark.parametrize(
    ("engine", "case"), [("ddp", "lora"), ("ddp", "last block"), ("ddp", "last layer"), ("deepspeed", "lora")]
)
def test_two_ranks_train_what_one_trains(case, engine):
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    more = [f"train.engine={engine}"]
    want = steps(0, 1, CASES[case])
    ranks = run_ranks(steps, 2, [*CASES[case], *more])
    for got in ranks:
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-4)
        for name, tensor in want["tensors"]["model"].items():
            torch.testing.assert_close(got["tensors"]["model"][name], tensor, rtol=1e-3, atol=1e-4)
            if name not in want["trained"] and not name.startswith("heads."):
                assert same(got["tensors"]["model"][name], tensor), name
        for name, tensor in ranks[0]["tensors"]["model"].items():
            assert same(got["tensors"]["model"][name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_continued_from_a_checkpoint_equals_uninterrupted_bit_for_bit(case):
    whole = steps(0, 1, CASES[case])
    half = steps(0, 1, CASES[case], stop=2)
    rest = steps(0, 1, CASES[case], saved=(half["tensors"], half["numbers"]), start=2)
    assert half["losses"] + rest["losses"] == whole["losses"]
    assert {file: set(named) for file, named in rest["tensors"].items()} == {
        file: set(named) for file, named in whole["tensors"].items()
    }
    for file, named in whole["tensors"].items():
        assert not [name for name, t in named.items() if not same(t, rest["tensors"][file][name])], file
