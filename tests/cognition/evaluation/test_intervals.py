"""Intervals against an independent bootstrap and against a known truth; McNemar's p by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sicog_mcore.cognition.evaluation.intervals import bootstrap_interval, mcnemar_p, weighted_mean

RANDOM_BOUND = 0.04  # in standard errors: two bootstraps of 20,000 resamples differ by so much at most
RESAMPLES = 20_000


def written_out(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """One resample after the other, other random numbers."""
    random = np.random.Generator(np.random.Philox(5))
    means = []
    for _ in range(RESAMPLES):
        drawn = random.choice(len(values), len(values))
        means.append((values[drawn] * weights[drawn]).sum() / weights[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@pytest.mark.parametrize("kind", ["right or wrong", "shares", "losses by tokens"])
def test_an_interval_is_that_of_a_written_out_bootstrap(kind: str) -> None:
    random, n = np.random.default_rng(3), 150
    weights = np.ones(n)
    if kind == "right or wrong":
        values = random.integers(0, 2, n) - random.integers(0, 2, n) * 1.0
    elif kind == "shares":
        values = random.beta(2, 3, n)
    else:
        values, weights = random.gamma(2.0, 1.0, n), random.integers(1, 60, n) * 1.0
    low, high = bootstrap_interval(values, weights, resamples=RESAMPLES)
    expected = written_out(values, weights)
    error = (expected[1] - expected[0]) / 3.92
    assert abs(low - expected[0]) < RANDOM_BOUND * error
    assert abs(high - expected[1]) < RANDOM_BOUND * error
    assert low < weighted_mean(values, weights) < high


@pytest.mark.slow  # importing scipy is
def test_an_interval_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(7).normal(0.3, 1.0, 200)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = bootstrap_interval(values, resamples=RESAMPLES)
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(low - reference.low) < RANDOM_BOUND * error
    assert abs(high - reference.high) < RANDOM_BOUND * error


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random, runs, n = np.random.default_rng(11), 400, 200
    # Both right with 0.5, only the second with 0.2, only the first with 0.1: a true difference of 0.1.
    differences = random.choice([0.0, 1.0, -1.0], p=[0.7, 0.2, 0.1], size=(runs, n))
    bounds = np.array([bootstrap_interval(d, resamples=1000, seed=i) for i, d in enumerate(differences)])
    share = ((bounds[:, 0] <= 0.1) & (0.1 <= bounds[:, 1])).mean()
    assert 0.92 <= share <= 0.98  # a binomial share of 400 with 0.95 has a standard error of 0.011


def test_the_seed_alone_decides() -> None:
    values = np.random.default_rng(0).normal(size=300)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


def test_items_without_differences_have_no_width() -> None:
    assert bootstrap_interval([0.0] * 10) == (0.0, 0.0)
    assert bootstrap_interval([0.25], [7.0]) == (0.25, 0.25)


def test_a_mean_is_weighted() -> None:
    assert weighted_mean([1.0, 4.0], [2.0, 1.0]) == 2.0
    assert weighted_mean([1.0, 4.0]) == 2.5


@pytest.mark.parametrize(("values", "weights"), [([], None), ([1.0], [0.0]), ([1.0, 2.0], [1.0])])
def test_nothing_to_draw_from_is_refused(values: list[float], weights: list[float] | None) -> None:
    with pytest.raises(ValueError, match="above 0"):
        bootstrap_interval(values, weights)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (2, 8, 112 / 1024)],
)
def test_mcnemar_by_hand(wins: int, losses: int, p: float) -> None:
    assert mcnemar_p(wins, losses) == pytest.approx(p, rel=1e-12)


def test_mcnemar_takes_many_items() -> None:
    assert 0.19 < mcnemar_p(3000, 2900) < 0.21
