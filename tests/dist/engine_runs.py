"""Five steps under any engine, for the tests that compare engines."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from hpc_supcon.training.step import train_step
from tests.dist.ranks import run_ranks
from tests.dist.test_step import DoubleEncoder, build


def copied(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


class Case:
    """`overrides` of the configuration; `saved`, a file to continue from; steps `start` to `stop`.

    smooth: this dtype of an encoder without BatchNorm, whose rounding does not grow from step to step.
    """

    def __init__(self, *overrides, saved=None, start=0, stop=5, smooth=None, overflow_at=None):
        self.overrides = [o for some in overrides for o in some]
        self.saved, self.start, self.stop = saved, start, stop
        self.smooth, self.overflow_at = smooth, overflow_at


def run_case(rank, world_size, case):
    torch.manual_seed(0)
    encoder = None if case.smooth is None else DoubleEncoder().to(case.smooth)
    state, options, batches = build(rank, world_size, case.overrides, encoder=encoder)
    if case.saved is not None:
        state.load(*torch.load(case.saved, weights_only=True))
    if "train.precision=fp16" in case.overrides:
        options = replace(options, autocast=nullcontext)  # loss scaling alone: the CPU has no fast fp16
    overflows = []
    weight = next(state.model.parameters())
    weight.register_hook(lambda g: g * float("inf") if overflows else g)
    losses, norms = [], []
    for step in range(case.start, case.stop):
        overflows[:] = [True] * (case.overflow_at == step and rank == world_size - 1)
        result = train_step(state, (batches * 2)[step], options)
        losses.append(float(result.loss))
        norms.append(float(result.gradient_norm))
    tensors = {part: copied(named) for part, named in state.tensors().items()}
    return {
        "losses": losses,
        "norms": norms,
        "model": copied(state.model.state_dict()),
        "objective": copied(state.objective.state_dict()),
        "optimizer": tensors["optimizer"],
        "saved": (tensors, state.numbers()),
        "statistics": state.engine.statistics(),
    }


def run_cases(rank, world_size, cases):
    return [run_case(rank, world_size, case) for case in cases]


def run_all(world_size, cases):
    """By case, the results of `run_case` on every rank. All cases share processes, which take longer to start."""
    return list(zip(*run_ranks(run_cases, world_size, cases), strict=True))


def assert_same(got, want, rel, parts=("model", "objective"), floor=1e-3):
    """Each tensor within `rel` of its norm, or of `floor` where that is larger."""
    assert got["losses"] == pytest.approx(want["losses"], rel=rel)
    for part in parts:
        assert got[part].keys() == want[part].keys()
        for name, value in want[part].items():
            distance = (got[part][name].double() - value.double()).norm()
            assert distance <= rel * value.double().norm().clamp(min=floor), (part, name, float(distance))
