"""Checkpoints are written without a process beside the rank, and a file that cannot be written is the rank's error."""

from __future__ import annotations

import builtins
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from sicog_mcore.config import ParallelConfig
from sicog_mcore.parallel.topology import WritersFailed
from tests.dist import Rank, run_ranks

SIZE = 1000


def _sharded(rank: int, values: torch.Tensor) -> dict[str, ShardedTensor]:
    return {
        "w": ShardedTensor.from_rank_offsets("w", values, (0, rank, 2)),
        "b": ShardedTensor.from_rank_offsets("b", values[:3], (0, rank, 2)),
    }


def _save_and_load(rank: Rank, folder: str) -> tuple[list[float], list[str], str]:
    """Returns the numbers read back, the processes that a save left, and how a save into a folder that is gone fails."""
    rank.start(ParallelConfig())
    values = torch.arange(SIZE, dtype=torch.float32) + SIZE * rank.rank
    dist_checkpointing.save(_sharded(rank.rank, values), folder)
    dist_checkpointing.save(_sharded(rank.rank, values + 1), folder + "2")
    children = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    loaded = dist_checkpointing.load(_sharded(rank.rank, torch.empty(SIZE)), folder + "2")
    opened = open

    def refuse(file: object, mode: str = "r", *args: object, **options: object) -> object:
        if "w" in mode and str(file).endswith(".distcp"):
            raise OSError(28, "No space left on device")
        return opened(file, mode, *args, **options)  # type: ignore[call-overload]

    builtins.open = refuse  # type: ignore[assignment]
    try:
        dist_checkpointing.save(_sharded(rank.rank, values), folder + "3")
        failure = "none"
    except (OSError, RuntimeError, WritersFailed) as error:
        failure = f"{error!r} {vars(error)}"
    finally:
        builtins.open = opened
    return loaded["w"].tolist(), children, failure


@pytest.mark.slow
def test_a_save_starts_no_process_and_reports_what_failed(tmp_path: Path) -> None:
    for name in ("a", "a2", "a3"):
        (tmp_path / name).mkdir()
    results = run_ranks(_save_and_load, 2, str(tmp_path / "a"))
    assert [values for values, _, _ in results] == [[float(SIZE * r + i + 1) for i in range(SIZE)] for r in range(2)]
    assert [children for _, children, _ in results] == [[], []]
    assert "No space left on device" in results[0][2] and results[1][2] != "none"
