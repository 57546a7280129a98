"""Whoever is killed: the others end by themselves, say it once, leave no process, and the next start goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.marked import Runs, errors, marked_runs, wait_for
from tests.e2e.runs import LAUNCHER, PATIENCE_S, REPOSITORY, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.fault]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    with marked_runs(tmp_path, monkeypatch) as made:
        yield made


def test_a_second_start_is_refused_and_ranks_follow_their_torchrun(runs: Runs) -> None:
    first = runs.start(tensor=2)
    names = [" ".join(process.cmdline()) for process in runs.alive()]
    # torchrun, two ranks, the loader's worker and the tracker of its memory: nobody else writes the checkpoint.
    assert sum("spawn_main" in name for name in names) == 1, names
    kept = (runs.output / "metrics.jsonl").read_text()
    second = subprocess.run(
        [sys.executable, LAUNCHER, "--config", runs.config({})], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert second.returncode == 2 and second.stdout == ""
    assert f"is in use by another run: process {runs.ranks()[0].pid} on" in second.stderr
    assert (runs.output / "metrics.jsonl").read_text().startswith(kept) and first.poll() is None
    os.kill(first.pid, signal.SIGUSR1)  # torchrun does not handle it
    assert first.wait(30) == -signal.SIGUSR1
    assert runs.all_gone(30), runs.alive()
    text = first.communicate()[0]
    assert errors(text)[-1].startswith(f"error: torchrun (process {first.pid}) is gone, so its ranks stop")

    again = runs.start(tensor=2)
    ranks = runs.ranks()
    ranks[1].kill()
    assert again.wait(PATIENCE_S) == 1 and runs.all_gone(30), runs.alive()
    text = again.communicate()[0]
    assert "note: took over the lock of process" in text and "resuming from" in text
    assert len(errors(text)) <= 1, text  # torchrun may end the other rank before it has spoken
    assert all("rank 0 lost another rank in" in line and "rank 1 (process" in line for line in errors(text))
    steps = [line["step"] for line in read_metrics(runs.output)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_without_torchrun_outlives_its_shell_and_leaves_nothing_when_it_is_killed(runs: Runs) -> None:
    config = runs.config({})
    words = f"{sys.executable} {LAUNCHER} --config {config} > {runs.folder}/log 2>&1 &"
    subprocess.run(["sh", "-c", words], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    assert wait_for(lambda: runs.steps >= 5), (runs.folder / "log").read_text()
    (main,) = [process for process in runs.alive() if LAUNCHER in process.cmdline()]
    assert main.ppid() != os.getpid()
    lock = json.loads((runs.output / ".lock").read_text())
    assert lock["pid"] == main.pid and LAUNCHER in lock["command"]
    main.kill()
    assert runs.all_gone(30), runs.alive()
