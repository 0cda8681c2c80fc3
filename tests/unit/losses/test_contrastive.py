"""The contrastive losses against the papers' formulas: every loss, backend, dtype and shape of batch."""

from __future__ import annotations

import math

import pytest
import torch

from hpc_supcon import losses
from hpc_supcon.errors import ConfigError, LossInputError
from hpc_supcon.losses import pairwise
from tests import brute_force

K1, K2 = 50.0, 1.5


def per_anchor(form, stats):
    if form == "out":
        return torch.logaddexp(stats.log_pos, stats.log_neg) - stats.mean_pos
    if form == "in":
        return torch.logaddexp(stats.log_pos, stats.log_neg) - stats.log_pos + stats.n_pos.clamp(min=1).log()
    if form == "tcl":
        terms = [stats.log_pos, stats.log_inv + math.log(K1), stats.log_neg + math.log(K2)]
        return torch.logsumexp(torch.stack(terms), 0) - stats.mean_pos
    return stats.log_neg - stats.mean_pos


def value_and_gradient(form, x, labels, tau, backend, tile_size=16, queue=None, keys=None):
    x = x.detach().clone().requires_grad_()
    stats = losses.pairwise_stats(
        x,
        labels,
        tau,
        inverse=form == "tcl",
        backend=backend,
        tile_size=tile_size,
        queue=queue,
        keys=keys,
        precision="fp32",
    )
    loss = losses.global_mean(per_anchor(form, stats), stats.valid)
    loss.backward()
    return loss.detach(), x.grad


def batch(case, dtype=torch.float64, d=5):
    """features [B, V, D] and labels [B] of a named kind of batch."""
    images, views, labels = {
        "one row": (1, 1, [4]),
        "two rows of a class": (2, 1, [4, 4]),
        "one image of five views": (1, 5, [0]),
        "one class only": (23, 1, [7] * 23),
        "all classes different": (13, 2, list(range(13))),
        "singletons among classes": (21, 1, [0, 1, 1, 2, 2, 2, -3, 9, 9, 9, 0, 50, 51, 52, 1, 1, 2, 0, 53, 9, 9]),
        "two classes, three views": (11, 3, [0, 1] * 5 + [1]),
        "duplicate rows": (19, 2, [0, 1, 2] * 6 + [2]),
        "huge label values": (9, 2, [2**62, -(2**62), 5] * 3),
    }[case]
    x = torch.randn(images, views, d, dtype=dtype)
    if case == "duplicate rows":
        x[5:10] = x[0]
        x[11] = x[12]
    return x, torch.tensor(labels)


CASES = [
    "one row",
    "two rows of a class",
    "one image of five views",
    "one class only",
    "all classes different",
    "singletons among classes",
    "two classes, three views",
    "duplicate rows",
    "huge label values",
]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_papers_formulas(case):
    x, labels = batch(case)
    single = x.float()
    for form in ("out", "in", "tcl") + (("decoupled",) if case not in ("one class only",) else ()):
        for tau in (0.01, 0.1, 1.0):
            if form == "decoupled" and case in ("one row", "two rows of a class", "one image of five views"):
                continue
            value, grad = brute_force.value_and_gradient(x, labels, tau, form, K1, K2)
            rounded = brute_force.value_and_gradient(single, labels, tau, form, K1, K2)
            for backend in ("reference", "tiled"):
                got = value_and_gradient(form, x, labels, tau, backend)
                assert_close(got, (value, grad), 1e-10, f"{form} {tau} {backend}")
            assert_close(value_and_gradient(form, single, labels, tau, "tiled"), rounded, 1e-5, f"{form} {tau} fp32")


def assert_close(got, expected, tolerance, what=""):
    """Relative to the larger of the value and 1, and to the largest entry of the gradient."""
    value, grad = got[0].double(), got[1].double()
    assert torch.isfinite(grad).all(), what
    scale = max(1.0, abs(float(expected[0])))
    assert abs(float(value - expected[0])) <= tolerance * scale, what
    size = float(expected[1].abs().max())
    # A gradient that is zero by symmetry is the rounding error of terms of size 1 / tau.
    assert float((grad - expected[1]).abs().max()) <= tolerance * max(size, 0.1), what


