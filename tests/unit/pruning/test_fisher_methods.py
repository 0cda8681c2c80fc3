"""obs_diag, obs_block and fishleg as pruning methods, against explicit matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hpc_supcon.errors import NonFinite
from hpc_supcon.pruning import (
    Categorical,
    FisherSettings,
    FisherTask,
    PruneTask,
    build_masks,
    contrastive_outputs,
    score_weights,
)

ROWS, INPUTS, CLASSES = 240, 7, 4


class Case:
    """A linear encoder whose outputs are the logits: F is known."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        self.encoder = nn.Linear(INPUTS, CLASSES).double()
        self.x = torch.randn(ROWS, INPUTS).double() @ torch.randn(INPUTS, INPUTS).double()
        self.y = torch.randint(CLASSES, (ROWS,))
        self.said = []
        self.settings = FisherSettings(**settings)

    def outputs(self, parameters, x):
        return functional_call(self.encoder, dict(parameters), (x,))

    def batch(self, index):
        rows = torch.arange(index * 24, index * 24 + 24) % ROWS
        return self.x[rows], self.y[rows]

    def task(self, **changes):
        fisher = FisherTask(
            self.encoder, self.outputs, Categorical(), self.batch, independent=True, settings=self.settings,
            tell=self.said.append, **changes,
        )  # fmt: skip
        return PruneTask({"weight": self.encoder.weight}, 3, fisher=fisher)

    def gradients(self):
        """Of each row's negative log-likelihood of its label, [ROWS, CLASSES, INPUTS]."""
        error = self.outputs({}, self.x).softmax(1) - nn.functional.one_hot(self.y, CLASSES)
        return (error[:, :, None] * self.x[:, None, :]).detach()


def test_scores_of_the_diagonal_are_those_of_optimal_brain_damage_and_nothing_else_changes():
    case = Case(kind="empirical", damping=0.01, samples=ROWS)
    scored = score_weights("obs_diag", case.task())
    w = case.encoder.weight.detach()
    want = w.square() * (case.gradients().square().mean(0) + 0.01) / 2
    torch.testing.assert_close(scored.scores["weight"], want, rtol=1e-9, atol=0)
    keep = build_masks(scored.scores, 0.5, "global")
    assert torch.equal(scored.compensate(keep)["weight"], w * keep["weight"])


def test_blocks_of_a_row_give_the_exact_surgeons_scores_and_change():
    case = Case(kind="empirical", damping=0.01, samples=ROWS, block=INPUTS)
    scored = score_weights("obs_block", case.task())
    w, g = case.encoder.weight.detach(), case.gradients()
    keep = build_masks(scored.scores, 0.5, "global")["weight"]
    got = scored.compensate({"weight": keep})["weight"]
    for k in range(CLASSES):
        q = torch.linalg.inv(g[:, k].T @ g[:, k] / ROWS + 0.01 * torch.eye(INPUTS).double())
        torch.testing.assert_close(scored.scores["weight"][k], w[k].square() / (2 * q.diagonal()), rtol=1e-7, atol=0)
        removed = ~keep[k]
        change = q[:, removed] @ torch.linalg.solve(q[removed][:, removed], w[k][removed])
        want = torch.where(keep[k], w[k] - change, 0)
        torch.testing.assert_close(got[k], want, rtol=1e-6, atol=1e-9)


def test_the_number_of_single_gradients_is_the_setting():
    counted = []
    case = Case(samples=50, block=3, damping=0.1)

    def outputs(parameters, x):
        counted.append(len(x))
        return case.outputs(parameters, x)

    fisher = FisherTask(case.encoder, outputs, Categorical(), case.batch, independent=True, settings=case.settings)
    score_weights("obs_block", PruneTask({"weight": case.encoder.weight}, 3, fisher=fisher))
    assert [n for n in counted if n > 1] == [24, 24, 2]


def test_the_default_damping_is_the_mean_of_the_diagonal():
    case = Case(kind="empirical")
    score_weights("obs_diag", case.task())
    mean = case.gradients().square().mean()
    (line,) = case.said
    assert "Fisher matrix in blocks of 1: 0.0 MB" in line
    # its estimate is of mean gradients of batches, times their rows
    assert 0.3 * mean < float(line.rpartition(" ")[2]) < 3 * mean


