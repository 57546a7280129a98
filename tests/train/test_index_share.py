"""One rank builds the index of all; the others wait for as long as it takes, and hear why where it cannot be built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.config import Experiment, ParallelConfig
from sicog_mcore.errors import EXIT_CONFIG
from tests.builders import tiny_experiment, write_dataset
from tests.dist import Rank, run_ranks

NUM_ROWS = 12


def _open(rank: Rank, experiment: Experiment, block_s: float) -> tuple[int, list[str], int]:
    """Rows that this rank has opened, what it said, and blocks that it indexed itself."""
    import time

    from sicog_mcore.data.index import row_blocks
    from sicog_mcore.data.index.block_rows import BlockIndexer
    from sicog_mcore.train.feed import open_data

    row_blocks.BLOCK_ROWS = row_blocks.ENDS_ONE_IN = 1
    index_rows, built, said = BlockIndexer.index_rows, [], []

    def slow(self: BlockIndexer, *arguments: object) -> None:
        time.sleep(block_s)
        built.append(arguments)
        index_rows(self, *arguments)  # type: ignore[arg-type]

    BlockIndexer.index_rows = slow  # type: ignore[method-assign]
    topology = rank.start(experiment.parallel)
    opened = open_data(experiment, topology, notice=said.append)
    return len(opened.sizes) if opened else 0, said, len(built)


@pytest.mark.slow
def test_ranks_wait_longer_for_an_index_than_for_a_collective(tmp_path: Path) -> None:
    write_dataset(tmp_path, NUM_ROWS)
    experiment = tiny_experiment(tmp_path, parallel=ParallelConfig(timeout_s=10), data={"max_bad_rate": 1.0})
    main, other = run_ranks(_open, 2, experiment, 1.5)  # 18 s in all
    assert main[0] == other[0] == NUM_ROWS and other[1:] == ([], 0) and main[2] == NUM_ROWS
    assert main[1][-1].startswith("indexed 12 of 12 rows") and "rows/s" in main[1][0] and len(main[1]) >= 2
    again = run_ranks(_open, 2, experiment, 0.0)
    assert [(rows, built) for rows, _, built in again] == [(NUM_ROWS, 0)] * 2 and again[0][1] == []


def _refused(rank: Rank, experiment: Experiment) -> tuple[int, str]:
    from sicog_mcore.errors import SicogError
    from sicog_mcore.train.feed import open_data

    try:
        open_data(experiment, rank.start(experiment.parallel))
    except SicogError as error:
        return error.exit_code, str(error)
    return 0, ""


@pytest.mark.slow
def test_an_index_over_the_limit_or_on_a_full_disk_is_refused_on_every_rank(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, NUM_ROWS)
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A circle. " * 100}]
    path.write_text("".join(json.dumps({"id": i, "conversations": turns}) + "\n" for i in range(60_000)))
    experiment = tiny_experiment(tmp_path, data={"index_limit_s": 1})
    for code, text in run_ranks(_refused, 2, experiment):
        assert code == EXIT_CONFIG
        assert "data.index_limit_s = 1: the index of 0.06 GiB of rows is missing" in text
        assert f"sicog index --config {tmp_path}/run/index/" in text
    (tmp_path / "file").touch()
    nowhere = replace(experiment, data=replace(experiment.data, index=str(tmp_path / "file")))
    for code, text in run_ranks(_refused, 2, nowhere):
        assert code == EXIT_CONFIG and f"data.index = '{tmp_path}/file': cannot be written" in text
