"""Means, paired differences and fractions, compared with SciPy."""

from __future__ import annotations

import random
import statistics

import pytest
from scipy import stats

from hpc_supcon.pages.statistics import fraction_interval, mean_and_interval, paired_difference


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_interval_equals_that_of_scipy(n):
    values = [random.Random(i).random() for i in range(n)]
    mean, half = mean_and_interval(values)
    low, high = stats.t.interval(0.95, n - 1, loc=statistics.fmean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_one_value_has_an_interval_of_zero_and_no_value_has_none():
    assert mean_and_interval([0.25]) == (0.25, 0.0)
    assert mean_and_interval([]) is None


def test_a_paired_difference_equals_that_of_scipy_over_the_keys_that_both_have():
    rng = random.Random(1)
    a = {seed: rng.random() for seed in (0, 1, 2, 5, 9)}
    b = {seed: rng.random() for seed in (9, 5, 2, 1, 7)}
    mean, half, pairs = paired_difference(a, b)
    shared = [1, 2, 5, 9]
    found = stats.ttest_rel([b[s] for s in shared], [a[s] for s in shared]).confidence_interval(0.95)
    assert pairs == 4
    assert (mean - half, mean + half) == pytest.approx((found.low, found.high))
    assert paired_difference(a, {7: 1.0}) is None


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (7, 9), (355, 359), (359, 359), (5000, 10000)])
def test_the_interval_of_a_fraction_equals_wilson_s_of_scipy(right, n):
    found = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert fraction_interval(right / n, n) == pytest.approx((found.low, found.high), abs=1e-12)
