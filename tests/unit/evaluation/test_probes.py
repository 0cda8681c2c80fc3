"""Training of probes against scikit-learn and plain loops; the registry of probes."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from hpc_supcon.config import load_config
from hpc_supcon.evaluation.features import Standardize, select_classes
from hpc_supcon.evaluation.fitted_probe import build_probe
from hpc_supcon.evaluation.probes import PROBES
from hpc_supcon.evaluation.probes.optimization import FitPlan, FitProgress, batches, best_head, steps_per_epoch
from hpc_supcon.evaluation.probes.training import evaluate_heads, seeded, train_heads
from hpc_supcon.models import LinearHeads, Logistic, Mlp, SingleHead

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    x, y = torch.from_numpy(x).float()[rows] / 16, torch.from_numpy(y).long()[rows]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def accuracy(head, rows):
    return float((head(rows[0]).argmax(1) == rows[1]).double().mean())


def sklearn_model(train, l2_lambda):
    """Minimizes mean cross-entropy + l2_lambda * ||W||^2, W without biases: C = 1 / (2 n l2_lambda)."""
    model = LogisticRegression(C=1 / (2 * len(train[0]) * l2_lambda), max_iter=5000, tol=1e-8)
    return model.fit(train[0].double().numpy(), train[1].numpy())


@pytest.mark.parametrize("heads", [partial(LinearHeads, 1, 64, 10), partial(LinearHeads, 2, 64, 10)])
def test_softmax_regression_equals_scikit_learn(digits, heads):
    train, test = digits
    heads, l2_lambda = heads(), 1e-2
    lrs = (0.1, 0.05)[: len(heads.weights)]
    train_heads(
        heads, Standardize(64), train, None, FitPlan(lrs, epochs=600, batch_size=1200, l2_lambda=l2_lambda), seed=0
    )
    want = sklearn_model(train, l2_lambda)
    for k in range(len(lrs)):
        got = heads.one(k)
        assert abs(accuracy(got, test) - want.score(test[0].double().numpy(), test[1].numpy())) <= 0.003
        torch.testing.assert_close(got.weight.detach().double(), torch.from_numpy(want.coef_), atol=2e-3, rtol=0)


def test_logistic_regression_of_two_classes_equals_scikit_learn(digits):
    train, test = (select_classes(rows, (8, 3)) for rows in digits)
    assert set(train[1].tolist()) == {0, 1}
    assert torch.equal(test[1], (digits[1][1][(digits[1][1] == 3) | (digits[1][1] == 8)] == 3).long())
    plan = FitPlan((0.1,), epochs=1500, batch_size=10_000, l2_lambda=1e-2)
    got = train_heads(SingleHead(Logistic(64)), Standardize(64), train, None, plan, seed=0).head
    want = sklearn_model(train, 1e-2)
    assert abs(accuracy(got, test) - want.score(test[0].double().numpy(), test[1].numpy())) <= 0.003
    torch.testing.assert_close(got.linear.weight.detach().double(), torch.from_numpy(want.coef_), atol=2e-3, rtol=0)
    torch.testing.assert_close(
        got.linear.bias.detach().double(), torch.from_numpy(want.intercept_), atol=2e-3, rtol=0
    )
    probabilities = got(test[0]).softmax(1).detach().double()
    torch.testing.assert_close(
        probabilities, torch.from_numpy(want.predict_proba(test[0].double().numpy())), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(("l2_lambda", "clip_norm"), [(0.2, None), (0.0, 0.5), (0.1, 0.3)])
def test_l2_and_clipping_follow_a_plain_loop(digits, l2_lambda, clip_norm):
    x, y = (part[:100].double() if part.is_floating_point() else part[:100] for part in digits[0])
    plan = FitPlan(
        (0.5,), epochs=1, iterations=7, batch_size=100, optimizer="sgd", schedule="constant", l2_lambda=l2_lambda,
        clip_norm=clip_norm,
    )  # fmt: skip
    got = train_heads(LinearHeads(1, 64, 10).double(), Standardize(64).double(), (x, y), None, plan, seed=0).head
    weight, bias = torch.zeros(64, 10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for _ in range(7):
        p = (x @ weight + bias).softmax(1)
        error = (p - F.one_hot(y, 10)) / len(x)
        grad_w, grad_b = x.T @ error + 2 * l2_lambda * weight, error.sum(0)
        if clip_norm is not None:
            norm = math.sqrt(float(grad_w.square().sum() + grad_b.square().sum()))
            scale = min(1.0, clip_norm / (norm + 1e-6))
            grad_w, grad_b = grad_w * scale, grad_b * scale
        speed_w, speed_b = 0.9 * speed_w + grad_w, 0.9 * speed_b + grad_b
        weight, bias = weight - 0.5 * speed_w, bias - 0.5 * speed_b
    torch.testing.assert_close(got.weight.detach(), weight.T, atol=1e-9, rtol=0)
    torch.testing.assert_close(got.bias.detach(), bias, atol=1e-9, rtol=0)


def test_each_head_is_clipped_separately_and_trained_as_if_it_were_alone(digits):
    train = digits[0]
    plan = {"epochs": 2, "batch_size": 256, "optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 0.1}
    both = LinearHeads(2, 64, 10)
    train_heads(both, Standardize(64), train, None, FitPlan((0.1, 1e-3), **plan, l2_lambda=0.05), seed=0)
    alone = LinearHeads(1, 64, 10)
    train_heads(alone, Standardize(64), train, None, FitPlan((1e-3,), **plan, l2_lambda=0.05), seed=0)
    for got, want in zip(both.head_parameters(1), alone.head_parameters(0), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_training_by_iterations_equals_training_by_epochs(digits):
    train, test = digits
    settings = {"batch_size": 500, "optimizer": "adam"}
    assert steps_per_epoch(1200, 500) == 3
    by_epoch = train_heads(
        LinearHeads(1, 64, 10), Standardize(64), train, test, FitPlan((0.01,), 4, **settings), seed=3
    )
    plan = FitPlan((0.01,), 99, iterations=12, evaluate_every=3, **settings)
    by_iteration = train_heads(LinearHeads(1, 64, 10), Standardize(64), train, test, plan, seed=3)
    assert torch.equal(by_epoch.head.weight, by_iteration.head.weight)
    assert by_epoch.history == by_iteration.history
    assert [line["iteration"] for line in by_epoch.history] == [3, 6, 9, 12]
    assert by_epoch.iterations == by_iteration.iterations == 12


@pytest.mark.parametrize(("n", "size"), [(10, 3), (10, 4), (1, 5), (7, 7), (5, 1), (8, 7), (2, 1)])
def test_batches_have_every_row_once_an_epoch_and_none_has_a_single_row(n, size):
    k = steps_per_epoch(n, size)
    stream = batches(n, size, torch.Generator().manual_seed(0))
    epochs = [[next(stream) for _ in range(k)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == list(range(n))
        assert all(len(rows) <= size + (size > 1) for rows in epoch)
        assert n == 1 or size == 1 or all(len(rows) > 1 for rows in epoch)


def overfitting_case():
    """Labels of validation are inverted, so that its scores are best early and become worse step by step."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.randint(2, (60,))
    return (x, y), (x[:20], 1 - y[:20])


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
def test_the_best_state_is_kept_when_the_last_is_worse(monitor):
    train, validation = overfitting_case()
    heads = LinearHeads(1, 5, 2)
    plan = FitPlan((0.1,), epochs=30, batch_size=60, schedule="constant", monitor=monitor)
    trained = train_heads(heads, Standardize(5), train, validation, plan, seed=0)
    values = [line[f"validation_{monitor}"] for line in trained.history]
    best = min(values) if monitor == "loss" else max(values)
    assert values[-1] != best
    assert trained.iteration == values.index(best) + 1 < trained.iterations == 30
    loss, right = evaluate_heads(SingleHead(trained.head), validation)[:, 0].tolist()
    assert best == pytest.approx(loss if monitor == "loss" else right, rel=1e-6)


