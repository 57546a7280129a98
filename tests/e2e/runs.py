"""Whole runs on gloo ranks, from files on disk to metrics.jsonl, for end-to-end tests."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from sicog_mcore.config import Experiment
from tests.dist import Rank, run_ranks
from tests.interrupts import heeded

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 280  # for a run of seconds: machines are shared
LAUNCHER = str(REPOSITORY / "launch" / "pretrain_stage15.py")


def _train(rank: Rank, experiment: Experiment) -> None:
    from sicog_mcore.build import plan_build
    from sicog_mcore.train.run import train

    train(plan_build(experiment), rank.start(experiment.parallel, experiment.train.seed), "the test's command")


def train_ranks(experiment: Experiment, world_size: int) -> list[dict[str, Any]]:
    """Runs the experiment on ``world_size`` processes; returns the lines of metrics.jsonl, one per step."""
    run_ranks(_train, world_size, experiment)
    return read_metrics(Path(experiment.output))


def start_launcher(arguments: Sequence[str], ranks: int, launcher: str = LAUNCHER) -> subprocess.Popen[str]:
    """The real command of a user, in a process group of its own; it heeds SIGINT.

    Args:
        arguments: of the launcher.
        ranks: processes under torchrun; 0 for one without it.
    """
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks else []
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    with heeded():
        return subprocess.Popen(
            [sys.executable, *torchrun, launcher, *arguments],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def kill_after(process: subprocess.Popen[str], file: Path, lines: int) -> None:
    """SIGKILL to every process of a launcher's run once it has written so many lines; the run has to be under way then."""

    def is_written() -> bool:
        return file.is_file() and file.read_bytes().count(b"\n") >= lines

    deadline = time.monotonic() + PATIENCE_S
    while not is_written() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    under_way = process.poll() is None
    if under_way:
        agent = psutil.Process(process.pid)
        for one in (agent, *agent.children(recursive=True)):  # torchrun gives each rank a session of its own
            with contextlib.suppress(psutil.NoSuchProcess):  # a worker may follow its rank by itself
                one.kill()
    printed, _ = process.communicate(timeout=30)
    assert under_way and is_written(), f"ended, or too slow, before the kill at {lines} lines of {file}:\n{printed}"


def read_metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def consumed_ids(output: Path) -> dict[int, list[str]]:
    """Sample ids of each step, over all replicas, sorted."""
    steps: dict[int, list[str]] = {}
    for path in sorted(output.glob("consumed-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).extend(record["ids"])
    return {step: sorted(ids) for step, ids in sorted(steps.items())}
