"""Runs steps as processes, one after the other: with a log, one live line, and build records that survive any end.

In: WorkflowSteps   Out: exit code, logs/STEP.log, steps/STEP.json   Next: loop_console.py (plan and ledger as tables)
A step is locked while its process lives, even if this one is gone, so that no two write to the same place.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from sicog_mcore.cognition.loop.loop_console import LiveLine
from sicog_mcore.cognition.loop.steps import (
    FOLDER,
    HASHES,
    BuildRecord,
    BuildRecords,
    ContentHashes,
    Planned,
    WorkflowStep,
    foreign_files,
    plan,
)
from sicog_mcore.errors import EXIT_CRASH, EXIT_INTERRUPTED, EXIT_OK, ConfigError, ConfigProblem
from sicog_mcore.files import disk_faults

LOGS = "logs"
LAST_LINES = 20
POLL_S = 0.2
GRACE_S = 10.0  # for a process to end by itself after an interrupt, and again after it was told to
TAIL_BYTES = 1 << 14
# Words by which the files of trainers and generators count tokens.
TOKEN_FIELDS = ("decoder_tokens", "prefill_tokens", "decode_tokens")


class StepRunner:
    """Runs the steps of a loop.

    Args:
        words_of: what starts a step, behind the interpreter or the launcher, such as ``-m sicog_mcore score ...``.
        folder: of the loop; build records and logs are kept there.
        ranks: processes of steps that are parallel.
        screen: says what happens.
        environment: of the steps; None for that of this process.
    """

    def __init__(
        self,
        words_of: Callable[[WorkflowStep], Sequence[str]],
        folder: Path,
        ranks: int,
        screen: LiveLine,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.words_of, self.folder, self.ranks, self.screen = words_of, folder, ranks, screen
        self._environment = environment
        self.records = BuildRecords(folder / FOLDER)
        self.contents = ContentHashes(folder / FOLDER / HASHES)

    def plan(self, steps: Sequence[WorkflowStep]) -> list[Planned]:
        """Plans the steps that have to run.

        Raises:
            ConfigError: files stand where a step would write, and none of them has written these.
        """
        if problems := list(foreign_files(steps, self.records)):
            raise ConfigError(problems)
        return plan(steps, self.records, self.contents)

    def run_all(self, steps: Sequence[WorkflowStep]) -> int:
        """Runs what is not done. A step is looked at when its turn comes, for those before it may have changed nothing.

        Returns:
            exit code of the first step that fails; 0 if none does.
        """
        for number, step in enumerate(steps, 1):
            # Only what it reads counts now: everything before it is done.
            if plan([replace(step, needs=())], self.records, self.contents)[0].state == "done":
                continue
            if exit_code := self.run(step, f"[{number}/{len(steps)}] {step.name}"):
                return exit_code
        return EXIT_OK

    def run_only(self, steps: Sequence[WorkflowStep], name: str) -> int:
        """Runs one step if it is not done and those it needs are.

        Raises:
            ConfigError: there is no such step, or one that it needs is not done.
        """
        planned = {entry.step.name: entry for entry in self.plan(steps)}
        if name not in planned:
            raise ConfigError([ConfigProblem("only", name, "is no step", f"use one of {', '.join(planned)}")])
        step = planned[name].step
        if missing := [need for need in step.needs if planned[need].state != "done"]:
            problem = f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not done"
            raise ConfigError([ConfigProblem("only", name, problem, "run that first")])
        if planned[name].state == "done":
            self.screen.say(f"{name} is done")
            return EXIT_OK
        return self.run(step, name)

    def run(self, step: WorkflowStep, title: str) -> int:
        """Runs one step, whatever its state; returns its exit code, which is not 0 if it did not write what it should."""
        log = self.folder / LOGS / f"{step.name}.log"
        with disk_faults(log):
            log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(step) as lock, disk_faults(log), log.open("ab") as output:
            record = self.records.begin(step, self.contents)
            words = self.command(step)
            output.write(f"--- {datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(words)}\n".encode())
            output.flush()
            start, clock = output.tell(), time.monotonic()
            with subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[lock],
                env=self._environment,
            ) as process:
                try:
                    exit_code = self._watch(process, log, start, title)
                except KeyboardInterrupt:
                    _end(process)
                    self.records.end(step, self._spent(step, record, clock), EXIT_INTERRUPTED, self.contents)
                    raise
            missing = [str(path) for path in step.outputs if not self.contents.of(path)]
            if exit_code == EXIT_OK and missing:
                exit_code = EXIT_CRASH
                output.write(f"the step ended without {', '.join(missing)}\n".encode())
                output.flush()
            self.records.end(step, self._spent(step, record, clock), exit_code, self.contents)
            self.contents.save()
        seconds = time.monotonic() - clock
        lines = _tail(log, start)
        if exit_code:
            self.screen.failed(title, exit_code, seconds, lines, log)
        else:
            told = [line for line in lines if step.headline and line.startswith(step.headline)]
            self.screen.finished(title, seconds, told[-1] if told else "")
        return exit_code

    def command(self, step: WorkflowStep) -> list[str]:
        """The words that start a step here."""
        words = self.words_of(step)
        if step.is_parallel and self.ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
            return [sys.executable, "-u", *launcher, *words]
        return [sys.executable, "-u", *words]

    def _watch(self, process: subprocess.Popen[bytes], log: Path, start: int, title: str) -> int:
        """Waits for the end of a process; the line shows its last words."""
        with self.screen.follow(title) as show:
            while True:
                try:
                    return _exit_code(process.wait(POLL_S))
                except subprocess.TimeoutExpired:
                    lines = _tail(log, start)
                    show(lines[-1] if lines else "")

    def _spent(self, step: WorkflowStep, record: BuildRecord, clock: float) -> BuildRecord:
        """The build record with what this attempt took added."""
        seconds = time.monotonic() - clock
        return replace(
            record,
            seconds=round(record.seconds + seconds, 3),
            device_seconds=round(record.device_seconds + seconds * self.ranks * step.is_parallel, 3),
            tokens=_count_tokens(step),
        )

    @contextmanager
    def _lock(self, step: WorkflowStep) -> Iterator[int]:
        """The descriptor of a locked file; whoever inherits it holds the lock.

        Raises:
            ConfigError: somebody else holds it.
        """
        path = self.folder / FOLDER / f"{step.name}.lock"
        with disk_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                fix = "wait for it, or end it"
                raise ConfigError(
                    [ConfigProblem(step.name, str(path), "another process runs this step", fix)]
                ) from error
            yield file.fileno()


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM interrupts like Ctrl-C does."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Waits until a process has ended: first by itself, for Ctrl-C reached it too; then it is told to, then it has to."""
    for act in (lambda: None, process.terminate, process.kill):
        if process.poll() is None:
            act()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                continue


def _exit_code(returned: int) -> int:
    """As a shell reports it: 128 and the number of the signal that ended the process."""
    return returned if returned >= 0 else 128 - returned


def _tail(log: Path, start: int) -> list[str]:
    """The last lines that were written from ``start`` on, printable and without blank ones."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = deque((line for line in text.replace("\r", "\n").splitlines() if line.strip()), LAST_LINES)
    return ["".join(character if character.isprintable() else " " for character in line).rstrip() for line in lines]


def _count_tokens(step: WorkflowStep) -> int:
    """Adds up the tokens that the command itself has counted, over all its attempts."""
    if step.usage is None or not step.usage.is_file():
        return 0
    return sum(_tokens_of(line) for line in step.usage.read_text(encoding="utf-8", errors="replace").splitlines())


def _tokens_of(line: str) -> int:
    try:
        counted = json.loads(line)
    except ValueError:
        return 0  # the line that a process was writing when it was killed
    return sum(int(counted.get(name, 0)) for name in TOKEN_FIELDS)
