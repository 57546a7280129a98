"""First weights that are no numbers end the start, with tensor and count; all-zero matrices are only said."""

from __future__ import annotations

import math

import pytest
import torch

from sicog_mcore.checkpoint.finite import SHOWN, FiniteWatch
from sicog_mcore.config import ParallelConfig
from sicog_mcore.errors import CheckpointError
from tests.dist import Rank, run_ranks


def _settle(rank: Rank, broken_rank: int | None) -> str:
    """Each rank sees two rows of each of two matrices; the zero rows of ``half`` are on rank 0 alone."""
    topology = rank.start(ParallelConfig())
    watch = FiniteWatch()
    rows = torch.ones(2, 3)
    if rank.rank == broken_rank:
        rows[0, 0], rows[1, 2] = math.nan, math.inf
    watch.see("w", rows)
    watch.see("half", torch.zeros(2, 3) if rank.rank == 0 else rows.nan_to_num())
    watch.see("empty", torch.zeros(2, 3))
    watch.see("bias", torch.zeros(3))  # a vector of zeros is usual
    watch.see("ids", torch.zeros(2, 3, dtype=torch.int64))
    try:
        return "|".join(watch.settle(topology, "model/"))
    except CheckpointError as error:
        return str(error)


@pytest.mark.slow
def test_all_ranks_say_what_any_of_them_saw() -> None:
    assert run_ranks(_settle, 2, None) == ["model/: 1 matrices are all zero: empty"] * 2
    for said in run_ranks(_settle, 2, 1):
        assert said.startswith("model/: NaN or infinite values in 1 tensors: w (2 values); ")


class OneRank:
    """The only collective that settling uses, for a world of one."""

    def gather_objects(self, value: object) -> list[object]:
        return [value]


def settle(watch: FiniteWatch) -> list[str]:
    return watch.settle(OneRank(), "here")  # type: ignore[arg-type]


def test_values_whose_sum_overflows_are_finite() -> None:
    watch = FiniteWatch()
    watch.see("large", torch.full((4, 4), 3e38))
    watch.see("balanced", torch.tensor([[1.0, -1.0]]))  # adds up to zero and is not
    assert settle(watch) == []


def test_rows_of_one_tensor_add_up_and_long_lists_are_cut() -> None:
    watch = FiniteWatch()
    for name in range(SHOWN + 2):
        for _ in range(2):
            watch.see(f"t{name}", torch.tensor([math.nan, 1.0, -math.inf]))
    with pytest.raises(CheckpointError, match=rf"in {SHOWN + 2} tensors: t0 \(4 values\).* and 2 more; "):
        settle(watch)
