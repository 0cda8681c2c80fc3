"""Optimizers against the papers' formulas in plain loops, and without synchronization of device and host."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_supcon.errors import ConfigError
from hpc_supcon.models import build_encoder
from hpc_supcon.training.engine.base import clip_gradients
from hpc_supcon.training.optim import build_optimizer, set_learning_rate
from tests.devices import needs_cuda

SHAPES = [(4, 3), (2, 3, 3, 3), (5, 1, 1, 1), (3, 2), (7, 2), (4,), (1,), ()]
ZERO_WEIGHT, ZERO_GRADIENT, SOMETIMES, SOMETIMES_TOO = 3, 4, 1, 5


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    values[ZERO_WEIGHT].zero_()
    return [nn.Parameter(v) for v in values]


def gradients(step):
    """One gradient for each parameter; None where a parameter has none in a step (the first one among them)."""
    generator = torch.Generator().manual_seed(100 + step)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    grads[ZERO_GRADIENT].zero_()
    if step < 2:
        grads[ZERO_WEIGHT].zero_()
    for k in (SOMETIMES, SOMETIMES_TOO):
        if (step + k) % 3 == 1:
            grads[k] = None
    return grads


def rate(step):
    return 0.3 * (1 + math.cos(step / 5))


def run(params, optimizer, steps=range(24)):
    for step in steps:
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = None if g is None else g.to(p.dtype)
        set_learning_rate(optimizer, rate(step))
        optimizer.step()
    return [p.detach().clone() for p in params]


def norm(x):
    return math.sqrt(sum(v * v for v in x.flatten().tolist()))


def gradients_of_all_steps():
    """(step, position of the parameter, its gradient), of those that have one."""
    for step in range(24):
        for k, g in enumerate(gradients(step)):
            if g is not None:
                yield step, k, g


def lars_reference(momentum, nesterov, decay, eta, eps, clip=False):
    weights = [p.detach() for p in parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    for step, k, g in gradients_of_all_steps():
        w, ratio, b = weights[k], 1.0, 0.0
        if w.dim() > 1:
            b = decay
            if norm(w) > 0 and norm(g) > 0:
                ratio = eta * norm(w) / (norm(g) + b * norm(w) + eps)
                if clip and rate(step) > 0:
                    ratio = min(rate(step), ratio) / rate(step)
        u = ratio * (g + b * w)
        velocity[k] = momentum * velocity[k] + u
        weights[k] = w - rate(step) * (u + momentum * velocity[k] if nesterov else velocity[k])
    return weights


class AdamMoments:
    """m / (sqrt(v) + eps) of Adam (Kingma and Ba 2015), bias-corrected."""

    def __init__(self, beta1, beta2, eps):
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.m, self.v, self.t = Counter(), Counter(), Counter()

    def direction(self, k, g):
        self.t[k] += 1
        self.m[k] = self.beta1 * self.m[k] + (1 - self.beta1) * g
        self.v[k] = self.beta2 * self.v[k] + (1 - self.beta2) * g**2
        m, v = self.m[k] / (1 - self.beta1 ** self.t[k]), self.v[k] / (1 - self.beta2 ** self.t[k])
        return m / (v.sqrt() + self.eps)


def lamb_reference(beta1, beta2, decay, eps, clamp):
    weights, moments = [p.detach() for p in parameters()], AdamMoments(beta1, beta2, eps)
    for step, k, g in gradients_of_all_steps():
        w, r, ratio = weights[k], moments.direction(k, g), 1.0
        if w.dim() > 1:
            r = r + decay * w
            size = min(max(norm(w), clamp[0]), clamp[1])
            if size > 0 and norm(r) > 0:
                ratio = size / norm(r)
        weights[k] = w - rate(step) * ratio * r
    return weights


def sgd_reference(momentum, nesterov, decay):
    weights = [p.detach() for p in parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    for step, k, g in gradients_of_all_steps():
        g = g + decay * weights[k] if g.dim() > 1 else g
        velocity[k] = momentum * velocity[k] + g
        weights[k] = weights[k] - rate(step) * (g + momentum * velocity[k] if nesterov else velocity[k])
    return weights


def adamw_reference(beta1, beta2, decay, eps):
    weights, moments = [p.detach() for p in parameters()], AdamMoments(beta1, beta2, eps)
    for step, k, g in gradients_of_all_steps():
        w = weights[k] * (1 - rate(step) * decay) if g.dim() > 1 else weights[k]
        weights[k] = w - rate(step) * moments.direction(k, g)
    return weights


def assert_equal(got, want):
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= 1e-12 * max(1.0, float(b.norm())), k


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
@pytest.mark.parametrize(("decay", "eta", "eps"), [(0.0, 0.001, 0.0), (1e-2, 0.02, 0.0), (1e-4, 1.0, 1e-3)])
def test_lars_equals_the_formula_in_a_loop(momentum, nesterov, decay, eta, eps):
    params = parameters()
    optimizer = build_optimizer(
        params, name="lars", lr=1.0, momentum=momentum, nesterov=nesterov, weight_decay=decay, lars_eta=eta,
        eps=eps or None,
    )  # fmt: skip
    assert_equal(run(params, optimizer), lars_reference(momentum, nesterov, decay, eta, eps))


@pytest.mark.parametrize("nesterov", [False, True])
def test_clipped_lars_takes_the_smaller_of_both_learning_rates(nesterov):
    params = parameters()
    optimizer = build_optimizer(
        params, name="lars", lr=1.0, momentum=0.9, nesterov=nesterov, weight_decay=0.01, lars_eta=0.3, lars_clip=True
    )
    assert_equal(run(params, optimizer), lars_reference(0.9, nesterov, 0.01, 0.3, 0.0, clip=True))


@pytest.mark.parametrize("clamp", [None, (0.0, 1.5), (0.5, 10.0)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.999, 1e-6), (0.0, 0.9, 1e-3)])
def test_lamb_equals_the_formula_in_a_loop(clamp, decay, beta1, beta2, eps):
    params = parameters()
    optimizer = build_optimizer(
        params, name="lamb", lr=1.0, momentum=beta1, beta2=beta2, weight_decay=decay, eps=eps, lamb_norm_range=clamp
    )
    assert_equal(run(params, optimizer), lamb_reference(beta1, beta2, decay, eps, clamp or (0.0, math.inf)))


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_parameters_of_constant_rate_keep_it_and_all_else_is_as_for_the_others(name):
    own, follow = parameters(), parameters()
    settings = {"name": name, "lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = build_optimizer([*own, *follow], **settings, constant=own)
    alone, other = parameters(), parameters()
    constant, scheduled = build_optimizer(alone, **settings), build_optimizer(other, **settings)
    for step in range(4):
        for params in (own, follow, alone, other):
            for k, p in enumerate(params):
                p.grad = torch.full_like(p, 0.1 * (k + 1) - 0.05 * step)
        set_learning_rate(optimizer, 0.5 / (step + 1))
        set_learning_rate(scheduled, 0.5 / (step + 1))
        for each in (optimizer, constant, scheduled):
            each.step()
    own, follow, alone, other = ([p.detach() for p in params] for params in (own, follow, alone, other))
    assert_equal(own, alone)
    assert_equal(follow, other)
    assert not any(torch.equal(a, b) for a, b in zip(own, follow, strict=True))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_sgd_equals_the_formula_in_a_loop(momentum, nesterov):
    params = parameters()
    optimizer = build_optimizer(params, name="sgd", lr=1.0, momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    assert_equal(run(params, optimizer), sgd_reference(momentum, nesterov, 0.01))


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_adamw_equals_the_formula_in_a_loop(eps):
    params = parameters()
    optimizer = build_optimizer(params, name="adamw", lr=1.0, weight_decay=0.1, beta2=0.95, eps=eps)
    assert_equal(run(params, optimizer), adamw_reference(0.9, 0.95, 0.1, eps or 1e-8))


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_without_weights_to_adapt_is_torch_sgd(nesterov):
    results = []
    for name in ("lars", "sgd"):
        params = [p for p in parameters() if p.ndim <= 1]
        optimizer = build_optimizer(params, name=name, lr=1.0, momentum=0.8, nesterov=nesterov, weight_decay=0.1)
        for step in range(20):
            for p, g in zip(
                params, [g for g, s in zip(gradients(step), SHAPES, strict=True) if len(s) <= 1], strict=True
            ):
                p.grad = g
            optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
@pytest.mark.parametrize("decay", ["weights", "all"])
def test_what_decays(name, decay):
    bn, ln, layer = nn.BatchNorm2d(3), nn.LayerNorm(3), nn.Linear(3, 2)
    temperature = nn.Parameter(torch.tensor(0.5))
    params = [*bn.parameters(), *ln.parameters(), *layer.parameters(), temperature]
    before = [p.detach().clone() for p in params]
    optimizer = build_optimizer(params, name=name, lr=0.1, weight_decay=0.5, decay=decay, lars_eta=1.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(params, before, strict=True)]
    # zeros, such as the biases of norms, stay zero
    expected = [p is layer.weight or (decay == "all" and bool(b.any())) for p, b in zip(params, before, strict=True)]
    assert moved == expected


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_a_step_without_any_gradient_changes_nothing(name):
    params = parameters()
    optimizer = build_optimizer(params, name=name, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, parameters(), strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_a_closure_is_run_with_gradients_and_its_loss_returned(name):
    weights = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))]
    stepped, plain = (build_optimizer([w], name=name, lr=0.1) for w in weights)
    calls = []

    def closure(weight=weights[0]):
        calls.append(torch.is_grad_enabled())
        stepped.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        expected = weights[1].square().sum()
        plain.zero_grad()
        expected.backward()
        assert plain.step() is None
        assert torch.equal(stepped.step(closure), expected)
    assert calls == [True, True]
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.ones(3, 2))


# --- launches and synchronization


class Operations(TorchDispatchMode):
    """Counts computing operations, and fails where a tensor's value is read on the host."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        assert func not in (torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)
        if func.namespace == "aten" and not func.is_view:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def resnet50(device):
    with torch.device(device):
        encoder = build_encoder("resnet50", in_channels=3, image_size=32, stem="auto", out_dim=None)
    return list(encoder.parameters())


