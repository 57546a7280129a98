"""Runs whose processes are found again whatever becomes of them, for tests that kill or stop some of them."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from tests.builders import tiny_experiment, write_dataset
from tests.e2e.runs import LAUNCHER, PATIENCE_S, start_launcher

MARK = "SICOG_TEST_RUN"  # in the environment of everything that a run starts
TIMEOUT_S = 10


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


@contextmanager
def marked_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Starts in a folder with data; what is left of them at the end is killed."""
    write_dataset(folder, 40)
    runs = Runs(folder, str(folder))
    monkeypatch.setenv(MARK, runs.mark)
    yield runs
    for process in runs.alive():
        process.kill()


def errors(text: str) -> list[str]:
    return re.findall(r"^error: .*$", text, flags=re.MULTILINE)
