"""Scores and predictions are the same on any number of ranks, whatever share of the samples each has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpc_supcon.errors import NonFinite
from hpc_supcon.evaluation.predictions import gather_predictions
from hpc_supcon.evaluation.scores import gather_outcomes, split_scores
from tests.dist.ranks import run_ranks

N, CLASSES = 97, 7


def shared(rank, world_size, logits, labels, bounds):
    own = slice(bounds[rank], bounds[rank + 1])
    outcomes = gather_outcomes(logits[own], labels[own], "a probe")
    index = torch.arange(0, 3 * len(labels), 3)
    predictions = gather_predictions(outcomes, logits[own], index[own])
    return split_scores(outcomes, "abcdefg", seed=1), predictions.index, predictions.probabilities


@pytest.mark.parametrize("bounds", [[0, 3, N], [0, 0, N], [0, N, N], [0, 0, 13, N], [0, 50, 50, N]])
def test_scores_are_the_same_numbers_on_any_number_of_ranks(bounds):
    generator = torch.Generator().manual_seed(4)
    # sorted, so that ranks have different classes; class 6 is absent
    labels = torch.randint(CLASSES - 1, (N,), generator=generator).sort().values
    logits = torch.randn(N, CLASSES, generator=generator) * 3
    logits[torch.arange(N), labels] += 3
    scores, index, probabilities = shared(0, 1, logits, labels, [0, N])
    assert 0.3 < scores["accuracy"] < 0.95
    assert index.tolist() == list(range(0, 3 * N, 3))
    for got in run_ranks(shared, len(bounds) - 1, logits, labels, bounds):
        assert got[0] == scores  # to the last bit
        assert np.array_equal(got[1], index)
        assert np.array_equal(got[2], probabilities)
    np.testing.assert_allclose(probabilities, logits.double().softmax(dim=1), rtol=1e-7, atol=1e-38)


def not_finite_on_one_rank(rank, world_size):
    logits = torch.full((4, 3), float("nan") if rank == 1 else 0.0)
    try:
        gather_outcomes(logits, torch.zeros(4, dtype=torch.int64), "knn probe, test split")
    except NonFinite as error:
        return str(error)


def test_every_rank_says_that_logits_of_one_are_not_finite():
    told = run_ranks(not_finite_on_one_rank, 3)
    assert set(told) == {told[0]}
    assert "the logits of 4 images are NaN or Inf" in told[0]
