"""Nearest neighbors of a few images: those of a full search by cosine, without the images themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_supcon.data import ArraySource
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.errors import NonFinite
from hpc_supcon.evaluation.neighbors import choose_queries, find_neighbors
from tests.dist.ranks import run_ranks

QUERIES = torch.tensor([3, 17, 18])


class Pixels(nn.Flatten):
    feature_dim = 12


class Centered(nn.Module):
    def forward(self, images):
        return images.float() - 128


def source(n=19):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (n, 3, 2, 2), dtype=torch.uint8, generator=generator)
    pixels[5] = pixels[3]  # a copy of a query is its first neighbor
    return ArraySource(pixels, torch.arange(n) * 3 // n, ("a", "b", "c"))


def found(rank, world_size, k):
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    return find_neighbors(Pixels(), source(), QUERIES, Centered(), runtime, k=k)


@pytest.mark.parametrize(("world_size", "k"), [(1, 4), (3, 4), (2, 100)])
def test_neighbors_are_those_of_a_full_search_on_any_number_of_ranks(world_size, k):
    x = source().stack().flatten(1).double() - 128
    x = x / x.norm(dim=1, keepdim=True)
    similarities = (x @ x.T).fill_diagonal_(-2)[QUERIES]
    want, index = similarities.sort(dim=1, descending=True)
    kept = min(k, 18)
    for got in run_ranks(found, world_size, k):
        assert torch.equal(got.queries, QUERIES)
        assert torch.equal(got.index, index[:, :kept])
        torch.testing.assert_close(got.similarities.double(), want[:, :kept], atol=1e-5, rtol=0)
    assert index[0, 0] == 5


def test_queries_are_of_as_many_classes_as_possible():
    labels = torch.arange(40).repeat(3)
    assert len(labels[choose_queries(labels, 10, seed=1)].unique()) == 10
    assert labels[choose_queries(labels, 80, seed=1)].bincount().tolist() == [2] * 40
    assert len(choose_queries(labels, 1000, seed=1)) == 120
    assert torch.equal(choose_queries(labels, 10, seed=1), choose_queries(labels, 10, seed=1))
    assert not torch.equal(choose_queries(labels, 10, seed=1), choose_queries(labels, 10, seed=2))


class WithNaN(Pixels):
    def forward(self, x):
        return super().forward(x).index_fill(0, torch.tensor([1]), torch.nan)


def test_features_that_are_nan_are_named():
    runtime = Runtime(Launch(), torch.device("cpu"))
    with pytest.raises(NonFinite, match="NaN or Inf for 1 of 19 images"):
        find_neighbors(WithNaN(), source(), QUERIES, Centered(), runtime, k=2)