def test_fishleg_decides_as_the_exact_surgeon_and_changes_the_bias_too():
    case = Case(steps=300, lr=0.05)
    scored = score_weights("fishleg", case.task())
    p = case.outputs({}, case.x).softmax(1).detach()
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    x = torch.cat([case.x, torch.ones(ROWS, 1).double()], 1)
    f = torch.einsum("na,nkl,nb->kalb", x, metric, x) / ROWS
    size = CLASSES * (INPUTS + 1)
    q = torch.linalg.inv(f.reshape(size, size) + scored.learned.damping * torch.eye(size).double())
    diagonal = q.diagonal().view(CLASSES, INPUTS + 1)[:, :-1]
    want = case.encoder.weight.detach().square() / (2 * diagonal)
    a, b = (build_masks({"weight": s}, 0.5, "global")["weight"] for s in (scored.scores["weight"], want))
    assert (a == b).double().mean() > 0.9
    changed = scored.compensate({"weight": a})
    assert set(changed) == {"weight", "bias"}
    assert not torch.equal(changed["bias"], case.encoder.bias)
    assert "of 300 steps done" in case.said[-1]


@pytest.mark.parametrize("method", ["obs_diag", "obs_block", "fishleg"])
def test_weights_that_are_pruned_already_stay_so_and_are_not_compensated_for(method):
    case = Case(steps=5, samples=ROWS)
    with torch.no_grad():
        case.encoder.weight[:, 2] = 0
    scored = score_weights(method, case.task())
    keep = build_masks(scored.scores, 4 / 28, "global")
    assert not keep["weight"][:, 2].any()
    assert keep["weight"].sum() == 24
    new = scored.compensate(keep)
    torch.testing.assert_close(new["weight"], case.encoder.weight.detach(), rtol=1e-12, atol=0)


def test_the_next_round_goes_on_from_the_inverse_with_half_the_steps():
    case = Case(steps=11)
    first = score_weights("fishleg", case.task())
    damping = first.learned.damping
    keep = build_masks(first.scores, 0.4, "global")
    with torch.no_grad():
        case.encoder.weight *= keep["weight"]
    second = score_weights("fishleg", case.task(learned=first.learned))
    assert second.learned.damping == damping
    assert (second.learned.diagonal()["weight"][~keep["weight"]] == 0).all()
    assert second.learned.steps == 6
    assert "0 of 6 steps done" in case.said[-1]


def test_a_contrastive_likelihood_has_gradients_of_batches():
    case = Case(samples=1, batches=9, damping=0.1)
    used = []

    def outputs(parameters, x):
        return contrastive_outputs(case.outputs(parameters, x), 0.2)

    def batch(index):
        used.append(index)
        return case.batch(index)

    fisher = FisherTask(case.encoder, outputs, Categorical(), batch, independent=False, settings=case.settings)
    scored = score_weights("obs_block", PruneTask({"weight": case.encoder.weight}, 3, fisher=fisher))
    assert used == list(range(9))
    assert (scored.scores["weight"] > 0).all()


def test_a_fisher_matrix_of_nothing_or_nan_is_a_named_error():
    case = Case(samples=ROWS)
    case.x.zero_()
    with pytest.raises(NonFinite, match="the Fisher matrix is 0"):
        score_weights("obs_diag", case.task())
    case.x.fill_(torch.nan)
    for method in ("obs_block", "fishleg"):
        with pytest.raises(NonFinite, match="diagonal is nan: weights or images are not finite"):
            score_weights(method, case.task())


class Cube(torch.autograd.Function):
    """Has no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_a_model_without_forward_derivatives_is_measured_by_differences():
    case = Case(steps=3, damping=1.0)
    found = []
    for function in (Cube.apply, lambda x: x**3):
        fisher = FisherTask(
            case.encoder, lambda p, x, f=function: f(case.outputs(p, x) / 4), Categorical(), case.batch,
            independent=True, settings=case.settings, tell=case.said.append,
        )  # fmt: skip
        found.append(score_weights("fishleg", PruneTask({"weight": case.encoder.weight}, 3, fisher=fisher)).scores)
    assert sum("by differences" in line for line in case.said) == 1
    torch.testing.assert_close(*(scores["weight"] for scores in found), rtol=1e-5, atol=0)
