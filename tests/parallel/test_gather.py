"""Parts of a tensor arrive on rank 0 in order, and work of rank 0 that fails fails everywhere."""

from __future__ import annotations

import pytest
import torch

from sicog_mcore.config import ParallelConfig
from sicog_mcore.errors import CheckpointError
from sicog_mcore.parallel.gather import gather_cuts, on_main
from tests.dist import Rank, run_ranks


def _gather(rank: Rank) -> tuple[list[list[float]], list[str], list[str]]:
    topology = rank.start(ParallelConfig())
    own = torch.full((2, 2), rank.rank + 1.5, dtype=torch.float64).T
    parts = gather_cuts(own, (1, 0), (2, 2), torch.float32, topology)
    parts += gather_cuts(own if rank.rank == 1 else None, (1,), (2, 2), torch.bfloat16, topology)
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
