"""Pruning methods against formulas and enumeration: scores, N:M masks, rates of layers, rates that grow."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpc_supcon.errors import ConfigError, NonFinite
from hpc_supcon.pruning import (
    PRUNERS,
    GradualPruning,
    PruneTask,
    Sensitivity,
    allocate,
    allocate_rates,
    build_masks,
    cubic_rate,
    misfits,
    prunable,
    scan_layers,
    score_weights,
    to_semi_structured,
)
from hpc_supcon.pruning.semi_structured import PointwiseConv2d, has_kernels, is_two_of_four, matrix_of
from tests.devices import needs_cuda


def weights(seed=0, shapes=((6, 4, 3, 3), (5, 8), (7, 3, 1, 1))):
    rng = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(s, generator=rng) * 10 ** (1 - i) for i, s in enumerate(shapes)}


def scores_of(method, w, seed=0):
    return score_weights(method, PruneTask(w, seed)).scores


WEIGHT_ONLY = [name for name, spec in PRUNERS.items() if spec.needs == "weights"]


def test_lamp_scores_are_those_of_the_formula():
    w = weights()
    w["layer1"][0, :3] = torch.tensor([0.5, -0.5, 0.5])  # ties: the first has the smallest score
    for name, scores in scores_of("lamp", w).items():
        flat = w[name].double().flatten().numpy()
        order = sorted(range(len(flat)), key=lambda u: (abs(flat[u]), u))
        for position, u in enumerate(order):
            want = flat[u] ** 2 / math.fsum(flat[v] ** 2 for v in order[position:])
            assert scores.flatten()[u].item() == pytest.approx(want, rel=1e-9), name
    for name, mask in build_masks(scores_of("lamp", w), 0.98, "global").items():
        assert mask.flatten()[w[name].abs().argmax()], "lamp keeps the largest weight of a layer"


def test_weighted_l1_does_not_depend_on_the_scale_of_a_layer():
    w = weights()
    for name, scores in scores_of("l1_weighted", w).items():
        flat = w[name].double()
        torch.testing.assert_close(scores.double(), flat.abs() / flat.square().sum().sqrt(), rtol=1e-12, atol=0)
    scaled = {name: weight * 2.0 ** (7 * i) for i, (name, weight) in enumerate(w.items())}
    for method, same in (("l1_weighted", True), ("lamp", True), ("l1", False)):
        masks, others = (build_masks(scores_of(method, v), 0.6, "global") for v in (w, scaled))
        assert all(torch.equal(masks[name], others[name]) for name in w) is same, method


def test_random_scores_follow_from_the_seed_and_not_from_the_weights():
    first, again, other = (
        scores_of("random", weights()),
        scores_of("random", weights(1)),
        scores_of("random", weights(), 1),
    )
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    drawn = torch.cat([score.flatten() for score in first.values()])
    assert drawn.unique().numel() == drawn.numel()
    masks = build_masks(first, 0.5, "global")
    assert all(0.2 < mask.float().mean() < 0.8 for mask in masks.values())


@pytest.mark.parametrize("method", WEIGHT_ONLY)
@pytest.mark.parametrize("scope", ["global", "layer"])
@given(rate=st.floats(0, 0.95), more=st.floats(0, 0.95), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_what_was_pruned_counts_and_stays_pruned(method, scope, rate, more, seed):
    w = weights(seed)
    first = build_masks(scores_of(method, w), rate, scope)
    left = {name: weight * first[name] for name, weight in w.items()}
    second = build_masks(scores_of(method, left), more, scope, pruned=first)
    for name in w:
        assert not (second[name] & ~first[name]).any(), "a pruned weight came back"
    groups = [[name] for name in w] if scope == "layer" else [list(w)]
    for names in groups:
        n = sum(w[name].numel() for name in names)
        zeros = sum(int((~second[name]).sum()) for name in names)
        assert zeros == max(round(rate * n), round(more * n))


@pytest.mark.parametrize("method", WEIGHT_ONLY)
def test_weights_that_are_zero_are_pruned_first(method):
    w = weights()
    zero = {name: torch.rand(weight.shape) < 0.3 for name, weight in w.items()}
    w = {name: weight.masked_fill(zero[name], 0.0) for name, weight in w.items()}
    masks = build_masks(scores_of(method, w), 0.5, "layer")
    for name, mask in masks.items():
        assert not mask[zero[name]].any()
        assert int((~mask).sum()) == round(0.5 * mask.numel())


def brute_force_pattern(score, n, m):
    """Loops over every output, kernel position and group of inputs."""
    mask = np.ones(score.shape, dtype=bool)
    others = [range(side) for axis, side in enumerate(score.shape) if axis != 1]
    for at in itertools.product(*others):
        for start in range(0, score.shape[1], m):
            inputs = range(start, start + m)
            values = [(float(score[(at[0], i, *at[1:])]), i) for i in inputs]
            for _, i in sorted(values)[: m - n]:
                mask[(at[0], i, *at[1:])] = False
    return mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4), (1, 2)])
@pytest.mark.parametrize("method", WEIGHT_ONLY)
def test_n_of_every_m_inputs_are_kept(method, n, m):
    w = weights(shapes=((6, 8, 3, 2), (5, 16), (7, 3, 1, 1), (4, 1, 3, 3)))
    w["layer1"] = w["layer1"].round()  # ties and zeros
    scores = scores_of(method, w)
    masks = build_masks(scores, 0.5, (n, m))
    assert misfits(w, m) == ["layer2", "layer3"]
    for name, mask in masks.items():
        if name in ("layer2", "layer3"):
            assert mask.all()
        else:
            assert (mask.numpy() == brute_force_pattern(scores[name], n, m)).all()
            assert (mask.movedim(1, -1).unflatten(-1, (-1, m)).sum(-1) == n).all()


def test_two_of_four_equals_torchs_own_sparsifier():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.pruning import WeightNormSparsifier
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    masks = build_masks(scores_of("l1", prunable(model)), 0.5, (2, 4))
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    for layer in ("0", "2"):
        theirs = model.get_submodule(layer).parametrizations.weight[0].mask
        assert torch.equal(masks[f"{layer}.weight"], theirs.bool())


def test_weights_pruned_before_stay_pruned_in_a_pattern():
    w = weights(shapes=((3, 8),))
    before = {"layer0": torch.ones(3, 8, dtype=torch.bool)}
    before["layer0"][0, :3] = False  # more than the pattern prunes
    before["layer0"][1, 7] = False
    mask = build_masks(scores_of("l1", w), 0.5, (2, 4), pruned=before)["layer0"]
    assert not (mask & ~before["layer0"]).any()
    assert mask.unflatten(1, (-1, 4)).sum(-1).tolist() == [[1, 2], [2, 2], [2, 2]]


def test_a_pattern_that_fits_no_layer_is_an_error():
    with pytest.raises(
        ConfigError, match=r"prune\.scope=2:4: no layer has a number of input channels that 4 divides"
    ):
        build_masks(scores_of("l1", weights(shapes=((8, 3, 2, 2), (4, 6)))), 0.5, (2, 4))


@given(data=st.data(), layers=st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_the_allocation_is_the_best_of_all(data, layers):
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=layers, max_size=layers))
    grid = (0.25, 0.5, 0.9)
    counts = [[0, *(round(r * n) for r in grid)] for n in sizes]
    losses = [[0.0, *data.draw(st.lists(st.floats(-1, 3), min_size=3, max_size=3))] for _ in sizes]
    target = data.draw(st.integers(0, sum(row[-1] for row in counts)))
    choice = allocate(losses, counts, target)
    found = sum(row[i] for row, i in zip(losses, choice, strict=True))
    assert sum(row[i] for row, i in zip(counts, choice, strict=True)) >= target
    assert found == pytest.approx(least_loss(losses, counts, target), abs=1e-9)


def least_loss(losses, counts, target):
    best = math.inf
    for choice in itertools.product(range(4), repeat=len(counts)):
        if sum(row[i] for row, i in zip(counts, choice, strict=True)) >= target:
            best = min(best, sum(row[i] for row, i in zip(losses, choice, strict=True)))
    return best


@given(data=st.data(), layers=st.integers(1, 4), resolution=st.integers(5, 60))
@settings(max_examples=80, deadline=None)
def test_a_coarse_allocation_is_within_its_stated_bound(data, layers, resolution):
    sizes = data.draw(st.lists(st.integers(50, 900), min_size=layers, max_size=layers))
    counts = [[0, *(round(r * n) for r in (0.25, 0.5, 0.9))] for n in sizes]
    losses = [[0.0, *np.cumsum(data.draw(st.lists(st.floats(0, 3), min_size=3, max_size=3)))] for _ in sizes]
    total = sum(row[-1] for row in counts)
    target = data.draw(st.integers(0, total))
    choice = allocate(losses, counts, target, resolution=resolution)
    assert sum(row[i] for row, i in zip(counts, choice, strict=True)) >= target
    unit = -(-total // resolution)
    bound = least_loss(losses, counts, target + unit * (layers + 1))
    assert sum(row[i] for row, i in zip(losses, choice, strict=True)) <= bound + 1e-9


def test_the_layers_rates_meet_the_rate_to_the_weight_and_spare_what_is_sensitive():
    w = weights(shapes=((60, 50), (40, 30), (10, 10)))
    rates = (0.3, 0.6, 0.9)
    scan = Sensitivity(1.0, rates, {"layer0": [1.01, 1.1, 1.5], "layer1": [1.5, 3.0, 9.0], "layer2": [1.0, 1.0, 1.0]})
    for rate in (0, 0.1, 0.333, 0.5, 0.7, 0.89):
        counts = allocate_rates(scan, w, rate)
        assert sum(counts.values()) == round(rate * 4300)
        masks = build_masks(scores_of("l1", w), rate, "global", counts=counts)
        assert {name: int((~mask).sum()) for name, mask in masks.items()} == counts
    counts = allocate_rates(scan, w, 0.5)
    assert counts["layer1"] == 0
    assert counts["layer2"] == 90
    with pytest.raises(ConfigError, match=r"prune\.rate=0\.95 is more than the scan can give, 0\.9: add a larger"):
        allocate_rates(scan, w, 0.95)
    w["layer1"][:20] = 0.0  # pruned before
    counts = allocate_rates(scan, w, 0.5)
    assert (sum(counts.values()), counts["layer1"]) == (2150, 600)
    hopeless = Sensitivity(1.0, rates, {name: [math.inf] * 3 for name in w})
    with pytest.raises(NonFinite, match="for every choice"):
        allocate_rates(hopeless, w, 0.5)


def test_a_scan_measures_each_layer_by_itself_and_only_what_is_missing():
    w = {name: weight.clone() for name, weight in weights().items()}
    before = {name: weight.clone() for name, weight in w.items()}
    calls = []

    def loss():
        calls.append(1)
        return float(sum((i + 1) * weight.double().square().sum() for i, weight in enumerate(w.values())))

    cells: dict[str, float | None] = {}
    seen = []
    scan = scan_layers(w, (0.9, 0.5), loss, cells, seen.append)
    assert (scan.rates, len(calls), len(cells)) == ((0.5, 0.9), 1 + 2 * len(w), 1 + 2 * len(w))
    for i, (name, row) in enumerate(scan.losses.items()):
        squares = np.sort(before[name].double().square().flatten().numpy())
        for rate, value in zip(scan.rates, row, strict=True):
            assert value == pytest.approx(
                scan.dense - (i + 1) * squares[: round(rate * len(squares))].sum(), rel=1e-9
            )
        assert torch.equal(w[name], before[name])
    partial = {key: cells[key] for key in seen[:3]}
    calls.clear()
    assert scan_layers(w, (0.5, 0.9), loss, partial) == scan
    assert len(calls) == len(cells) - 3
    calls.clear()
    assert scan_layers(w, (0.5, 0.7, 0.9), loss, partial).losses.keys() == w.keys()
    assert len(calls) == len(w)
    with pytest.raises(NonFinite, match="before anything is pruned"):
        scan_layers(w, (0.5,), lambda: math.nan, {})


def test_the_ramp_is_that_of_zhu_and_gupta():
    for step in range(60):
        t = min(step, 40)
        want = 0.9 + (0.1 - 0.9) * (1 - t / 40) ** 3
        assert cubic_rate(step, initial=0.1, final=0.9, interval=4, updates=10) == pytest.approx(want, abs=1e-12)
    ramp = GradualPruning("l1", "global", 0.0, 0.8, interval=3, updates=4, seed=0)
    assert [step for step in range(1, 30) if ramp.due(step)] == [3, 6, 9, 12]
    assert ramp.rate(12) == ramp.rate(500) == 0.8
    assert GradualPruning(**ramp.state()) == ramp


def test_two_of_four_layers_are_converted_on_a_gpu_only():
    model = nn.Sequential(nn.Linear(64, 64))
    before = model[0].weight
    assert to_semi_structured(model) == ([], "2:4 kernels need an NVIDIA GPU; the weights are on the device cpu")
    assert model[0].weight is before


def test_layers_with_a_two_of_four_kernel_are_found():
    torch.manual_seed(0)
    weight = torch.randn(64, 128, dtype=torch.float16)
    assert not is_two_of_four(weight)
    assert is_two_of_four(weight * build_masks({"w": weight.float().abs()}, 0.5, (2, 4))["w"])
    assert is_two_of_four(weight * build_masks({"w": weight.float().abs()}, 0.5, (1, 4))["w"])
    assert not is_two_of_four(torch.zeros(4, 6))
    assert [has_kernels(w) for w in (weight, weight.float(), weight[:32], weight[:, :100])] == [
        True,
        False,
        False,
        False,
    ]
    plain = nn.Conv2d(8, 16, 1)
    x = torch.randn(3, 8, 5, 7)
    assert matrix_of(plain).shape == (16, 8)
    torch.testing.assert_close(PointwiseConv2d(matrix_of(plain), plain.bias)(x), plain(x))
    for other in (nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 1, stride=2), nn.Conv2d(8, 16, 1, groups=2),
                  nn.Conv2d(8, 16, 1, padding=1), nn.BatchNorm2d(8)):  # fmt: skip
        assert matrix_of(other) is None


@needs_cuda
def test_converted_layers_compute_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 128, 1), nn.ReLU(), nn.Conv2d(128, 64, 3), nn.Flatten(), nn.Linear(64 * 4, 64)
    )
    for name, mask in build_masks(scores_of("l1", prunable(model)), 0.5, (2, 4)).items():
        dict(model.named_parameters())[name].data.masked_fill_(~mask, 0.0)
    model = model.cuda().half().eval()
    x = torch.randn(32, 64, 4, 4, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        want = model(x)
    assert to_semi_structured(model) == (["0", "4"], None)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), want, rtol=1e-2, atol=1e-2)
