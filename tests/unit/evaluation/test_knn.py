"""k nearest neighbors against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from hpc_supcon.evaluation.probes.knn import NearestNeighbors, knn_accuracy, nearest


def brute_force_votes(queries, bank, labels, classes, k, temperature):
    votes = np.zeros((len(queries), classes))
    for q, query in enumerate(queries.double().numpy()):
        rows = bank.double().numpy()
        similarity = rows @ query / (np.linalg.norm(rows, axis=1) * np.linalg.norm(query))
        for i in sorted(range(len(rows)), key=lambda i: (-round(similarity[i], 9), i))[:k]:
            votes[q, labels[i]] += math.exp(similarity[i] / temperature)
    return votes / votes.sum(1, keepdims=True)


@pytest.mark.parametrize(("m", "n", "k"), [(7, 3, 7), (101, 13, 5), (101, 1, 1), (50, 31, 20)])
def test_votes_equal_brute_force(m, n, k):
    bank, labels, queries = torch.randn(m, 9), torch.randint(4, (m,)), torch.randn(n, 9)
    head = NearestNeighbors(9, 4, rows=m, k=k, temperature=0.1).fill(bank, labels)
    expected = brute_force_votes(queries, bank, labels, 4, k, 0.1)
    torch.testing.assert_close(head(queries).softmax(1).double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
    accuracy = (expected.argmax(1) == labels[:n].numpy()).mean()
    actual = knn_accuracy(bank, labels, queries, labels[:n], classes=4, k=k, temperature=0.1)
    assert actual == pytest.approx(accuracy)


@pytest.mark.parametrize("tile", [1, 2, 3, 5, 11, 100])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_tiles_change_nothing_and_ties_go_to_the_earlier_rows(tile, k):
    bank = torch.eye(3)[torch.tensor([0, 1, 0, 0, 2, 1, 0, 0, 1, 0, 2])]
    queries = torch.tensor([[1.0, 0.5, 0.25], [0.0, 0.0, 1.0]])
    similarities, rows = nearest(queries, bank, k, tile=tile)
    dense = queries @ bank.T
    for q in range(2):
        expected = sorted(range(len(bank)), key=lambda i: (-float(dense[q, i]), i))[:k]
        assert rows[q].tolist() == expected
        assert torch.equal(similarities[q], dense[q, expected])


def test_votes_are_finite_at_a_small_temperature():
    bank = torch.randn(40, 6)
    labels = torch.arange(40) % 5
    head = NearestNeighbors(6, 5, rows=40, k=3, temperature=1e-3).fill(bank, labels)
    out = head(bank)
    assert out.isfinite().all()
    assert torch.equal(out.argmax(1), labels)


@pytest.mark.parametrize(("m", "k"), [(30, 1), (30, 7), (30, 29), (30, 30), (2, 1), (1, 1)])
def test_each_row_left_out_votes_as_a_bank_without_it(m, k):
    generator = torch.Generator().manual_seed(m + k)
    bank, labels = torch.randn(m, 4, generator=generator), torch.randint(3, (m,), generator=generator)
    bank[m // 2 :] = bank[: m - m // 2].clone()  # duplicates, of which many have another class
    head = NearestNeighbors(4, 3, rows=m, k=k, temperature=0.2).fill(bank, labels)
    got = head.leave_one_out(bank, torch.arange(m))
    assert got.isfinite().all()
    for row in range(m):
        others = [i for i in range(m) if i != row]
        if others:
            without = NearestNeighbors(4, 3, rows=len(others), k=min(k, len(others)), temperature=0.2)
            want = without.fill(bank[others], labels[others])(bank[row : row + 1])
            torch.testing.assert_close(got[row].softmax(0), want[0].softmax(0), atol=1e-6, rtol=0)
        else:
            torch.testing.assert_close(got[row].softmax(0), torch.full((3,), 1 / 3))


def test_of_many_equal_rows_each_leaves_out_itself_and_no_other():
    """Row 9 is not among its own five nearest: ties go to the earlier rows."""
    bank, labels = torch.ones(10, 2), torch.tensor([0, 1, 0, 1, 1, 0, 0, 0, 0, 0])
    head = NearestNeighbors(2, 2, rows=10, k=4, temperature=0.1).fill(bank, labels)
    shares = head.leave_one_out(bank, torch.arange(10)).softmax(1)[:, 1]
    assert shares.tolist() == pytest.approx([0.75, 0.5, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], abs=1e-6)


def test_leaving_out_equals_scikit_learn():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(120, 5)), generator.integers(4, size=120)
    bank, labels = torch.from_numpy(x).float(), torch.from_numpy(y)
    head = NearestNeighbors(5, 4, rows=120, k=6, temperature=1e4).fill(bank, labels)  # all votes weigh the same
    classifier = KNeighborsClassifier(6, metric="cosine", algorithm="brute")
    want = cross_val_predict(classifier, x, y, cv=LeaveOneOut(), method="predict_proba")
    got = head.leave_one_out(bank, torch.arange(120)).softmax(1)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-3)
