"""Scores of an embedding against their definitions in float64, scikit-learn and pytorch-metric-learning."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from hpc_supcon.errors import NonFinite
from hpc_supcon.evaluation.embedding_scores import embedding_scores

RETRIEVAL = ("recall_at_1", "recall_at_5", "recall_at_10", "r_precision", "map_at_r")


def by_definition(x, labels):
    """Every score but those of clusters, one pair after the other in float64."""
    rows = np.asarray(x, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    z = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    labels = np.asarray(labels)
    n = len(z)
    ordered = [(i, j) for i in range(n) for j in range(n) if i != j]
    same = [(i, j) for i, j in ordered if labels[i] == labels[j]]
    other = [(i, j) for i, j in ordered if labels[i] != labels[j]]

    def mean(of, pairs):
        return sum(of(z[i], z[j]) for i, j in pairs) / len(pairs) if pairs else None

    def squared(a, b):
        return ((a - b) ** 2).sum()

    spread = mean(lambda a, b: math.exp(-2 * squared(a, b)), ordered)
    intra, inter = mean(lambda a, b: 1 - a @ b, same), mean(lambda a, b: 1 - a @ b, other)
    retrieved = {name: [] for name in RETRIEVAL}
    for i in range(n):
        relevant = sum(labels == labels[i]) - 1
        if relevant == 0:
            continue
        near = sorted((j for j in range(n) if j != i), key=lambda j: (-round(z[i] @ z[j], 8), j))
        hits = [labels[j] == labels[i] for j in near]
        for k in (1, 5, 10):
            retrieved[f"recall_at_{k}"].append(any(hits[:k]))
        retrieved["r_precision"].append(sum(hits[:relevant]) / relevant)
        precisions = [sum(hits[: p + 1]) / (p + 1) for p in range(relevant) if hits[p]]
        retrieved["map_at_r"].append(sum(precisions) / relevant)
    sigma = np.linalg.svd(rows, compute_uv=False)
    share = sigma / sigma.sum() if sigma.sum() else sigma
    return {
        "samples": n,
        "alignment": mean(squared, same),
        "uniformity": None if spread is None else math.log(spread),
        "intra_inter": intra / inter if same and other and inter > 1e-12 else None,
        "effective_rank": math.exp(-sum(p * math.log(p) for p in share if p > 0)) if sigma.sum() else None,
        **{name: float(np.mean(found)) if found else None for name, found in retrieved.items()},
    }


def check_equal(scores, want):
    for name, value in want.items():
        if value is None:
            assert scores[name] is None, name
        else:
            assert scores[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def uneven_classes(n, d, classes):
    """Rows around a center of their class; the sizes of the classes differ, and label 3 has no row."""
    labels = (torch.rand(n).square() * classes).long()
    labels[labels == 3] = 4
    return torch.randn(n, d) + torch.randn(classes + 1, d)[labels], labels


@pytest.mark.parametrize(("n", "d", "classes"), [(2, 3, 1), (37, 5, 3), (150, 40, 12), (90, 200, 6)])
def test_scores_equal_their_definitions(n, d, classes):
    x, labels = uneven_classes(n, d, classes)
    scores = embedding_scores(x * torch.rand(n, 1), labels, seed=0)
    want = by_definition(x * 1.0, labels)
    del want["effective_rank"]  # of the rows as they are: below
    check_equal(scores, want)


@pytest.mark.parametrize(("n", "d", "kept"), [(50, 8, 8), (8, 50, 8), (60, 20, 3)])
def test_effective_rank_is_that_of_the_singular_values_of_the_rows_as_they_are(n, d, kept):
    x = torch.randn(n, kept, dtype=torch.float64) @ torch.randn(kept, d, dtype=torch.float64) * torch.rand(n, 1)
    labels = torch.arange(n) % 2
    want = by_definition(x, labels)["effective_rank"]
    assert embedding_scores(x, labels, seed=0)["effective_rank"] == pytest.approx(want, rel=1e-6)
    assert want <= kept


@pytest.mark.parametrize("zero_rows", [0, 7])
def test_silhouette_equals_scikit_learn(zero_rows):
    x, labels = uneven_classes(200, 16, 9)
    labels[labels == labels.mode().values] = 11
    x[torch.randperm(200)[:zero_rows]] = 0
    labels[0] = 40  # alone
    want = silhouette_score(x.double().numpy(), labels.numpy(), metric="cosine")
    assert embedding_scores(x, labels, seed=0)["silhouette"] == pytest.approx(want, rel=1e-9)


def test_retrieval_equals_pytorch_metric_learning():
    x, labels = uneven_classes(400, 24, 8)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    knn = CustomKNN(CosineSimilarity())
    found = AccuracyCalculator(include=names, k="max_bin_count", knn_func=knn, device=torch.device("cpu"))
    want = found.get_accuracy(x.double(), labels)
    scores = embedding_scores(x, labels, seed=0)
    got = [scores[name] for name in ("recall_at_1", "r_precision", "map_at_r")]
    assert got == pytest.approx([want[name] for name in names], rel=1e-9)


def test_more_rows_of_a_class_than_of_all_others_are_ranked():
    """R is above the number of chunks and pieces, and differs from row to row."""
    x, labels = torch.randn(1203, 4), (torch.arange(1203) % 40 == 0).long()
    similar = torch.nn.functional.normalize(x.double(), dim=1)
    similar = (similar @ similar.T).fill_diagonal_(-2)
    order = similar.argsort(dim=1, descending=True)
    precisions = []
    for i in range(len(x)):
        relevant = int((labels == labels[i]).sum()) - 1
        hits = (labels[order[i, :relevant]] == labels[i]).double()
        precisions.append(float((hits * hits.cumsum(0) / torch.arange(1, relevant + 1)).sum()) / relevant)
    assert embedding_scores(x, labels, seed=0)["map_at_r"] == pytest.approx(np.mean(precisions), rel=1e-6)


def test_clusters_are_those_of_the_best_restart_of_k_means():
    x, labels = uneven_classes(120, 6, 7)
    scores = embedding_scores(x, labels, seed=3)
    z = torch.nn.functional.normalize(x.double(), dim=1).numpy()
    best = KMeans(len(labels.unique()), n_init=200, random_state=0).fit(z)
    found = [KMeans(len(labels.unique()), n_init=1, random_state=i).fit(z).labels_ for i in range(40)]
    assert scores == embedding_scores(x, labels, seed=3), "seeded"
    # a restart among five comes near the best of 200; one alone may not
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(labels, best.labels_), abs=0.15)
    assert min(adjusted_rand_score(labels, f) for f in found) <= scores["ari"] <= 1
    separate = torch.eye(5)[torch.arange(50) % 5] + 0.01 * torch.randn(50, 5)
    apart = embedding_scores(separate, torch.arange(50) % 5, seed=0)
    assert (apart["nmi"], apart["ari"], apart["map_at_r"]) == (pytest.approx(1), pytest.approx(1), 1.0)


@pytest.mark.parametrize(("n", "d"), [(9, 4), (70, 3), (130, 19)])
def test_equal_rows_are_retrieved_in_order_however_many_there_are(n, d):
    labels = torch.randint(3, (n,))
    want = by_definition(torch.ones(n, 1), labels)
    for _ in range(10):
        scores = embedding_scores(torch.randn(1, d).expand(n, d), labels, seed=0)
        assert [scores[name] for name in RETRIEVAL] == pytest.approx([want[name] for name in RETRIEVAL], rel=1e-9)


def test_equal_similarities_go_to_earlier_rows():
    directions = torch.nn.functional.normalize(torch.randn(4, 19), dim=1)
    x, labels = directions[torch.randint(4, (301,))], torch.randint(3, (301,))
    want = by_definition(x, labels)
    scores = embedding_scores(x, labels, seed=0)
    assert [scores[name] for name in RETRIEVAL] == pytest.approx([want[name] for name in RETRIEVAL], rel=1e-9)


def _randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


DEGENERATE = {
    "one row": (_randn(1, 4), [0]),
    "one class": (_randn(6, 4), [2] * 6),
    "two rows of one class": (_randn(2, 4), [1, 1]),
    "two rows of two classes": (_randn(2, 4), [1, 0]),
    "a class for every row": (_randn(7, 4), [*range(7)]),
    "classes with one row": (_randn(7, 4), [0, 1, 1, 2, 3, 3, 3]),
    "identical rows": (_randn(1, 4).expand(9, 4), [0, 0, 0, 0, 1, 1, 1, 2, 3]),
    "rows of zeros": (torch.cat([torch.zeros(3, 4), _randn(4, 4)]), [0, 1, 0, 1, 1, 0, 0]),
    "nothing but zeros": (torch.zeros(5, 4), [0, 0, 1, 1, 1]),
    "opposite rows": (torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]]), [0, 1, 0, 1]),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_what_is_not_defined_is_none_and_the_rest_as_defined(case):
    x, labels = DEGENERATE[case]
    scores = embedding_scores(x, torch.tensor(labels), seed=0)
    want = by_definition(x, labels)
    check_equal(scores, want)
    several = len(set(labels)) > 1
    assert (scores["nmi"] is None, scores["ari"] is None) == (not several, not several)
    if not several or len(set(labels)) == len(labels):
        assert scores["silhouette"] is None
    elif case in ("identical rows", "nothing but zeros"):
        assert scores["silhouette"] == 0
    else:
        reference = silhouette_score(x.double().numpy(), np.array(labels), metric="cosine")
        assert scores["silhouette"] == pytest.approx(reference, abs=1e-12)
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_a_named_error(bad):
    x = torch.randn(9, 3)
    x[4, 1] = x[7, 2] = bad
    with pytest.raises(NonFinite, match="NaN or Inf in the features of 2 of 9 images"):
        embedding_scores(x, torch.arange(9) % 2, seed=0)