def test_the_counter_detects_synchronizations():
    for read in (lambda x: x.item(), bool, float, lambda x: 1 if x > 0 else 2):
        with pytest.raises(AssertionError, match="waits"), Operations():
            read(torch.ones(()))


@pytest.mark.parametrize(
    ("name", "more"),
    [("lars", {}), ("lars", {"nesterov": True}), ("lamb", {}), ("lamb", {"lamb_norm_range": (0.0, 10.0)})],
)
def test_a_step_of_resnet50_is_less_than_25_launches_and_no_synchronization(name, more):
    params = resnet50("meta")
    assert len(params) == 159
    optimizer = build_optimizer(params, name=name, lr=0.1, weight_decay=1e-4, **more)
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()  # makes the state
    with Operations() as operations:
        optimizer.step()
    assert 5 < operations.calls.total() < 25, operations.calls


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_first_step_on_the_cpu_reads_no_value_on_the_host(name):
    params = parameters(torch.float32)
    optimizer = build_optimizer(params, name=name, lr=0.1, weight_decay=1e-4)
    with Operations():
        run(params, optimizer, range(3))


def test_multi_tensor_calls_have_a_form_for_which_cuda_has_a_kernel():
    """Lists of one shape each, or 0-dim tensors as first factor of addcmul: other forms are one launch per tensor."""

    class Forms(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_foreach_" in str(func):
                lists = [a for a in args if isinstance(a, (list, tuple)) and isinstance(a[0], torch.Tensor)]
                shapes = [[(t.shape, t.stride()) for t in one] for one in lists]
                if "addcmul" in str(func):
                    factors = shapes.pop(1)
                    assert factors in (shapes[0], [(torch.Size(), ())] * len(factors))
                assert all(s == shapes[0] for s in shapes), func
            return func(*args, **(kwargs or {}))

    for name in ("lars", "lamb"):
        model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        params = [*model.parameters(), nn.Parameter(torch.ones(()))]
        optimizer = build_optimizer(params, name=name, lr=0.1, weight_decay=1e-4)
        model(torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)).sum().backward()
        with Forms():
            optimizer.step()


