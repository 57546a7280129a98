"""Measures how sure a number is: bootstrap intervals of means and of paired differences, and McNemar's exact test.

In: a value per item, maybe a weight   Out: bounds, p   Used by: judging.py
Items are what is drawn: an interval says how the number would vary over items of the same kind, not over seeds of training.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEW = 64  # kinds of items up to which their counts are drawn, instead of the items
BLOCK = 1 << 20  # numbers drawn at once


def weighted_mean(values: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean over items; each counts as much as its weight."""
    return float(np.average(np.asarray(values, np.float64), weights=None if weights is None else np.asarray(weights)))


def bootstrap_interval(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; of paired differences where these are the values.

    Args:
        values: [n], one per item.
        weights: [n], above 0; the mean is sum(w * v) / sum(w), and an item is drawn with its weight. None is 1 for all.
        resamples: samples of n items drawn with replacement.
        seed: the same seed gives the same interval.

    Returns:
        lower and upper bound.

    Raises:
        ValueError: no values, or a weight that is not above 0.
    """
    means = _resampled_means(np.asarray(values, np.float64), weights, resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mcnemar_p(wins: int, losses: int) -> float:
    """Exact two-sided p of McNemar's test: how likely so uneven a split is if a win were as likely as a loss."""
    n = wins + losses
    # Binomial coefficients C(n, 0), C(n, 1), ... up to the smaller count, in whole numbers: exact for any n.
    tail = term = 1
    for k in range(min(wins, losses)):
        term = term * (n - k) // (k + 1)  # of n items k + 1
        tail += term
    # Both tails; they share the middle where wins equal losses, which would give more than 1.
    return min(1.0, 2 * tail / 2**n)


def _resampled_means(
    values: NDArray[np.float64], weights: ArrayLike | None, resamples: int, seed: int
) -> NDArray[np.float64]:
    """The mean of every resample, [resamples]."""
    heavy = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if not len(values) or heavy.shape != values.shape or not (heavy > 0).all():
        found = f"{len(values)} values and {len(heavy)} weights"
        raise ValueError(f"found {found}, expected equally many, at least one, and weights above 0")
    # Numerator and denominator are resampled together: a weighted mean is their ratio, and an item brings both.
    pairs = np.stack([values * heavy, heavy], axis=1)  # [n, 2]
    columns = np.ascontiguousarray(pairs.T)
    # Items are mostly right or wrong, so there are few kinds of them. How often each kind occurs among n draws is
    # multinomial: k numbers a resample instead of n, with the same distribution.
    distinct, counts = np.unique(pairs, axis=0, return_counts=True)  # [k, 2], [k]
    random, n, k = np.random.default_rng(seed), len(pairs), len(distinct)
    sums = []
    for size in _blocks(resamples, k if k <= FEW else n):
        if k <= FEW:
            sums.append(random.multinomial(n, counts / n, size=size) @ distinct)
        else:
            drawn = random.integers(n, size=(size, n), dtype=np.int32)
            sums.append(np.stack([column[drawn].sum(1) for column in columns], axis=1))
    totals = np.concatenate(sums)  # [resamples, 2]
    return totals[:, 0] / totals[:, 1]


def _blocks(resamples: int, width: int) -> list[int]:
    """Resamples at a time, so that memory stays bounded."""
    block = max(1, BLOCK // width)
    return [min(block, resamples - start) for start in range(0, resamples, block)]
