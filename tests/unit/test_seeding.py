"""Named random streams: each is its own, and each is the same on every machine."""

from __future__ import annotations

import random
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy import stats

from hpc_supcon.config import load_config
from hpc_supcon.data import TrainOrder, Views
from hpc_supcon.data.philox import uniform
from hpc_supcon.data.sources.builtin import synthetic
from hpc_supcon.data.sources.stratify import stratified_sample, stratified_split
from hpc_supcon.seeding import STREAMS, VERSION, changed_since, seed_global_generators, stream

SEEDS = (0, 1, 2**32, 2**63 - 1)


def test_no_two_of_many_streams_are_the_same():
    indices = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**33, 0)]
    seeds = [stream(s, name, *i) for s, name, i in product(SEEDS, STREAMS, indices)]
    assert len(set(seeds)) == len(seeds)
    steps = {stream(0, "views", rank, step) for rank in range(16) for step in range(500)}
    assert len(steps) == 16 * 500
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("name", STREAMS)
def test_neighboring_streams_of_one_name_are_independent(name):
    """Rank correlation of the numbers that NumPy and PyTorch draw, of neighboring indices and seeds."""
    seeds = [stream(s, name, r, i) for s in (0, 1) for r in (0, 1) for i in range(4)]
    draws = [np.random.default_rng(seed).random(2000) for seed in seeds]
    draws += [torch.rand(2000, generator=torch.Generator().manual_seed(seed)).numpy() for seed in seeds]
    for a, b in pairwise(draws):
        assert stats.spearmanr(a, b).pvalue > 1e-5
    assert stats.kstest(np.concatenate(draws), "uniform").pvalue > 1e-5


@pytest.mark.parametrize(("first", "second"), list(pairwise(STREAMS)))
def test_streams_of_different_names_are_independent(first, second):
    a, b = (np.random.default_rng(stream(5, name, 0)).random(5000) for name in (first, second))
    assert stats.spearmanr(a, b).pvalue > 1e-5


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="not in tuple"):
        stream(0, "dropout")


def test_the_numbers_are_those_of_the_definition():
    """Computed here once more from NumPy alone: they may only change together with VERSION."""
    words = np.random.SeedSequence([7, 0, STREAMS.index("views"), 2, 3, 11]).generate_state(1, np.uint64)
    assert VERSION == 2
    assert stream(7, "views", 3, 11) == int(words[0]) >> 1


def test_every_user_of_a_stream_draws_other_numbers_for_another_seed():
    labels = torch.arange(60) % 3
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    statistics = {"mean": [0.5] * 3, "std": [0.25] * 3}
    users = {
        "order": lambda seed: TrainOrder(60, 10).epoch(seed, 0, 0, 1),
        "split": lambda seed: stratified_split(labels, fraction=0.3, seed=seed)[0],
        "subset": lambda seed: stratified_sample(labels, count=20, seed=seed),
        "synthetic": lambda seed: synthetic(images=12, classes=3, image_size=8, seed=seed)[0].stack(),
        "crops": lambda seed: torch.from_numpy(uniform(seed, 0, np.arange(5), 2, 4)),
        "views": lambda seed: Views(2, 16, **statistics, seed=stream(seed, "views", 0, 0))(images),
    }
    for name, draw in users.items():
        assert torch.equal(draw(3), draw(3)), name
        assert not torch.equal(draw(3), draw(4)), name


def test_global_generators_are_all_seeded():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with torch.random.fork_rng():
        state, numpy_state = random.getstate(), np.random.get_state()
        try:
            seed_global_generators(stream(1, "layers", 0))
            first = draw()
            seed_global_generators(stream(1, "layers", 0))
            assert draw() == first
            seed_global_generators(stream(1, "layers", 1))
            assert not set(draw()) & set(first)
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def test_runs_of_an_earlier_version_are_reported():
    assert changed_since({"random_streams": VERSION}) is None
    assert "earlier version" in (changed_since({}) or "")
    assert load_config().seed == 0