@needs_cuda
@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_on_cuda_no_step_waits_and_the_weights_are_those_of_the_cpu(name):
    settings = {"name": name, "lr": 0.1, "weight_decay": 1e-2, "lars_eta": 0.02}
    want = parameters()
    run(want, build_optimizer(want, **settings))
    params = [nn.Parameter(p.detach().cuda()) for p in parameters()]
    optimizer = build_optimizer(params, **settings)
    for step in range(24):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = None if g is None else g.cuda()
        set_learning_rate(optimizer, rate(step))
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
            grads = [p.grad for p in params if p.grad is not None]
            clip_gradients(grads, torch.nn.utils.get_total_norm(grads), 0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(params, want, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-10, atol=1e-12)


def test_an_unknown_optimizer_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown optimizer 'lasr'; did you mean 'lars'"):
        build_optimizer(parameters(), name="lasr", lr=0.1)


# --- clipping


@pytest.mark.parametrize("limit", [1e-3, 1.0, 7.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_equals_torchs(limit, dtype):
    params = parameters(dtype)
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = None if g is None else g.to(dtype)
    own = [p.grad.clone() for p in params if p.grad is not None]
    total = torch.nn.utils.get_total_norm(own)
    clip_gradients(own, total, limit)
    assert torch.equal(torch.nn.utils.clip_grad_norm_(params, limit), total)
    for a, b in zip(own, [p.grad for p in params if p.grad is not None], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
    if limit == 1e3:
        assert float(torch.nn.utils.get_total_norm(own)) == float(total)


def test_clipping_reads_no_value_on_the_host():
    grads = [torch.randn(3, 2), torch.zeros(()), torch.randn(5)]
    total = torch.nn.utils.get_total_norm(grads)
    with Operations() as operations:
        clip_gradients(grads, total, 0.1)
    assert operations.calls.total() <= 5
    zeros = [torch.zeros(3)]
    clip_gradients(zeros, torch.nn.utils.get_total_norm(zeros), 0.1)
    assert torch.equal(zeros[0], torch.zeros(3))
