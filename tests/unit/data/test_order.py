"""Claims about which images each rank gets."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon.data import EvalOrder, TrainOrder
from hpc_supcon.errors import ConfigError, DataError


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_parts_of_all_ranks_are_the_global_batch_of_one_process(world_size):
    order = TrainOrder(n=103, batch_size=12)
    one = order.epoch(seed=5, epoch=2, rank=0, world_size=1)
    ranks = [order.epoch(seed=5, epoch=2, rank=r, world_size=world_size) for r in range(world_size)]
    assert all(rank.shape == (8, 12 // world_size) for rank in ranks)
    assert torch.equal(torch.cat(ranks, dim=1), one)


def test_an_epoch_repeats_no_image_and_drops_less_than_a_batch():
    used = TrainOrder(n=103, batch_size=12).epoch(0, 0, 0, 1).flatten()
    assert used.dtype == torch.int64
    assert len(used) == 96
    assert len(used.unique()) == 96
    assert used.min() >= 0
    assert used.max() < 103


def test_an_epoch_has_every_image_where_the_batch_size_divides_their_number():
    used = TrainOrder(n=96, batch_size=12).epoch(3, 1, 0, 1).flatten()
    assert torch.equal(used.sort().values, torch.arange(96))


def test_every_image_occurs_within_a_few_epochs():
    order = TrainOrder(n=103, batch_size=12)
    used = torch.cat([order.epoch(0, e, 0, 1).flatten() for e in range(10)])
    assert len(used.unique()) == 103


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    order = TrainOrder(n=64, batch_size=8)
    first = order.epoch(1, 0, 0, 1)
    torch.rand(3)
    assert torch.equal(first, order.epoch(1, 0, 0, 1))
    assert not torch.equal(first, order.epoch(1, 1, 0, 1))
    assert not torch.equal(first, order.epoch(0, 1, 0, 1))  # (seed, epoch) must not collapse into their sum
    assert not torch.equal(first, order.epoch(2, 0, 0, 1))


def test_a_batch_mixes_classes_of_a_class_sorted_source():
    labels = torch.arange(10).repeat_interleave(100)
    batch = labels[TrainOrder(n=1000, batch_size=100).epoch(0, 0, 0, 1)[0]]
    assert len(batch.unique()) == 10


def test_a_batch_that_cannot_be_divided_is_refused_with_the_nearest_valid_sizes():
    with pytest.raises(ConfigError, match=r"data\.batch_size=10 .* 4 ranks: use 8 or 12"):
        TrainOrder(n=64, batch_size=10).epoch(0, 0, 0, 4)
    with pytest.raises(ConfigError, match=r"use 8$"):
        TrainOrder(n=64, batch_size=3).steps(0, 8)


def test_fewer_images_than_one_batch_is_an_error():
    with pytest.raises(DataError, match=r"7 images, fewer than one batch of data\.batch_size=8"):
        TrainOrder(n=7, batch_size=8)


@pytest.mark.parametrize("kind", [TrainOrder, EvalOrder])
def test_a_batch_size_of_zero_is_an_error(kind):
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        kind(n=4, batch_size=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 10, 11, 100])
def test_evaluation_has_every_image_once_on_any_number_of_ranks(n, world_size):
    order = EvalOrder(n, batch_size=4)
    batches = [order.epoch(0, 0, rank, world_size) for rank in range(world_size)]
    assert [len(b) for b in batches] == [order.steps(rank, world_size) for rank in range(world_size)]
    everything = [batch for rank in batches for batch in rank]
    assert all(1 <= len(batch) <= 4 for batch in everything)
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *everything]), torch.arange(n))


def test_evaluation_ranges_differ_by_at_most_one_image():
    order = EvalOrder(n=11, batch_size=100)
    sizes = [sum(len(b) for b in order.epoch(0, 0, rank, 3)) for rank in range(3)]
    assert max(sizes) - min(sizes) <= 1
