"""Scores of an embedding are the same numbers for any distribution of the rows over ranks."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon.errors import NonFinite
from hpc_supcon.evaluation.embedding_scores import embedding_scores
from hpc_supcon.losses import alignment_and_uniformity, effective_rank
from tests.dist.ranks import run_ranks
from tests.unit.evaluation.test_embedding_scores import uneven_classes

SHARES = [[0, 700], [0, 0, 700], [0, 401, 401, 700]]


def scores_of_share(rank, world_size, x, labels, bounds):
    own = slice(bounds[rank], bounds[rank + 1])
    return embedding_scores(x[own], labels[own], seed=1)


def test_scores_are_equal_on_1_2_and_3_ranks_of_which_some_have_no_row():
    x, labels = uneven_classes(700, 12, 6)
    order = labels.argsort()  # so that ranks have different classes
    x, labels = x[order], labels[order]
    want = embedding_scores(x, labels, seed=1)
    assert all(value is not None for value in want.values())
    for bounds in SHARES:
        assert run_ranks(scores_of_share, len(bounds) - 1, x, labels, bounds) == [want] * (len(bounds) - 1)


def not_finite(rank, world_size, bounds):
    x = torch.randn(6, 3)
    x[5] = float("nan")
    with pytest.raises(NonFinite, match="1 of 6 images"):
        scores_of_share(rank, world_size, x, torch.arange(6) % 2, bounds)
    return True


def test_a_row_of_one_rank_that_is_not_finite_is_an_error_on_every_rank():
    assert run_ranks(not_finite, 3, [0, 2, 2, 6]) == [True] * 3


def numbers_of_a_batch(rank, world_size, x, groups, bounds):
    own = slice(bounds[rank], bounds[rank + 1])
    pair = alignment_and_uniformity(x[own], groups[own], tile_size=5)
    return [float(value) for value in (*pair, effective_rank(x[own]))]


def test_numbers_of_a_batch_are_those_of_the_rows_of_all_ranks():
    x, labels = uneven_classes(26, 7, 4)
    scores = embedding_scores(x, labels, seed=0)
    want = pytest.approx([scores[name] for name in ("alignment", "uniformity", "effective_rank")], rel=1e-5)
    views, groups = x.view(13, 2, 7), labels.view(13, 2)
    for bounds in ([0, 13], [0, 9, 9, 13]):
        for got in run_ranks(numbers_of_a_batch, len(bounds) - 1, views, groups, bounds):
            assert got == want