@pytest.mark.parametrize("tile_size", [1, 3, 7, 16, 64])
def test_the_result_does_not_depend_on_the_tile_size(tile_size):
    x, labels = batch("singletons among classes")
    expected = value_and_gradient("tcl", x, labels, 0.1, "reference")
    assert_close(value_and_gradient("tcl", x, labels, 0.1, "tiled", tile_size), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0])
def test_half_precision_features_are_computed_in_fp32(dtype, tau):
    x, labels = batch("two classes, three views")
    x = x.to(dtype)
    expected, grad = brute_force.value_and_gradient(x, labels, tau, "out")
    value, got = value_and_gradient("out", x, labels, tau, "tiled")
    assert value.dtype in (torch.float32, torch.float64)
    assert float(value) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-3 * float(grad.abs().max())
    )


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_global_mean_and_its_gradient_have_the_dtype_of_the_anchors(dtype, gather):
    per_anchor = torch.randn(6, dtype=dtype, requires_grad=True)
    loss = losses.global_mean(per_anchor, torch.arange(6) < 4, gather=gather)
    (grad,) = torch.autograd.grad(loss, per_anchor)
    assert (loss.dtype, grad.dtype) == (dtype, dtype)
    torch.testing.assert_close(loss, per_anchor[:4].sum() / 4)
    torch.testing.assert_close(grad, torch.tensor([0.25] * 4 + [0.0] * 2, dtype=dtype))


def test_a_loss_written_with_the_statistics_of_fp32_features_is_fp32():
    stats = losses.pairwise_stats(torch.randn(12, 4), torch.arange(12) % 3, 0.1)
    assert losses.global_mean(stats.log_neg - stats.mean_pos, stats.valid).dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_autocast_around_a_loss_changes_nothing(backend):
    x, labels = batch("two classes, three views", torch.float32)
    expected = value_and_gradient("out", x, labels, 0.05, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradient("out", x, labels, 0.05, backend)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_loss_modules_compute_the_papers_formulas():
    x, labels = batch("duplicate rows")
    image = torch.arange(len(labels))
    pairs = [
        (losses.SupConLoss(0.2), (0.2, "out"), labels),
        (losses.SupConLoss(0.2, form="in"), (0.2, "in"), labels),
        (losses.TCLLoss(0.2), (0.2, "tcl", 5000.0, 1.0), labels),
        (losses.TCLLoss(0.2, k1=0, k2=0), (0.2, "tcl", 0.0, 0.0), labels),
        (losses.TCLLoss(0.2, k1=3.0, k2=0), (0.2, "tcl", 3.0, 0.0), labels),
        (losses.SimCLRLoss(0.2), (0.2, "out"), image),
    ]
    for module, arguments, oracle_labels in pairs:
        expected = float(brute_force.contrastive(x, oracle_labels, *arguments))
        for backend in ("reference", "tiled"):
            module.backend = backend
            assert float(module(x, labels)) == pytest.approx(expected, rel=1e-10)


def test_tcl_with_k1_zero_and_k2_one_is_supcon():
    x, labels = batch("singletons among classes")
    assert float(losses.TCLLoss(0.1, k1=0, k2=1)(x, labels)) == pytest.approx(
        float(losses.SupConLoss(0.1)(x, labels))
    )


def test_without_labels_the_views_of_an_image_are_its_positives():
    x, labels = batch("all classes different")
    assert float(losses.SupConLoss(0.1)(x)) == pytest.approx(float(losses.SupConLoss(0.1)(x, labels)), rel=1e-12)


def test_flat_rows_and_views_are_the_same_batch():
    x, labels = batch("two classes, three views")
    flat = losses.SupConLoss(0.1)(x.flatten(0, 1), labels.repeat_interleave(3))
    assert float(flat) == pytest.approx(float(losses.SupConLoss(0.1)(x, labels)), rel=1e-12)


def test_the_loss_is_invariant_to_scaling_from_1e_minus_20_to_1e30():
    x, labels = batch("two classes, three views", torch.float32)
    expected = value_and_gradient("out", x, labels, 0.1, "tiled")
    for factor in (1e-20, 1e-3, 1e30):
        value, grad = value_and_gradient("out", x * factor, labels, 0.1, "tiled")
        assert_close((value, grad * factor), expected, 1e-5)


def test_zero_rows_give_finite_values_and_gradients():
    x, labels = batch("two classes, three views", torch.float32)
    x[3], x[0, 1] = 0.0, 0.0
    for backend in ("reference", "tiled"):
        for form in ("out", "in", "tcl"):
            value, grad = value_and_gradient(form, x, labels, 0.1, backend)
            assert torch.isfinite(value)
            assert torch.isfinite(grad).all()
            assert float(grad.abs().max()) < 1e3


def test_without_any_positive_the_loss_is_a_differentiable_zero():
    for backend in ("reference", "tiled"):
        for n in (0, 1, 6):
            value, grad = value_and_gradient("out", torch.randn(n, 4), torch.arange(n), 0.1, backend)
            assert float(value) == 0.0
            assert torch.equal(grad, torch.zeros(n, 4))


def test_a_formula_that_is_infinite_for_invalid_anchors_gives_no_nan():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2, 2, 3])
    for backend in ("reference", "tiled"):
        stats = losses.pairwise_stats(x, labels, 0.1, backend=backend)
        formula = stats.log_neg - stats.mean_pos + (stats.log_pos - stats.log_pos.detach()).exp().log()
        (grad,) = torch.autograd.grad(losses.global_mean(formula, stats.valid), x)
        assert torch.isfinite(grad).all()


