"""Whoever is stopped: the others notice and name it, write down where they wait, and leave no process."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.marked import TIMEOUT_S, Runs, errors, marked_runs, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.fault]
NOTICED_S = TIMEOUT_S + 35
TORCHRUN_KILLS_S = 30  # after which torchrun ends a rank that does not end by itself


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    with marked_runs(tmp_path, monkeypatch) as made:
        yield made


@pytest.mark.parametrize(
    ("parallel", "victim", "moment"),
    [({"tensor": 2}, 1, "step"), ({"tensor": 2}, 0, "save"), ({"pipeline": 2}, 0, "step"), ({}, 1, "step")],
    ids=["TP2", "TP2, first rank, in a save", "PP2, first stage", "DP2"],
)
def test_a_stopped_rank_is_noticed_named_and_ended(
    runs: Runs, parallel: dict[str, int], victim: int, moment: str
) -> None:
    run = runs.start(**parallel)
    ranks = runs.ranks()
    if moment == "save":
        assert wait_for(lambda: any((runs.output / "checkpoints").glob("*.tmp")))
    began = time.monotonic()
    ranks[victim].send_signal(signal.SIGSTOP)
    waits = ranks[1 - victim]
    assert wait_for(lambda: not waits.is_running() or waits.status() == psutil.STATUS_ZOMBIE, NOTICED_S)
    assert time.monotonic() - began < NOTICED_S
    if parallel != {"tensor": 2} or moment == "save":
        ranks[victim].send_signal(signal.SIGCONT)  # torchrun's first signal ends it; else its second one, after a while
    assert run.wait(TORCHRUN_KILLS_S + 60) == 1 and runs.all_gone(20), runs.alive()
    text = run.communicate()[0]
    (said,) = errors(text)
    assert f"no sign of life from rank {victim} (process {ranks[victim].pid}" in said and "cut off" in said, said
    assert re.search(rf"rank +: {1 - victim} .*\n +exitcode +: 75", text), text
    stacks = (runs.output / f"stacks-{1 - victim}.txt").read_text()
    assert f"rank {1 - victim}, process" in stacks and "sicog_mcore/train/run.py" in stacks
