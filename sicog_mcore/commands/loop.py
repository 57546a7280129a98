"""The self-improvement loop, one command: warm up, generate, agree, curate, train anew, and compare with a baseline.

sicog loop --config loop_demo --plan       what would run
sicog loop --config loop_demo --nproc 8    runs it, or goes on where it was stopped

A step that is done is not repeated; what depends on a changed input is. All files lie in the output folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sicog_mcore.commands.parser import to_words
from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.errors import EXIT_INTERRUPTED, EXIT_OK, SicogError, printable
from sicog_mcore.flags import flag

if TYPE_CHECKING:
    from rich.console import Console

    from sicog_mcore.cognition.loop.steps import Planned, WorkflowStep

LEDGER = "ledger.json"
DEMO_RECIPE = "loop_demo"  # whose data is made where there is none
PACKAGES = Path(__file__).parents[2]  # the folder that holds this package


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options that ``loop`` takes.

    Attributes:
        config: YAML file of the loop, see loop_config.py, or the name of a recipe; loop_demo makes its own data.
        nproc: processes of training and generation.
        only: run this step alone, for example on another machine.
        plan: only show what would run, with all commands.
    """

    config: str
    nproc: int = flag(1, metavar="N")
    only: str | None = flag(None, metavar="STEP")
    plan: bool = False

    def mistake(self) -> str:
        """Names the mistake in the options; empty if there is none."""
        return "" if self.nproc >= 1 else f"--nproc {self.nproc}: expected 1 or more"


@dataclass(frozen=True)
class LoopOutcome:
    """The outcome that a loop had.

    Attributes:
        folder: of everything that the loop writes.
        exit_code: 0, or that of the first step that failed.
        planned: all steps, as they stand now.
        rounds: folders of the rounds that are finished; each holds a report and a comparison with the baseline.
    """

    folder: Path
    exit_code: int
    planned: Sequence[Planned]
    rounds: Sequence[Path] = ()


def step_words(step: WorkflowStep) -> list[str]:
    """Returns the words that start a step, behind the interpreter or its launcher."""
    return ["-m", "sicog_mcore", *step.verb, *to_words(step.options)]


def step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of steps: single processes, of this very package, whatever lies in the current folder."""
    paths = [str(PACKAGES), *filter(None, [environment.get("PYTHONPATH", "")])]
    # A step is one process, also inside a job of many tasks, unless torchrun makes it several.
    alone = {"RANK": "0", "WORLD_SIZE": "1"}
    # Without the last, `python -m` would import a file of the current folder before a library of the same name.
    return {**environment, **alone, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def run_loop(options: LoopOptions, console: Console, environment: Mapping[str, str], command: str = "") -> LoopOutcome:
    """Runs what is not done, or only plans.

    Args:
        console: receives the plan and one live line.
        environment: of the steps.
        command: what is told to others that want the output folder.

    Raises:
        ConfigError: all that is wrong with the loop's file, or its folder is in use.
    """
    from sicog_mcore.cognition.loop import loop_console
    from sicog_mcore.cognition.loop.loop_config import read_loop
    from sicog_mcore.cognition.loop.runner import StepRunner, interruptible
    from sicog_mcore.cognition.loop.workflow import build_steps, rounds_of
    from sicog_mcore.launcher import say
    from sicog_mcore.lock import owned
    from sicog_mcore.recipes import resolve

    if options.config == DEMO_RECIPE and not Path(options.config).is_file():
        from sicog_mcore.commands.demo import make_loop_data

        if made := make_loop_data():
            say(made)
    config = read_loop(Path(resolve(options.config)))
    steps = build_steps(config, options.nproc)
    folder = Path(config.output)
    # Single steps may run on several machines at the same time: each has a lock of its own.
    owns = not (options.plan or options.only)
    with owned(folder, command, say, is_owner=owns):
        live = loop_console.LiveLine(console)
        runner = StepRunner(step_words, folder, options.nproc, live, step_environment(environment))
        planned = runner.plan(steps)
        if not options.only:
            console.print(loop_console.plan_table(planned))
        console.print(loop_console.plan_summary(planned), markup=False)
        if options.plan:
            commands = "\n".join(loop_console.plan_commands(planned, runner.command))
            console.print(printable(commands), markup=False, soft_wrap=True)
            return LoopOutcome(folder, EXIT_OK, planned)
        with interruptible():
            exit_code = runner.run_only(steps, options.only) if options.only else runner.run_all(steps)
    is_whole = exit_code == EXIT_OK and not options.only
    return LoopOutcome(folder, exit_code, runner.plan(steps), rounds_of(config) if is_whole else ())


def main(options: LoopOptions, call: VerbCall) -> int:
    """Returns the exit code: 0 done, 2 wrong configuration, 130 interrupted, else that of the step that failed."""
    from rich.console import Console

    from sicog_mcore.launcher import say

    console = Console(highlight=False)
    try:
        outcome = run_loop(options, console, call.environment, call.command)
        return outcome.exit_code if options.plan else _tell(outcome, console)
    except SicogError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED


def _tell(outcome: LoopOutcome, console: Console) -> int:
    """Writes and prints the ledger, prints the comparisons; returns the exit code."""
    from sicog_mcore.cognition.loop import loop_console
    from sicog_mcore.cognition.loop.workflow import COMPARISON, REPORT
    from sicog_mcore.files import write_json
    from sicog_mcore.launcher import say

    rows = loop_console.ledger_rows(outcome.planned)
    try:
        write_json(outcome.folder / LEDGER, rows, shared=True)
    except SicogError as error:
        say(f"error: {error}")
        return outcome.exit_code or error.exit_code
    console.print(loop_console.ledger_table(rows, "GPU" if Path("/dev/nvidiactl").exists() else "process"))
    for place in outcome.rounds:
        comparison = json.loads((place / COMPARISON).read_text(encoding="utf-8"))
        line = loop_console.comparison_line(place.name, comparison)
        console.print(printable(line), markup=False, soft_wrap=True)
        console.print(printable(f"report: {place / REPORT}"), markup=False, soft_wrap=True)
    return outcome.exit_code


VERB = Verb(__doc__ or "", LoopOptions, main)