def test_anchors_without_positives_have_gradients_where_a_loss_uses_them():
    """A loss over the negatives of all rows (uniformity) is valid: only non-finite gradients are set to zero."""
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2, 2, 3])
    all_rows = torch.ones(6, dtype=torch.bool)
    grads = [
        torch.autograd.grad(
            losses.global_mean(losses.pairwise_stats(x, labels, 0.1, backend=b).log_neg, all_rows), x
        )[0]
        for b in ("reference", "tiled")
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-12)


def test_queue_rows_are_compared_with_but_receive_no_gradient():
    x, labels = batch("two classes, three views")
    past = torch.randn(17, 5, dtype=torch.float64, requires_grad=True)
    past_labels = torch.arange(17) % 3
    for form in ("out", "in", "tcl"):
        expected = brute_force.value_and_gradient(x, labels, 0.1, form, K1, K2, (past, past_labels))
        for backend in ("reference", "tiled"):
            got = value_and_gradient(form, x, labels, 0.1, backend, 8, (past, past_labels))
            assert_close(got, expected, 1e-10)
    assert past.grad is None


def test_rows_of_a_queue_without_labels_are_negatives():
    x, labels = batch("two classes, three views")
    past = torch.randn(17, 5, dtype=torch.float64)
    expected = brute_force.contrastive(x, labels, 0.1, queue=(past, torch.full((17,), 99)))
    for backend in ("reference", "tiled"):
        loss = losses.SupConLoss(0.1, backend=backend)(x, labels, queue=(past, None))
        assert float(loss) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("case", ["two classes, three views", "one image of five views", "all classes different"])
def test_anchors_are_compared_with_the_keys_of_others_and_never_with_their_own(case, labeled, with_queue):
    x, labels = batch(case)
    labels = labels if labeled else None
    keys = torch.randn_like(x).requires_grad_()
    queue = (torch.randn(17, 5, dtype=torch.float64), torch.arange(17) % 3) if with_queue else None
    for form in ("out", "in", "tcl"):
        expected = brute_force.value_and_gradient(x, labels, 0.1, form, K1, K2, queue, keys)
        for backend in ("reference", "tiled"):
            assert_close(value_and_gradient(form, x, labels, 0.1, backend, 8, queue, keys), expected, 1e-10)
    assert keys.grad is None


