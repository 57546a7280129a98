"""Runs lanes of steps, a few at a time; a step that is done is not repeated, see cognition/loop/steps.py.

In: Lanes   Out: what their steps write, with build records and logs in the folder of each lane   Used by: __main__.py
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console

from examples.micro_loop.plan import Lane, ScriptOptions
from sicog_mcore.cognition.loop.loop_console import LiveLine
from sicog_mcore.cognition.loop.runner import StepRunner
from sicog_mcore.cognition.loop.steps import FOLDER, BuildRecords, WorkflowStep
from sicog_mcore.commands.loop import step_words

PROJECT = Path(__file__).parents[2]


def run_lanes(lanes: Sequence[Lane], jobs: int) -> bool:
    """Runs what is not done. Returns whether all of it succeeded; a lane that failed stops those that come after it.

    Args:
        lanes: each behind the one that it comes after.
        jobs: lanes that run at the same time, each in one process of one thread.
    """
    done: set[Path | None] = {None}
    left = list(lanes)
    running: dict[Future[int], Lane] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            for lane in [lane for lane in left if lane.after in done]:
                left.remove(lane)
                running[pool.submit(_run, lane)] = lane
            if not running:
                return not left and len(done) == len(lanes) + 1
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                lane = running.pop(future)
                if future.result() == 0:
                    done.add(lane.folder)


class _LaneLine(LiveLine):
    """Lines that begin with the name of their lane. None of them moves: several lanes write at a time."""

    def __init__(self, lane: Lane) -> None:
        super().__init__(Console(highlight=False, force_terminal=False))
        self._title = "/".join(lane.folder.parts[-2:] if lane.after else lane.folder.parts[-1:])

    def say(self, text: str) -> None:
        super().say(f"{self._title} {text}")


def words_of(step: WorkflowStep) -> list[str]:
    """The words that start a step, behind the interpreter: a script of the experiment, or a verb."""
    if isinstance(step.options, ScriptOptions):
        return [str(PROJECT / step.verb[0]), *step.options.given]
    return step_words(step)


def _run(lane: Lane) -> int:
    return StepRunner(words_of, lane.folder, 1, _LaneLine(lane)).run_all(lane.steps)


def seconds_of(lanes: Sequence[Lane]) -> float:
    """Seconds that all steps took, whenever they ran."""
    records = [BuildRecords(lane.folder / FOLDER).read(step) for lane in lanes for step in lane.steps]
    return sum(record.seconds for record in records if record)
