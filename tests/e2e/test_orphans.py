"""Whoever is killed or stopped: the others end by themselves, say it once, leave no process, and the next start goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.builders import tiny_experiment, write_dataset
from tests.e2e.runs import LAUNCHER, PATIENCE_S, REPOSITORY, read_metrics, start_launcher

pytestmark = [pytest.mark.slow, pytest.mark.fault]
MARK = "SICOG_TEST_RUN"  # in the environment of everything that a run starts
TIMEOUT_S = 10
NOTICED_S = TIMEOUT_S + 35
TORCHRUN_KILLS_S = 30  # after which torchrun ends a rank that does not end by itself


def wait_for(what: Callable[[], object], seconds: float = PATIENCE_S) -> bool:
    """Whether something became true in time."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(what())


class Runs:
    """Starts of one command in one folder."""

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder, self.output, self.mark = folder, folder / "run", mark

    def config(self, parallel: dict[str, int], steps: int = 5000) -> str:
        experiment = tiny_experiment(
            self.folder,
            output=str(self.output),
            train={"steps": steps, "packs_per_step": 2, "tensorboard": False},
            data={"token_budget": 256, "window_samples": 16, "workers": 1},
            checkpoint={"every_steps": 2},
            parallel={**parallel, "timeout_s": TIMEOUT_S},
        )
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(experiment.to_dict()))
        return str(file)

    def start(self, **parallel: int) -> subprocess.Popen[str]:
        """Two ranks under torchrun that have trained a while."""
        before = self.steps
        process = start_launcher(["--config", self.config(parallel)], 2)
        # A save is done, and the run goes on behind it.
        if not wait_for(lambda: self.steps >= before + 4 or process.poll() is not None) or process.poll() is not None:
            process.kill()
            raise AssertionError(process.communicate()[0])
        return process

    @property
    def steps(self) -> int:
        file = self.output / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0

    def alive(self) -> list[psutil.Process]:
        """Processes of ours, by their environment: names change, and orphans have other parents."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Processes that torchrun started, by rank."""
        return {
            int(process.environ()["RANK"]): process
            for process in self.alive()
            if "RANK" in process.environ() and LAUNCHER in process.cmdline()
        }

    def all_gone(self, seconds: float) -> bool:
        return wait_for(lambda: not self.alive(), seconds)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    write_dataset(tmp_path, 40)
    made = Runs(tmp_path, str(tmp_path))
    monkeypatch.setenv(MARK, made.mark)
    yield made
    for process in made.alive():
        process.kill()


def errors(text: str) -> list[str]:
    return re.findall(r"^error: .*$", text, flags=re.MULTILINE)


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
