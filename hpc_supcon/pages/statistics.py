"""Means, differences and fractions with their 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def mean_and_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and half width of its 95 % confidence interval, Student's t with n - 1 degrees of freedom.

    The half width of one value is 0; None without values.
    """
    if not values:
        return None
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, 0.0
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)


def paired_difference(a: Mapping[Any, float], b: Mapping[Any, float]) -> tuple[float, float, int] | None:
    """(mean of b - a over the keys in both, half width of its 95 % interval, number of pairs); None without pairs.

    Student's t of the differences: what two runs of one seed have in common does not widen the interval.
    """
    pairs = [b[key] - a[key] for key in a if key in b]
    found = mean_and_interval(pairs)
    return None if found is None else (*found, len(pairs))


def fraction_interval(fraction: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a fraction of n independent samples (Wilson 1927, in the form of Brown et al. 2001,
    eq. 4): it stays in 0..1 and is not empty where all samples are right."""
    z = 1.959963984540054  # the 0.975 quantile of the normal distribution
    center = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)
