"""Parts of a tensor arrive on rank 0 in order; work that fails on one rank fails on all, in the words of that rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sicog_mcore.config import ParallelConfig
from sicog_mcore.errors import CheckpointError
from tests.dist import Rank, run_ranks


def _outcomes(rank: Rank) -> list[Any]:
    from sicog_mcore.parallel.gather import first_failure, on_all

    topology = rank.start(ParallelConfig())

    def fail_on(*ranks: int) -> int:
        if rank.rank in ranks:
            raise CheckpointError(f"rank {rank.rank} cannot read")
        return 10 + rank.rank

    found: list[Any] = [on_all(topology, fail_on)]
    for failing in ((1,), (0, 1)):
        with pytest.raises(CheckpointError) as error:
            on_all(topology, lambda ranks=failing: fail_on(*ranks))
        found.append(str(error.value))
    found.append(first_failure(topology, ["b"] if rank.rank else None))
    found.append(first_failure(topology, None))
    return found


@pytest.mark.slow
def test_the_lowest_rank_that_fails_speaks_for_all() -> None:
    for rank, outcomes in enumerate(run_ranks(_outcomes, 2)):
        assert outcomes == [10 + rank, "rank 1 cannot read", "rank 0 cannot read", ["b"], None]


def _gather(rank: Rank) -> tuple[list[list[float]], list[str], list[str]]:
    from sicog_mcore.parallel.gather import gather_shards, on_main

    topology = rank.start(ParallelConfig())
    own = torch.full((2, 2), rank.rank + 1.5, dtype=torch.float64).T
    parts = gather_shards(own, (1, 0), (2, 2), torch.float32, topology)
    parts += gather_shards(own if rank.rank == 1 else None, (1,), (2, 2), torch.bfloat16, topology)
    failures = []

    def full() -> None:
        raise OSError(28, "No space left on device")

    def broken() -> None:
        raise CheckpointError("it is damaged")

    for work in (full, broken):
        try:
            on_main(topology, work, (OSError,))
        except CheckpointError as error:
            failures.append(str(error))
    on_main(topology, lambda: None, (OSError,))
    return [part.flatten().tolist() for part in parts], [str(part.dtype) for part in parts], failures


@pytest.mark.slow
def test_parts_arrive_in_order_and_failures_everywhere() -> None:
    (parts, dtypes, failures), (none, _, others) = run_ranks(_gather, 2)
    assert parts == [[2.5] * 4, [1.5] * 4, [2.5] * 4] and none == []
    assert dtypes == ["torch.float32", "torch.float32", "torch.bfloat16"]
    assert failures == others and failures[1] == "it is damaged"
    assert failures[0].startswith("it cannot be written: [Errno 28]") and "make room" in failures[0]
