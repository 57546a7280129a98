"""Work that fails on one rank fails on all, with the words of the rank that met the error."""

from __future__ import annotations

from typing import Any

import pytest

from sicog_mcore.config import ParallelConfig
from tests.dist import Rank, run_ranks


def _outcomes(rank: Rank) -> list[Any]:
    from sicog_mcore.errors import CheckpointError
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