def test_every_loss_takes_keys():
    x, labels = batch("two classes, three views")
    keys = torch.randn_like(x)
    for loss, form, given in (
        (losses.SupConLoss(0.1), "out", labels),
        (losses.SupConLoss(0.1, form="in"), "in", labels),
        (losses.TCLLoss(0.1, K1, K2), "tcl", labels),
        (losses.SimCLRLoss(0.1), "out", None),
    ):
        expected = brute_force.contrastive(x, given, 0.1, form, K1, K2, keys=keys)
        assert float(loss(x, labels, keys=keys)) == pytest.approx(float(expected), rel=1e-10)


def test_keys_of_another_shape_that_are_not_finite_or_for_triton_are_refused():
    x, labels = batch("two classes, three views")
    with pytest.raises(
        LossInputError, match=r"keys must be .* the shape of the features, \[11, 3, 5\]; got \[11, 2, 5\]"
    ):
        losses.SupConLoss()(x, labels, keys=x[:, :2])
    with pytest.raises(LossInputError, match="keys hold NaN or Inf in 1 of 33 rows, first in row 0"):
        losses.SupConLoss()(x, labels, keys=x.clone().index_fill_(0, torch.tensor(0), 1.0).masked_fill_(
            torch.arange(33).view(11, 3, 1) == 0, float("nan")))  # fmt: skip
    with pytest.raises(ConfigError, match="'triton' has no keys of another model: use 'tiled' or 'auto'"):
        losses.SupConLoss(backend="triton")(x.float(), labels, keys=x.float())


@pytest.mark.parametrize("columns", ["batch", "queue", "keys", "keys and queue"])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_temperature_receives_its_gradient(backend, columns):
    x, labels = batch("singletons among classes")
    queue = (torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3) if "queue" in columns else None
    keys = torch.randn_like(x) if "keys" in columns else None
    for form in ("out", "in", "tcl"):
        tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        loss = brute_force.contrastive(x, labels, tau, form, K1, K2, queue, keys)
        expected = torch.autograd.grad(loss, tau)[0]
        stats = losses.pairwise_stats(
            x, labels, tau, inverse=form == "tcl", backend=backend, tile_size=8, queue=queue, keys=keys
        )
        loss = losses.global_mean(per_anchor(form, stats), stats.valid)
        (got,) = torch.autograd.grad(loss, tau)
        assert float(got) == pytest.approx(float(expected), rel=1e-10)


def test_a_learnable_temperature_is_a_positive_parameter_and_is_trained():
    x, labels = batch("two classes, three views", torch.float32)
    module = losses.SupConLoss(0.2, learnable_temperature=True)
    assert [name for name, _ in module.named_parameters()] == ["log_temperature"]
    before = float(module(x, labels).detach())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        module(x, labels).backward()
        optimizer.step()
    assert float(module(x, labels).detach()) < before
    assert not list(losses.SupConLoss(0.2).parameters())


def test_base_temperature_is_a_factor_and_off_by_default():
    x, labels = batch("two classes, three views")
    plain = float(losses.SupConLoss(0.1)(x, labels))
    assert float(losses.SupConLoss(0.1, base_temperature=0.07)(x, labels)) == pytest.approx(plain * 0.1 / 0.07)


def test_statistics_count_anchors_without_positives():
    module = losses.SupConLoss(0.1)
    module(torch.randn(7, 4), torch.tensor([0, 0, 0, 1, 1, 2, 3]))
    assert float(module.stats["anchors_without_positives"]) == 2
    assert float(module.stats["mean_positives"]) == pytest.approx((3 * 2 + 2 * 1) / 7)


