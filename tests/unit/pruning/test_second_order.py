"""Second-order pruning against explicit matrices in float64: Jacobians of single samples, torch.linalg.inv."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.func import functional_call

from hpc_supcon.errors import ConfigError, NonFinite
from hpc_supcon.models import build_encoder
from hpc_supcon.pruning import (
    InverseFisher,
    ModelFisher,
    build_masks,
    improve_compensation,
    mean_diagonal,
    removal_scores,
)
from hpc_supcon.pruning.fisher import Categorical, Gaussian, contrastive_outputs, contrastive_targets
from hpc_supcon.pruning.obs import BlockFisher
from tests import brute_force

TEMPERATURE = 0.3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Layers(nn.Module):
    """One of each kind: groups, no bias, norms, in-place activations, a parameter of its own, attention."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, (1, 3), groups=2), nn.SiLU(),
        )  # fmt: skip
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.norm = nn.LayerNorm(6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.convs(x).flatten(2).mT * self.scale)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out((x + nn.functional.scaled_dot_product_attention(q, k, v)).mean(1))


def layers():
    model = Layers().double()
    model(torch.randn(64, 2, 6, 6).double())  # gives BatchNorm statistics
    return model.eval()


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def outputs_of(model):
    return lambda p, x: functional_call(model, p, (x,))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def like(vector, tensors):
    parts = vector.split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts, strict=True)}


def jacobians(outputs, p, x):
    """[n, k, number of parameters]"""
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    z = outputs(leaves, x)
    rows = [torch.autograd.grad(value, list(leaves.values()), retain_graph=True) for value in z.flatten()]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows]).view(*z.shape, -1)


def exact_fisher(outputs, likelihood, p, x):
    """The mean over rows of J^T M J, with M written out."""
    j, z = jacobians(outputs, p, x), outputs(p, x)
    if isinstance(likelihood, Gaussian):
        m = torch.eye(z.shape[1]).to(z).expand(len(z), -1, -1) / likelihood.sigma**2
    else:
        m = torch.stack([torch.diag(q) - torch.outer(q, q) for q in z.softmax(1)])
    return torch.einsum("nka,nkl,nlb->ab", j, m.to(j), j) / len(z)


def contrastive_of(model):
    return lambda p, x: contrastive_outputs(functional_call(model, p, (x,)), TEMPERATURE)


def cases():
    yield "gaussian", Gaussian(0.7), outputs_of
    yield "categorical", Categorical(), outputs_of
    yield "contrastive", Categorical(), contrastive_of


CASES = [pytest.param(likelihood, of, id=name) for name, likelihood, of in cases()]


@pytest.mark.parametrize("derivative", ["forward", "differences"])
@pytest.mark.parametrize(("likelihood", "of"), CASES)
def test_products_are_those_of_the_exact_fisher_matrix(likelihood, of, derivative):
    model = layers()
    p, outputs, x = parameters(model), of(model), torch.randn(7, 2, 6, 6).double()
    exact = exact_fisher(outputs, likelihood, p, x)
    v = like(torch.randn(len(exact)).double(), p)
    got = ModelFisher(p, outputs, likelihood, derivative=derivative).product((x, None), v, generator())
    error = (flat(got) - exact @ flat(v)).norm() / (exact @ flat(v)).norm()
    assert error < (1e-12 if derivative == "forward" else 1e-7)
    assert {name: t.shape for name, t in got.items()} == {name: t.shape for name, t in p.items()}
    assert all(torch.equal(p[name], t) for name, t in model.named_parameters())


def test_forward_derivatives_are_more_exact_than_differences_in_float32():
    model = layers()
    p, outputs, x = parameters(model), outputs_of(model), torch.randn(7, 2, 6, 6).double()
    exact = exact_fisher(outputs, Categorical(), p, x)
    v = like(torch.randn(len(exact)).double(), p)
    want, errors = exact @ flat(v), {}
    single = {name: t.float() for name, t in p.items()}
    narrow = outputs_of(model.float())
    for derivative in ("forward", "differences"):
        fisher = ModelFisher(single, narrow, Categorical(), derivative=derivative)
        got = flat(fisher.product((x.float(), None), {name: t.float() for name, t in v.items()}, generator()))
        errors[derivative] = (got.double() - want).norm() / want.norm()
    assert errors["forward"] < 1e-5 < errors["differences"] < 0.1


