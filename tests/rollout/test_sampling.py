"""Draws follow the truncated distribution, and nothing but seed and position decides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sicog_mcore.rollout.requests import Sampling
from sicog_mcore.rollout.sampling import candidate_seed, draw, log_probs, random_numbers, truncate

PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.25]], dtype=torch.float64)
LOGITS = PROBABILITIES.log().float()
DRAWS = 20_000
STANDARD_ERRORS = 5.0


def at(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def left(**options: float) -> list[int]:
    kept = truncate(PROBABILITIES, Sampling(**{"top_p": 1.0, "top_k": 0, **options}))
    return kept[0].nonzero().squeeze(-1).tolist()


def test_top_p_keeps_the_fewest_tokens_that_make_it_up() -> None:
    assert left(top_p=1.0) == [0, 1, 2, 3, 4]
    assert left(top_p=0.66) == [1, 2, 4]
    assert left(top_p=0.64) == [1, 4]
    assert left(top_p=1e-9) == [1]
    assert left(top_p=0.0) == [1]


def test_top_k_comes_first_and_top_p_takes_its_share_of_what_is_left() -> None:
    assert left(top_k=2) == [1, 4]
    assert left(top_k=9) == [0, 1, 2, 3, 4]
    assert left(top_k=2, top_p=0.6) == [1]  # 0.4 of 0.65 is above 0.6
    assert left(top_k=2, top_p=0.62) == [1, 4]


def test_of_equal_probabilities_the_lower_id_is_left() -> None:
    equal = torch.full((1, 6), 1 / 6, dtype=torch.float64)
    assert truncate(equal, Sampling(top_k=2, top_p=1.0))[0].nonzero().squeeze(-1).tolist() == [0, 1]


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    numbers = at(0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.7001, 0.7501, 1 - 2**-53)
    found = draw(LOGITS.expand(8, -1), numbers, Sampling(temperature=1.0, top_p=1.0))
    assert found.tolist() == [0, 0, 1, 1, 2, 3, 4, 4]


def test_a_number_close_to_one_never_draws_a_token_that_is_out() -> None:
    found = draw(LOGITS, at(1 - 2**-53), Sampling(temperature=1.0, top_p=0.3))
    assert found.tolist() == [1]


def test_temperature_zero_takes_the_lowest_id_of_the_most_probable() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert draw(logits, at(0.9, 0.9), Sampling(temperature=0.0)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities_at_that_temperature(temperature: float) -> None:
    expected = PROBABILITIES[0] ** (1 / temperature)
    expected = (expected / expected.sum()).numpy()
    numbers = torch.from_numpy(random_numbers(1, DRAWS))
    found = draw(LOGITS.expand(DRAWS, -1), numbers, Sampling(temperature=temperature, top_p=1.0))
    counts = np.bincount(found.numpy(), minlength=5) / DRAWS
    assert (np.abs(counts - expected) < STANDARD_ERRORS * np.sqrt(expected * (1 - expected) / DRAWS)).all()


def test_a_row_draws_alone_what_it_draws_among_others() -> None:
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    numbers, sampling = torch.from_numpy(random_numbers(7, 40)), Sampling(temperature=0.7, top_p=0.9, top_k=20)
    alone = [int(draw(logits[i : i + 1], numbers[i : i + 1], sampling)) for i in range(40)]
    assert draw(logits, numbers, sampling).tolist() == alone


def test_a_longer_row_of_numbers_begins_with_the_shorter_one() -> None:
    assert random_numbers(5, 100)[:7].tolist() == random_numbers(5, 7).tolist()
    assert random_numbers(5, 7).tolist() != random_numbers(6, 7).tolist()


def test_seeds_differ_in_everything_they_are_made_of() -> None:
    seeds = [
        candidate_seed(run, record, prompt, index)
        for run in (0, 1)
        for record in ("a", "b", "a1")
        for prompt in ("cod", "caption")
        for index in range(11)
    ]
    assert len(set(seeds)) == len(seeds) == 132
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert candidate_seed(0, "a", "cod", 0) == 6274773642039997220  # of files that exist; must never change


def test_log_probabilities_are_of_the_unmodified_model() -> None:
    assert log_probs(LOGITS, torch.tensor([2])).item() == pytest.approx(np.log(0.2), abs=1e-7)