def test_patience_and_target_stop_training_as_defined():
    train, validation = overfitting_case()
    settings = {"epochs": 30, "batch_size": 60, "schedule": "constant", "monitor": "loss"}
    whole = train_heads(LinearHeads(1, 5, 2), Standardize(5), train, validation, FitPlan((0.1,), **settings), seed=0)
    plan = FitPlan((0.1,), **settings, stopping={"patience": 4})
    stopped = train_heads(LinearHeads(1, 5, 2), Standardize(5), train, validation, plan, seed=0)
    assert stopped.iterations == whole.iteration + 4 < 30
    assert torch.equal(stopped.head.weight, whole.head.weight)
    assert stopped.history == whole.history[: len(stopped.history)]
    target = whole.history[2]["validation_loss"]
    plan = FitPlan((0.1,), **settings, stopping={"target": target})
    stopped = train_heads(LinearHeads(1, 5, 2), Standardize(5), train, validation, plan, seed=0)
    values = [line["validation_loss"] for line in whole.history]
    assert stopped.iterations == next(i for i, v in enumerate(values, 1) if v <= target)


def test_the_state_of_an_improvement_below_min_change_is_kept():
    progress = FitProgress(FitPlan((1.0,), 10, 1, stopping={"patience": 2, "min_change": 0.1}), 1)
    assert [progress.record(i, v) for i, v in enumerate([0.5, 0.55, 0.58], 1)] == [True, True, True]
    assert progress.stop


