"""The learning rate at the points that matter."""

from __future__ import annotations

import pytest

from sicog_mcore.config import OptimConfig
from sicog_mcore.train.schedule import learning_rate, warmup_steps

CONFIG = OptimConfig(lr=1e-3, min_lr_fraction=0.1, warmup_fraction=0.1)
STEPS = 100


def test_warm_up_is_linear_from_the_first_step_to_the_peak() -> None:
    assert warmup_steps(CONFIG, STEPS) == 10
    rates = [learning_rate(step, CONFIG, STEPS) for step in range(10)]
    assert rates == pytest.approx([1e-4 * (step + 1) for step in range(10)])


def test_cosine_falls_through_the_mean_of_peak_and_minimum_to_the_minimum() -> None:
    rates = [learning_rate(step, CONFIG, STEPS) for step in range(9, STEPS)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[45] == pytest.approx(0.55e-3)
    assert rates[-1] == pytest.approx(1e-4)
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))


@pytest.mark.parametrize("fraction", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 60])
def test_every_rate_of_a_short_run_is_between_zero_and_the_peak(fraction: float, steps: int) -> None:
    config = OptimConfig(lr=2e-5, warmup_fraction=fraction)
    rates = [learning_rate(step, config, steps) for step in range(steps)]
    assert rates[0] > 0
    assert max(rates) == pytest.approx(2e-5)
    assert min(rates) >= 0


def test_last_step_without_a_minimum_is_zero() -> None:
    assert learning_rate(STEPS - 1, OptimConfig(lr=1.0), STEPS) == pytest.approx(0, abs=1e-12)


def test_steps_after_the_end_keep_the_minimum() -> None:
    assert learning_rate(STEPS + 5, CONFIG, STEPS) == pytest.approx(1e-4)