@pytest.mark.parametrize(("likelihood", "of"), CASES)
@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_products_and_gradients_with_targets_are_those_of_single_gradients(kind, likelihood, of):
    model = layers()
    p, outputs, x = parameters(model), of(model), torch.randn(6, 2, 6, 6).double()
    z = outputs(p, x).detach()
    targets = likelihood.sample(z, generator(3))
    g = torch.stack([_nll_gradient(outputs, likelihood, p, x, targets, i) for i in range(len(x))])
    fisher = ModelFisher(p, outputs, likelihood, kind=kind)
    given = (x, targets if kind == "empirical" else None)
    v = like(torch.randn(g.shape[1]).double(), p)
    torch.testing.assert_close(flat(fisher.product(given, v, generator(3))), g.mT @ (g @ flat(v)) / len(g))
    torch.testing.assert_close(flat(fisher.gradients(given, generator(3))), g.sum(0) / math.sqrt(len(g)))
    if of is outputs_of:
        rows = fisher.sample_gradients(given, generator(3))
        torch.testing.assert_close(torch.cat([t.flatten(1) for t in rows.values()], 1), g)


def _nll_gradient(outputs, likelihood, p, x, targets, i):
    """By autograd, of one row's -log p."""
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    z = outputs(leaves, x)[i]
    if isinstance(likelihood, Gaussian):
        nll = (z - targets[i]).square().sum() / (2 * likelihood.sigma**2)
    else:
        nll = -z.log_softmax(0)[targets[i]]
    found = torch.autograd.grad(nll, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([t.flatten() for t in found])


@pytest.mark.parametrize("likelihood", [Gaussian(0.7), Categorical()])
def test_gradients_of_targets_of_the_model_have_the_fisher_matrix_as_covariance(likelihood):
    z = torch.tensor([[0.3, -1.0, 2.0]]).double().repeat(200_000, 1)
    e = likelihood.score(z, likelihood.sample(z, generator()))
    metric = torch.stack([likelihood.metric(z[:1], row[None])[0] for row in torch.eye(3).double()])
    torch.testing.assert_close(e.mT @ e / len(e), metric, atol=0.015, rtol=0)
    assert e.mean(0).abs().max() < 0.01


def test_the_likelihood_of_similarities_is_the_contrastive_loss():
    features = torch.randn(10, 4).double()
    labels = torch.arange(5).repeat_interleave(2)
    z = contrastive_outputs(features, TEMPERATURE)
    targets = contrastive_targets(labels, generator())
    want = brute_force.contrastive(features, labels, TEMPERATURE)
    torch.testing.assert_close(nn.functional.cross_entropy(z, targets), want)


def test_positives_are_drawn_among_all_rows_of_the_anchor_s_label():
    labels = torch.tensor([0, 1, 0, 0, 2, 1])
    drawn = {i: set() for i in range(6)}
    for seed in range(60):
        for i, j in enumerate(contrastive_targets(labels, generator(seed)).tolist()):
            drawn[i].add(j if j < i else j + 1)  # -1 is 0 or -1 + 1
    assert [drawn[i] for i in (0, 1, 2, 3, 5)] == [{2, 3}, {5}, {0, 3}, {0, 2}, {1}]
    assert contrastive_targets(labels, generator())[4] == -1
    assert Categorical().score(torch.randn(1, 5), torch.tensor([-1])).abs().sum() == 0


def test_rows_of_a_batch_do_not_depend_on_each_other_in_eval_mode():
    model = layers()
    p, x = parameters(model), torch.randn(8, 2, 6, 6).double()
    fisher = ModelFisher(p, outputs_of(model), Categorical())
    v = {name: torch.randn_like(t) for name, t in p.items()}
    whole, *halves = (flat(fisher.product((part, None), v, generator())) for part in (x, x[:4], x[4:]))
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_the_mean_of_the_diagonal_is_that_of_the_exact_matrix():
    model = layers()
    p, x = parameters(model), torch.randn(40, 2, 6, 6).double()
    exact = exact_fisher(outputs_of(model), Gaussian(), p, x).diagonal().mean()
    fisher = ModelFisher(p, outputs_of(model), Gaussian())
    got = mean_diagonal(fisher, lambda i: (x[i % 5 * 8 :][:8], None), 200, seed=0)
    assert got == pytest.approx(float(exact), rel=0.15)
    with pytest.raises(NonFinite, match="the Fisher matrix's diagonal is nan"):
        mean_diagonal(fisher, lambda i: (x * math.nan, None), 1, seed=0)


def test_unknown_kinds_are_refused_by_name():
    for wrong in ({"kind": "models"}, {"derivative": "backward"}):
        with pytest.raises(ConfigError, match=r"unknown (kind of Fisher|derivative)"):
            ModelFisher({}, outputs_of(None), Categorical(), **wrong)
    model = nn.Linear(2, 2)
    fisher = ModelFisher(parameters(model), outputs_of(model), Gaussian())
    with pytest.raises(ConfigError, match="unknown directions 'gradient'"):
        InverseFisher(model, damping=1.0).fit(
            fisher, lambda i: (torch.ones(1, 2), None), 1, seed=0, directions="gradient"
        )


# optimal brain surgeon


def block_mask(shape, block):
    """[weights, weights] bool: whether two weights of a tensor are in one block."""
    columns = math.prod(shape[1:])
    side = math.ceil(columns / math.ceil(columns / block))
    index = [(i // columns, i % columns // side) for i in range(shape[0] * columns)]
    return torch.tensor([[a == b for b in index] for a in index])


def surgeon(q, w, removed):
    """w after the exact optimal change for the removed set, with the formula written out."""
    e = torch.eye(len(w)).to(w)[:, removed]
    return w - q @ e @ torch.linalg.inv(e.mT @ q @ e) @ e.mT @ w


@pytest.mark.parametrize("block", [1, 4, 64])
def test_blocks_scores_and_compensation_are_those_of_explicit_matrices(block):
    shapes = {"conv": (3, 2, 3, 1), "linear": (2, 7), "bias": (5,)}
    w = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    g = {name: torch.randn(9, *shape).double() for name, shape in shapes.items()}
    keep = {name: torch.rand(shapes[name]) < 0.4 for name in ("conv", "linear")}
    fisher = BlockFisher(w, block)
    for part in (slice(0, 2), slice(2, 9)):
        fisher.add({name: t[part] for name, t in g.items()})
    inverse = fisher.inverse(0.1)
    got, u = inverse.compensate(w, keep), {name: torch.randn_like(t) for name, t in w.items()}
    for name, shape in shapes.items():
        rows = g[name].flatten(1)
        f = rows.mT @ rows / 9 * block_mask(shape, block)
        q = torch.linalg.inv(f + 0.1 * torch.eye(len(f)))
        torch.testing.assert_close(inverse.diagonal()[name].flatten(), q.diagonal())
        torch.testing.assert_close(inverse.product(u)[name].flatten(), q @ u[name].flatten())
        removed = ~keep.get(name, torch.ones(shape, dtype=torch.bool)).flatten()
        want = surgeon(q, w[name].flatten(), removed)
        torch.testing.assert_close(got[name].flatten(), want)
        assert (got[name].flatten()[removed] == 0).all()
        # the score of a weight is the smallest possible increase of the quadratic form
        i = 3
        dw = surgeon(q, w[name].flatten(), torch.arange(len(f)) == i) - w[name].flatten()
        score = removal_scores({name: w[name]}, inverse.diagonal())[name].flatten()[i]
        torch.testing.assert_close(score, dw @ torch.linalg.inv(q) @ dw / 2)


def test_the_blocks_of_weights_that_are_left_ignore_those_that_were_removed():
    w, g = {"w": torch.randn(2, 5).double()}, torch.randn(20, 2, 5).double()
    left = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
    fisher = BlockFisher(w, 5)
    fisher.add({"w": g})
    inverse = fisher.inverse(0.1, {"w": left})
    f = g[:, 0, left[0]].mT @ g[:, 0, left[0]] / 20
    q = torch.linalg.inv(f + 0.1 * torch.eye(3))
    torch.testing.assert_close(inverse.diagonal()["w"][0, left[0]], q.diagonal())
    assert (inverse.diagonal()["w"][0, ~left[0]] == 0).all()
    start = {"w": w["w"] * left}
    now = left.clone()
    now[0, 0] = False
    want = surgeon(q, start["w"][0, left[0]], torch.tensor([True, False, False]))
    got = inverse.compensate(start, {"w": now})["w"]
    torch.testing.assert_close(got[0, left[0]], want)
    torch.testing.assert_close(got[1], start["w"][1])
    assert (removal_scores(start, inverse.diagonal())["w"][~left] == 0).all()


def test_gradients_or_a_damping_that_give_no_inverse_are_a_named_error():
    fisher = BlockFisher({"w": torch.zeros(1, 3)}, 3)
    fisher.add({"w": torch.ones(1, 1, 3)})
    with pytest.raises(NonFinite, match="inverse blocks of w are NaN or Inf: raise the damping"):
        fisher.inverse(0.0)
    with pytest.raises(NonFinite, match="scores of w"):
        removal_scores({"w": torch.tensor([math.nan])}, {"w": torch.ones(1)})


# the learned inverse


def scrambled(inverse, seed=0):
    """The inverse with random A, L and R."""
    state = inverse.state_dict()
    for key, t in state.items():
        if key.startswith("Q/"):
            noise = 0.3 * torch.randn(t.shape, generator=generator(seed)).to(t)
            if key[2] != "A":  # a factor is 0 beyond its size
                inside = t.diagonal(dim1=-2, dim2=-1)
                noise *= inside[..., :, None] * inside[..., None, :]
            state[key] = t + noise
    inverse.load_state_dict(state)
    return inverse


def matrix_of(inverse, p):
    columns = [flat(inverse.product(like(row, p))) for row in torch.eye(len(flat(p))).double()]
    return torch.stack(columns).detach()


@pytest.mark.parametrize("largest", [1024, 5])
def test_q_is_symmetric_and_positive_definite_and_has_the_diagonal_that_it_says(largest):
    model = layers()
    p = parameters(model)
    inverse = scrambled(InverseFisher(model, damping=0.5, largest_factor=largest))
    q = matrix_of(inverse, p)
    torch.testing.assert_close(q, q.mT)
    assert torch.linalg.eigvalsh(q).min() > 0
    torch.testing.assert_close(q.diagonal(), flat(inverse.diagonal()))
    keys = [name for name, t in p.items() for _ in range(t.numel())]
    first = keys.index("qkv.weight")
    for other in (first + 1, first + 6, keys.index("qkv.bias")):
        linked = largest > 5 or other == first + 1 or other == first + 6  # the bias is in another block
        assert (q[first, other] != 0) == linked, "weights of one layer, and weight and bias, are linked"
    own = [key.rpartition(".")[0] for key in keys]
    assert (q[torch.tensor([[a != b for b in own] for a in own])] == 0).all()
    group = [i for i, key in enumerate(keys) if key == "convs.4.weight"]
    assert (q[group[0], group[len(group) // 2 :]] == 0).all(), "groups of a convolution have no entries in common"


def test_at_first_it_is_the_inverse_of_the_damping():
    model = layers()
    q = matrix_of(InverseFisher(model, damping=0.2, largest_factor=4), parameters(model))
    torch.testing.assert_close(q, 5 * torch.eye(len(q)).double())


def random_keep(p, seed=0):
    return {name: torch.rand(t.shape, generator=generator(seed)) < 0.5 for name, t in p.items() if t.ndim > 1}


def test_compensation_is_that_of_the_explicit_matrix():
    model = layers()
    p = parameters(model)
    inverse = scrambled(InverseFisher(model, damping=0.5))
    q, keep = matrix_of(inverse, p), random_keep(p)
    removed = ~flat({name: keep.get(name, torch.ones(t.shape).bool()) for name, t in p.items()})
    got = flat(inverse.compensate(p, keep, iterations=1000))
    torch.testing.assert_close(got, surgeon(q, flat(p), removed), atol=1e-3, rtol=1e-3)
    assert (got[removed] == 0).all()
    singles = flat(inverse.compensate(p, keep, joint=False))
    want = flat(p) - q @ torch.where(removed, flat(p) / q.diagonal(), 0)
    torch.testing.assert_close(singles, torch.where(removed, 0, want))


def regression(samples=200):
    """A linear model, its inputs, and its Fisher matrix, of which the form of Q has the inverse."""
    x = torch.randn(samples, 10).double() @ (torch.randn(10, 10).double() / 10**0.5)
    return nn.Linear(10, 4).double(), x, Gaussian(), 0.02


def network(samples=200):
    """A trained network of two layers: the form has neither entries between layers nor sums of products."""
    x = torch.randn(samples, 8).double() @ (torch.randn(8, 8).double() / 8**0.5)
    y = (x @ torch.randn(8, 4).double()).argmax(1)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, Categorical(), 0.1


@cache
def fitted(make, steps=400):
    """(problem, learned inverse, exact inverse, exact Fisher matrix)"""
    torch.manual_seed(0)
    problem = model, x, likelihood, damping = make()
    p, outputs = parameters(model), outputs_of(model)
    inverse = InverseFisher(model, damping=damping)
    inverse.fit(ModelFisher(p, outputs, likelihood), lambda i: (x, None), steps, seed=0, directions="random")
    f = exact_fisher(outputs, likelihood, p, x)
    return problem, inverse, torch.linalg.inv(f + damping * torch.eye(len(f))), f


def same_decisions(p, diagonal, exact, rate):
    """The share of weights for which pruning by Q decides as pruning by the exact inverse does."""
    scores = {name: t for name, t in removal_scores(p, diagonal).items() if t.ndim > 1}
    wanted = {name: t for name, t in removal_scores(p, like(exact.diagonal(), p)).items() if t.ndim > 1}
    masks, want = (flat(build_masks(s, rate, "global")) for s in (scores, wanted))
    return (masks == want).double().mean()


def test_q_of_a_linear_regression_is_the_inverse_fisher_matrix():
    problem, inverse, exact, _ = fitted(regression)
    p = parameters(problem[0])
    error = flat(inverse.diagonal()) / exact.diagonal() - 1
    assert error.abs().max() < 0.05
    for rate in (0.3, 0.5, 0.8):
        assert same_decisions(p, inverse.diagonal(), exact, rate) >= 0.95
    q = matrix_of(inverse, p)
    assert (q - exact).norm() < 0.05 * exact.norm()


def test_removal_decisions_in_a_network_are_those_of_the_exact_surgeon():
    problem, inverse, exact, f = fitted(network)
    error = (flat(inverse.diagonal()) / exact.diagonal() - 1).abs()
    without = (1 / (f.diagonal() + 0.1) / exact.diagonal() - 1).abs()
    assert error.mean() < 0.1
    assert error.mean() < 0.7 * without.mean(), "better than a diagonal Fisher matrix"
    for rate in (0.3, 0.5, 0.8):
        assert same_decisions(parameters(problem[0]), inverse.diagonal(), exact, rate) >= 0.95


@pytest.mark.parametrize("make", [regression, network])
def test_compensation_lowers_the_loss_against_plain_removal(make):
    (model, x, likelihood, _), inverse, _, _ = fitted(make)
    p, z = parameters(model), outputs_of(model)(parameters(model), x).detach()

    def loss(weights):
        """Cross-entropy, or squared error, of the outputs against those of the whole model."""
        got = outputs_of(model)(weights, x)
        return (got - z).square().mean() if isinstance(likelihood, Gaussian) else nn.functional.kl_div(
            got.log_softmax(1), z.softmax(1), reduction="batchmean"
        )  # fmt: skip

    scores = {name: t for name, t in removal_scores(p, inverse.diagonal()).items() if t.ndim > 1}
    for rate in (0.1, 0.3, 0.5, 0.7):
        keep = build_masks(scores, rate, "global")
        plain = {name: t * keep[name] if name in keep else t for name, t in p.items()}
        assert loss(inverse.compensate(p, keep)) < loss(plain), rate


def test_compensation_across_layers_is_that_of_the_exact_surgeon():
    (model, x, likelihood, damping), inverse, exact, f = fitted(network)
    p = parameters(model)
    fisher = ModelFisher(p, outputs_of(model), likelihood)
    keep = build_masks({name: t for name, t in p.items() if t.ndim > 1}, 0.6, "global")
    keep["0.bias"] = torch.arange(10) > 2
    start, curvature = inverse.compensate(p, keep), f + damping * torch.eye(len(f))

    def improved(iterations):
        found = improve_compensation(
            p, start, keep, lambda u: fisher.product((x, None), u, generator()), inverse.diagonal(),
            damping=damping, iterations=iterations,
        )  # fmt: skip
        assert all((found[name][~mask] == 0).all() for name, mask in keep.items())
        return flat(found)

    def cost(weights):
        return (weights - flat(p)) @ curvature @ (weights - flat(p)) / 2

    removed = ~flat({name: keep.get(name, torch.ones(t.shape).bool()) for name, t in p.items()})
    torch.testing.assert_close(improved(200), surgeon(exact, flat(p), removed), atol=1e-5, rtol=1e-4)
    costs = [cost(flat(start)), *(cost(improved(n)) for n in (1, 3, 10))]
    assert costs == sorted(costs, reverse=True)


def test_an_interrupted_fit_goes_on_bit_for_bit():
    model, x, likelihood, damping = regression()
    fisher = ModelFisher(parameters(model), outputs_of(model), likelihood)

    def batch(i):
        return x[i * 8 % 200 :][:8], None

    whole = InverseFisher(model, damping=damping)
    losses = whole.fit(fisher, batch, 20, seed=1, warmup=4)
    part, saved = InverseFisher(model, damping=damping), {}

    def stop(step, loss):
        if step == 10:
            saved["bytes"] = safetensors.torch.save(part.state_dict())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.fit(fisher, batch, 20, seed=1, warmup=4, after_step=stop)
    again = InverseFisher(model, damping=damping)
    again.load_state_dict(safetensors.torch.load(saved["bytes"]))
    assert again.fit(fisher, batch, 20, seed=1, warmup=4) == losses[10:]
    for key, t in whole.state_dict().items():
        assert torch.equal(t, again.state_dict()[key]), key
    assert again.fit(fisher, batch, 20, seed=1) == []


def test_excluded_weights_are_out_of_q_and_it_is_refined_for_those_that_are_left():
    (model, x, likelihood, damping), whole, _, f = fitted(regression)
    inverse = copy.deepcopy(whole)
    keep = {"weight": torch.ones(4, 10).bool()}
    keep["weight"][:, [1, 4, 7]] = False  # the same inputs in every row: the form has the new inverse too
    left = torch.cat([keep["weight"].flatten(), torch.ones(4).bool()])
    exact = torch.linalg.inv(f[left][:, left] + damping * torch.eye(int(left.sum())))

    def error():
        return (flat(inverse.diagonal())[left] / exact.diagonal() - 1).abs().max()

    inverse.exclude(keep)
    before = error()
    p = parameters(model)
    inverse.fit(
        ModelFisher(p, outputs_of(model), likelihood), lambda i: (x, None), 400, seed=0, lr=0.05, directions="random"
    )
    assert error() < 0.05 < before
    assert (matrix_of(inverse, p)[~left] == 0).all()
    assert (removal_scores(p, inverse.diagonal())["weight"][~keep["weight"]] == 0).all()
    pruned = {name: t * keep.get(name, 1) for name, t in p.items()}
    got = inverse.compensate(pruned, {"weight": keep["weight"] & (torch.rand(4, 10) < 0.5)})
    assert (got["weight"][~keep["weight"]] == 0).all()


def test_a_fit_that_diverges_is_a_named_error():
    model, x, likelihood, damping = regression()
    broken = {name: t * math.nan for name, t in parameters(model).items()}
    with pytest.raises(NonFinite, match=r"squared gradients of A/weight"):
        _fit_once(model, broken, x, likelihood, damping, 1)
    with pytest.raises(NonFinite, match="the loss of the inverse Fisher is nan at step 1"):
        _fit_once(model, parameters(model), x * math.nan, likelihood, damping, 0)


def _fit_once(model, p, x, likelihood, damping, warmup):
    fisher = ModelFisher(p, outputs_of(model), likelihood)
    InverseFisher(model, damping=damping).fit(fisher, lambda i: (x, None), 2, seed=0, warmup=warmup)


def test_memory_is_linear_in_the_weights_but_for_the_factors():
    def sizes(width, largest=1024):
        inverse = InverseFisher(nn.Conv2d(width, width, 3, bias=False), damping=1.0, largest_factor=largest)
        return inverse.memory()

    weights, factors = 9 * 64 * 64, (9 * 64) ** 2 + 64**2
    assert sizes(64) == weights * (3 * 4 + 1) + factors * 3 * 4
    factors = 64 * (9 * 64) + 64**2  # blocks of 64
    assert sizes(64, 64) == weights * (3 * 4 + 1) + factors * 3 * 4


def test_it_is_learned_for_an_encoder_of_this_package_with_its_contrastive_likelihood():
    encoder = build_encoder("conv", image_size=8, out_dim=16).eval()
    p = parameters(encoder)
    fisher = ModelFisher(p, contrastive_of(encoder), Categorical())
    inverse = InverseFisher(encoder, damping=1e-4)
    x = torch.rand(12, 3, 8, 8)
    before = copy.deepcopy(inverse)
    before.refine()
    losses = inverse.fit(fisher, lambda i: (x, None), 20, seed=0, warmup=16)
    assert len(losses) == 20
    inverse.refine()
    # both for the same vectors
    want, got = (each.fit(fisher, lambda i: (x, None), 4, seed=1, lr=0.0) for each in (before, inverse))
    assert all(b < a for a, b in zip(want, got, strict=True))
    assert p.keys() == inverse.diagonal().keys()
    assert all((t > 0).all() for t in inverse.diagonal().values())
    assert not torch.equal(flat(before.diagonal()), flat(inverse.diagonal()))
