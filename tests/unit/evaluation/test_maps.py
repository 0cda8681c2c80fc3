"""Maps of points: neighbors and trustworthiness as scikit-learn finds them, maps that keep neighbors and repeat."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import ortho_group
from sklearn.datasets import load_digits
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors

from hpc_supcon.errors import MissingExtra
from hpc_supcon.evaluation import maps
from hpc_supcon.evaluation.maps import (
    METHODS,
    FitOptions,
    Points,
    align,
    fit_aligned,
    fit_map,
    fitting_perplexities,
    missing_packages,
    sample_of,
)

OPTIONS = FitOptions(seed=7)


def digits(count=300):
    return torch.from_numpy(load_digits().data[:count]).float()


def points(n, width, *, mean=0.0):
    return mean + torch.randn(n, width, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize("tile", [1, 700, 1 << 25])
def test_neighbors_are_those_of_an_exact_search_also_far_from_the_origin(monkeypatch, tile):
    monkeypatch.setattr(maps, "TILE", tile)
    x = points(101, 6, mean=1000.0)
    index, distances = Points(x).nearest(9)
    want_distances, want = NearestNeighbors(n_neighbors=9).fit(x.numpy()).kneighbors()
    assert (index == want).mean() > 0.99  # those that are equally far may change places
    np.testing.assert_allclose(distances, want_distances, rtol=1e-3)


def test_a_point_is_not_its_own_neighbor_where_others_are_at_the_same_place():
    index, distances = Points(torch.tensor([[0.0], [0], [0], [5], [6]])).nearest(2)
    assert all(i not in row for i, row in enumerate(index.tolist()))
    assert distances[:3].tolist() == [[0, 0]] * 3
    assert index[3].tolist()[0] == 4


@pytest.mark.parametrize(("n", "k"), [(60, 12), (60, 1), (27, 12), (7, 3)])
def test_trustworthiness_is_that_of_scikit_learn(n, k):
    x = points(n, 5)
    mapped = x[:, :2].numpy() + 0.3 * points(n + 1, 2)[:n].numpy()
    assert Points(x).trustworthiness(mapped, k) == pytest.approx(trustworthiness(x.numpy(), mapped, n_neighbors=k))


def test_trustworthiness_of_few_points_is_that_of_fewer_neighbors():
    x = points(9, 4)
    mapped = x[:, :2].numpy()
    assert Points(x).trustworthiness(mapped, 12) == pytest.approx(trustworthiness(x.numpy(), mapped, n_neighbors=4))


@pytest.mark.parametrize("width", [2, 10, 90])
def test_pca_is_the_singular_value_decomposition(width):
    x = points(120, width).numpy()
    centered = x - x.mean(axis=0)
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    got, shares = Points(torch.from_numpy(x)).components
    np.testing.assert_allclose(np.abs(got), np.abs(u[:, :2] * s[:2]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shares, (s**2 / (s**2).sum())[:2], rtol=1e-4)


@pytest.mark.parametrize("perplexities", [(30.0,), (10.0, 60.0)])
def test_t_sne_of_the_digits_keeps_neighbors_and_repeats(perplexities):
    x = digits()
    options = FitOptions(3, perplexities)
    mapped = fit_map("tsne", Points(x), options)
    assert trustworthiness(x.numpy(), mapped, n_neighbors=12) >= 0.95
    assert np.array_equal(mapped, fit_map("tsne", Points(x), options))
    np.testing.assert_allclose(mapped.mean(axis=0), 0, atol=1e-9)


def test_both_ways_to_sum_the_forces_keep_neighbors(monkeypatch):
    monkeypatch.setattr(maps, "SMALL", 0)
    x = digits(80)
    mapped = fit_map("tsne", Points(x), FitOptions(7, (10.0,)))
    assert trustworthiness(x.numpy(), mapped, n_neighbors=5) >= 0.9


def test_umap_keeps_neighbors_and_repeats():
    pytest.importorskip("umap")
    x = digits(120)
    mapped = fit_map("umap", Points(x), OPTIONS)
    assert trustworthiness(x.numpy(), mapped, n_neighbors=12) >= 0.93
    assert np.array_equal(mapped, fit_map("umap", Points(x), OPTIONS))
    assert np.isfinite(fit_map("umap", Points(x[:5]), OPTIONS)).all()


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("x", [points(5, 3), points(12, 1), torch.tensor([[0.0], [1]]).repeat(4, 3)])
def test_few_points_of_few_dimensions_and_copies_have_maps(method, x):
    mapped = fit_map(method, Points(x), OPTIONS)
    assert mapped.shape == (len(x), 2)
    assert np.isfinite(mapped).all()
    assert np.ptp(mapped) > 0


@pytest.mark.parametrize("method", list(METHODS))
def test_points_that_are_all_one_are_one_point_on_the_map(method):
    own = Points(torch.full((8, 3), 0.3))
    assert not fit_map(method, own, OPTIONS).any()


def test_perplexities_are_lowered_to_a_third_of_the_other_points():
    assert fitting_perplexities([30.0], 1000) == (30.0,)
    assert fitting_perplexities([500.0, 5.0, 30.0], 61) == (5.0, 20.0)


def test_a_map_is_turned_and_mirrored_back_to_the_one_it_was_made_of():
    reference = points(40, 2).numpy()
    reference -= reference.mean(axis=0)
    for turn in ortho_group.rvs(2, size=6, random_state=1):  # some of them mirror
        np.testing.assert_allclose(align(reference @ turn, reference, rotate=True), reference, atol=1e-9)
    noisy = reference @ ortho_group.rvs(2, random_state=2) + 0.1 * points(41, 2)[:40].numpy()
    aligned = align(noisy, reference, rotate=True)
    np.testing.assert_allclose(pdist(aligned), pdist(noisy))
    assert np.square(aligned - reference).sum() < np.square(noisy - reference).sum()


def test_principal_components_only_change_their_signs():
    reference = points(30, 2).numpy()
    mirrored = reference * [1, -1]
    np.testing.assert_array_equal(align(mirrored, reference, rotate=False), reference)
    turned = reference[:, ::-1]
    np.testing.assert_array_equal(np.abs(align(turned, reference, rotate=False)), np.abs(turned))


def test_maps_of_one_method_are_aligned_with_the_reference():
    x = points(50, 4)
    spaces = {"after": Points(x), "before": Points(-x)}
    maps_of = fit_aligned("pca", spaces, "after", OPTIONS)
    np.testing.assert_array_equal(maps_of["after"], fit_map("pca", spaces["after"], OPTIONS))
    assert ((maps_of["before"] * maps_of["after"]).sum(axis=0) > 0).all()


def test_a_sample_has_every_class_in_proportion_and_is_drawn_from_the_seed():
    labels = torch.cat([torch.zeros(600), torch.ones(300), torch.full((100,), 4)]).long()
    got = sample_of(labels, 100, seed=1)
    assert labels[got].bincount().tolist() == [60, 30, 0, 0, 10]
    assert got.tolist() == sorted(set(got.tolist()))
    assert torch.equal(got, sample_of(labels, 100, seed=1))
    assert not torch.equal(got, sample_of(labels, 100, seed=2))
    assert torch.equal(sample_of(labels, 5000, seed=1), torch.arange(1000))


def test_of_very_many_classes_some_are_drawn_from_so_that_each_has_twenty_points():
    labels = torch.arange(1000).repeat(30)
    counts = labels[sample_of(labels, 2000, seed=0)].bincount(minlength=1000)
    assert set(counts.tolist()) == {0, 20}
    assert counts.nonzero().flatten().tolist() == list(range(0, 1000, 10))
    # a small map still has twenty classes
    assert len(labels[sample_of(labels, 60, seed=0)].unique()) == 20


def test_what_is_not_installed_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(maps, "find_spec", lambda name: None)
    errors = missing_packages(["pca", "tsne", "umap"])
    assert {name: type(error) for name, error in errors.items()} == {"tsne": MissingExtra, "umap": MissingExtra}
    assert "pip install 'hpc-supcon[umap]'" in str(errors["umap"])
    assert "pip install openTSNE" in str(errors["tsne"])