def test_auto_is_the_dense_backend_for_small_batches_and_the_tiled_one_for_large_ones():
    def chosen(n, queue=0, tau=0.1):
        anchors = pairwise.prepare_anchors(torch.randn(n, 2), torch.zeros(n, dtype=torch.int64))
        anchors = pairwise.Anchors(anchors.rows, anchors.labels, anchors.rows_per_rank, queue)
        return pairwise.choose_backend("auto", anchors, anchors.rows, tau)

    assert chosen(128) == "reference"
    assert chosen(129) == "tiled"
    assert chosen(100, queue=4096) == "tiled"


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: losses.SupConLoss(0), "temperature must be positive"),
        (lambda: losses.SupConLoss(-1.0), "temperature must be positive"),
        (lambda: losses.SupConLoss(float("nan")), "temperature must be positive"),
        (lambda: losses.SupConLoss(1e-3), "below 0.002"),
        (lambda: losses.SupConLoss(form="inside"), "known: in, out"),
        (lambda: losses.SupConLoss(base_temperature=0.0), "base_temperature must be positive"),
        (lambda: losses.SupConLoss(backend="titled"), "did you mean 'tiled'"),
        (lambda: losses.SupConLoss(precision="fp8"), "known: auto, bf16, fp32, tf32"),
        (lambda: losses.TCLLoss(k1=-1.0), "k1 must be"),
        (lambda: losses.TCLLoss(k2=float("inf")), "k2 must be"),
    ],
)
def test_invalid_settings_are_refused(make, fragment):
    with pytest.raises(ConfigError, match=fragment):
        make()


def test_triton_is_refused_where_fp32_is_not_precise_enough():
    x, labels = batch("one class only", torch.float32)
    with pytest.raises(ConfigError, match="use 'tiled'"):
        losses.SupConLoss(0.01, backend="triton")(x, labels)
    with pytest.raises(ConfigError, match="float64"):
        losses.SupConLoss(0.1, backend="triton")(x.double(), labels)


@pytest.mark.parametrize(
    ("features", "labels", "fragment"),
    [
        (torch.randn(4), torch.zeros(4, dtype=torch.int64), r"must be \[N, D\] or \[B, V, D\]"),
        (torch.ones(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), "floating point"),
        (torch.randn(4, 3), torch.zeros(3, dtype=torch.int64), "one per image"),
        (torch.randn(4, 2, 3), torch.zeros(8, dtype=torch.int64), "one per image"),
        (torch.randn(4, 3), torch.zeros(4), "integer dtype"),
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.bool), "integer dtype"),
        (torch.randn(4, 3), None, "two views per image"),
        (torch.randn(4, 1, 3), None, "two views per image"),
        (
            torch.tensor([[1.0, 2.0], [3.0, float("nan")]]),
            torch.tensor([0, 0]),
            "NaN or Inf in 1 of 2 rows, first in row 1",
        ),
        (torch.tensor([[float("inf"), 2.0], [3.0, 1.0]]), torch.tensor([0, 0]), "first in row 0"),
    ],
)
def test_invalid_input_is_refused(features, labels, fragment):
    for loss in (losses.SupConLoss(), losses.TripletLoss()):
        with pytest.raises(LossInputError, match=fragment):
            loss(features, labels)


def test_a_queue_of_another_feature_dimension_is_refused():
    with pytest.raises(LossInputError, match=r"queue features must be \[Q, 4\]"):
        losses.SupConLoss()(torch.randn(2, 4), torch.tensor([0, 0]), queue=(torch.randn(3, 5), torch.zeros(3).long()))
    with pytest.raises(LossInputError, match="queue labels"):
        losses.SupConLoss()(torch.randn(2, 4), torch.tensor([0, 0]), queue=(torch.randn(3, 4), torch.zeros(3)))


def test_without_validation_values_are_not_checked():
    x = torch.full((2, 3), float("nan"))
    assert torch.isnan(losses.SupConLoss(validate=False)(x, torch.tensor([0, 0])))


def test_a_large_batch_agrees_with_the_dense_backend_in_both_precisions():
    x, labels = torch.randn(1100, 16), torch.randint(0, 9, (1100,))
    expected = value_and_gradient("tcl", x.double(), labels, 0.07, "reference")
    assert_close(value_and_gradient("tcl", x.double(), labels, 0.07, "tiled", 512), expected, 1e-10)
    assert_close(value_and_gradient("tcl", x, labels, 0.07, "tiled", 512), expected, 1e-5)
