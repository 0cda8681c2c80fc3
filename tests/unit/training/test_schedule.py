"""Learning-rate schedules against torch.optim.lr_scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from hpc_supcon.config import load_config
from hpc_supcon.errors import ConfigError
from hpc_supcon.training.optim.schedule import learning_rate
from hpc_supcon.training.plan import build_plan

PEAK = 0.7


def ours(steps, warmup, **settings):
    return [learning_rate(s, peak=PEAK, steps=steps, warmup_steps=warmup, **settings) for s in range(steps)]


def torchs(steps, make):
    """Rates of `steps` steps of a scheduler made for an SGD at the peak."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def assert_close(got, want):
    assert len(got) == len(want)
    assert got == pytest.approx(want, rel=1e-9, abs=1e-12)


SETTINGS = [
    {"schedule": "cosine", "final_fraction": 0.0},
    {"schedule": "cosine", "final_fraction": 0.1},
    {"schedule": "step", "milestones": (0.5, 0.9), "gamma": 0.3},
    {"schedule": "constant"},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("steps", "warmup"), [(50, 7), (3, 2), (101, 100)])
def test_warm_up_is_linear_lr(settings, steps, warmup):
    want = torchs(warmup, lambda o: lr_scheduler.LinearLR(o, start_factor=1 / warmup, total_iters=warmup - 1))
    assert_close(ours(steps, warmup, **settings)[:warmup], want)


@pytest.mark.parametrize("final", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(("steps", "warmup"), [(40, 0), (37, 5), (2, 0), (3, 1)])
def test_cosine_is_cosine_annealing_lr_after_the_warm_up(final, steps, warmup):
    rest = steps - warmup
    # T_max: the steps between the first rate and the last one
    want = torchs(rest, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=rest - 1, eta_min=final * PEAK))
    assert_close(ours(steps, warmup, schedule="cosine", final_fraction=final)[warmup:], want)


@pytest.mark.parametrize("final", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize(("steps", "warmup"), [(1000, 100), (1000, 1), (13, 2), (3, 1)])
def test_the_last_step_has_the_final_learning_rate(schedule, final, steps, warmup):
    rates = ours(steps, warmup, schedule=schedule, final_fraction=final)
    assert rates[-1] == pytest.approx(final * PEAK, abs=1e-15)
    assert max(rates) == pytest.approx(PEAK)


@pytest.mark.parametrize("steps", [1000, 13])
def test_the_last_step_of_the_other_schedules(steps):
    assert ours(steps, 2, schedule="constant")[-1] == PEAK
    rates = ours(steps, 2, schedule="step", milestones=(0.5, 0.9), gamma=0.1)
    assert rates[-1] == pytest.approx(0.01 * PEAK)


@pytest.mark.parametrize("milestones", [(0.6, 0.8), (0.1,), (0.25, 0.5, 0.75)])
@pytest.mark.parametrize("steps", [10, 100, 123])
def test_step_is_multi_step_lr(milestones, steps):
    at = [round(m * steps) for m in milestones]
    want = torchs(steps, lambda o: lr_scheduler.MultiStepLR(o, at, gamma=0.2))
    assert_close(ours(steps, 0, schedule="step", milestones=milestones, gamma=0.2), want)


def test_milestones_are_fractions_of_the_whole_training_including_the_warm_up():
    rates = ours(100, 20, schedule="step", milestones=(0.6, 0.8), gamma=0.1)
    changes = [s for s in range(20, 100) if rates[s] != rates[s - 1]]
    assert changes == [60, 80]


@pytest.mark.parametrize("final", [0.0, 1e-3])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 30), (47, 5), (10, 2), (20, 19)])
def test_one_cycle_is_one_cycle_lr(final, steps, warmup):
    want = torchs(
        steps,
        lambda o: lr_scheduler.OneCycleLR(
            o, PEAK, total_steps=steps, pct_start=warmup / steps, cycle_momentum=False, div_factor=25.0,
            final_div_factor=1 / (25 * final) if final else math.inf,
        ),
    )  # fmt: skip
    got = ours(steps, warmup, schedule="one_cycle", final_fraction=final)
    assert_close(got, want)
    assert max(got) == got[warmup - 1] == PEAK
    assert got[-1] == pytest.approx(final * PEAK, abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant", "one_cycle"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 2), (3, 50)])
def test_very_short_trainings_and_a_warm_up_longer_than_the_training_have_a_rate(schedule, steps, warmup):
    rates = ours(steps, warmup, schedule=schedule, milestones=(0.5,), gamma=0.1)
    assert all(0 <= r <= PEAK for r in rates)


def test_an_unknown_schedule_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown schedule 'cosin'; did you mean 'cosine'"):
        ours(3, 0, schedule="cosin")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.warmup_epochs=1", "optim.warmup_iterations=10"], "both give the length of the warm-up"),
        (["optim.final_lr_fraction=0.1", "optim.schedule=step"], "where cosine and one_cycle end, not step"),
        (["optim.final_lr_fraction=0.1", "optim.schedule=constant"], "where cosine and one_cycle end, not constant"),
        (["optim.schedule=one_cycle"], "one_cycle rises in the warm-up"),
        (["optim.milestones=[0.8, 0.6]"], "must increase"),
        (["optim.milestones=[]"], "at least 1"),
        (["optim.milestones=[1.0]"], "less than 1"),
        (["optim.name=lamb", "optim.nesterov=true"], "nesterov is for sgd and lars"),
        (["optim.momentum=0", "optim.nesterov=true"], "momentum above 0"),
        (["optim.eps=1e-8"], "eps: sgd"),
        (["optim.name=lars", "optim.lamb_norm_range=[0, 10]"], "lamb_norm_range is for lamb, not for lars"),
        (["optim.name=lamb", "optim.lamb_norm_range=[2, 1]"], "the lower end comes first"),
        (["optim.name=lasr"], "'lars'"),
    ],
)
def test_contradicting_settings_are_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("default", overrides)
    assert message in str(caught.value)
    assert "optim" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.name=lars", "optim.nesterov=true", "optim.eps=1e-8"],
        ["optim.name=lamb", "optim.lamb_norm_range=[0, 10]"],
        ["optim.schedule=one_cycle", "optim.warmup_epochs=2", "optim.final_lr_fraction=0.01"],
    ],
)
def test_settings_that_fit_together_are_accepted(overrides):
    load_config("default", overrides)


def test_a_plan_has_the_schedule_of_its_configuration():
    def rates(*overrides):
        plan = build_plan(load_config("default", ["train.epochs=10", "optim.lr=0.7", *overrides]), 7)
        assert plan.steps == 70
        return [plan.lr(s) for s in range(70)]

    assert rates("optim.warmup_epochs=0.5") == rates("optim.warmup_iterations=4") == ours(70, 4, schedule="cosine")
    assert rates("optim.schedule=step", "optim.milestones=[0.3]", "optim.gamma=0.5") == ours(
        70, 0, schedule="step", milestones=(0.3,), gamma=0.5
    )