@pytest.mark.parametrize(
    ("losses", "accuracies", "monitor", "want"),
    [
        ([1.0, 0.5, 0.5], [0.1, 0.2, 0.3], "loss", (1, 0.5)),
        ([1.0, 0.5, 0.5], [0.1, 0.3, 0.3], "accuracy", (1, 0.3)),
        ([math.nan, 2.0, math.inf], [0.9, 0.1, 0.8], "accuracy", (1, 0.1)),
        ([math.nan, 2.0, 3.0], [0.9, 0.1, 0.8], "loss", (1, 2.0)),
    ],
)
def test_the_best_head_is_the_first_of_the_best_and_never_one_that_diverged(losses, accuracies, monitor, want):
    assert (
        best_head(torch.tensor(losses, dtype=torch.float64), torch.tensor(accuracies, dtype=torch.float64), monitor)
        == want
    )


def test_an_mlp_has_the_parameters_of_its_layers():
    assert sum(p.numel() for p in Mlp(512, [512], 10, batch_norm=False, dropout=0.0).parameters()) == 262_656 + 5_130
    whole = Mlp(128, [512, 256], 10, batch_norm=True, dropout=0.3)
    linear = [m for m in whole if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(512, 128), (256, 512), (10, 256)]
    kinds = [type(m).__name__ for m in whole]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]


def test_an_mlp_learns_what_a_linear_head_cannot_and_dropout_depends_on_the_seed():
    torch.manual_seed(1)
    x = torch.rand(401, 2) * 2 - 1
    train = (x, (x[:, 0] * x[:, 1] > 0).long())

    def fit():
        with seeded(5, CPU):
            head = SingleHead(Mlp(2, [64, 32], 2, batch_norm=True, dropout=0.1))
            return train_heads(head, Standardize(2), train, train, FitPlan((0.01,), 40, 100), seed=5)

    before = torch.get_rng_state()
    first, second = fit(), fit()
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is unchanged"
    assert accuracy(first.head, train) > 0.95
    for got, want in zip(first.head.state_dict().values(), second.head.state_dict().values(), strict=True):
        assert torch.equal(got, want)


def test_inputs_are_the_default_of_the_kind_unless_the_settings_say_otherwise():
    default = load_config()
    inputs = {kind: default.probe.input_of(kind) for kind in PROBES}
    assert inputs == {
        "linear": "features", "softmax": "pixels", "logistic": "pixels", "mlp": "features", "knn": "features",
        "finetune": "images",
    }  # fmt: skip
    for kind in PROBES:
        config = load_config("default", [f"probe.kind={kind}"])
        assert config.probe.needs_encoder == (inputs[kind] != "pixels")
        if kind == "finetune":
            continue
        for chosen in ("features", "pixels"):
            config = load_config("default", [f"probe.kind={kind}", f"probe.{kind}.input={chosen}"])
            assert config.probe.input_of(kind) == chosen
            assert config.probe.needs_encoder == (chosen == "features")
    assert load_config("default", ["probe.kind=[softmax, knn]"]).probe.needs_encoder


def test_every_probe_has_a_section_of_the_configuration_and_no_section_is_without_a_probe():
    others = {"kind", "options", "corruptions", "corruption_images", "embedding", "ood", "transfer"}
    assert set(PROBES) == set(type(load_config().probe).model_fields) - others


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_is_built_again_from_its_description(kind):
    options = {
        "mlp": {"hidden": [4], "batch_norm": True, "dropout": 0.1},
        "knn": {"rows": 9, "k": 2, "temperature": 0.1},
    }.get(kind, {})
    classes = ["a", "b"] if kind == "logistic" else ["a", "b", "c"]
    encoder = {"name": "conv", "in_channels": 1, "image_size": 8, "stem": "auto", "out_dim": 6, "input_size": None}
    description = {
        "kind": kind, "input": "images" if kind == "finetune" else "features", "classes": classes,
        "normalization": {"mean": [0.5], "std": [0.5]}, "standardize": False, "in_dim": 6,
        "encoder": encoder if kind == "finetune" else None, "head": {"name": "any", "options": options},
    }  # fmt: skip
    x = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8) if kind == "finetune" else torch.randn(5, 6)
    assert build_probe(description).logits(x).shape == (5, len(classes))
