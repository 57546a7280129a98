"""The self-improvement loop, one command: warm up, generate, agree, curate, train anew, and compare with a baseline.

python launch/self_improve.py --config examples/loop_demo.yaml --plan       what would run
python launch/self_improve.py --config examples/loop_demo.yaml --nproc 8    runs it, or goes on where it was stopped

A step that is done is not repeated; what depends on a changed input is. All files lie in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sicog_mcore.cognition.loop import loop_console
from sicog_mcore.cognition.loop.loop_config import read_loop
from sicog_mcore.cognition.loop.runner import StepRunner, interruptible
from sicog_mcore.cognition.loop.steps import Planned
from sicog_mcore.cognition.loop.workflow import COMPARISON, REPORT, build_steps, rounds_of
from sicog_mcore.errors import EXIT_INTERRUPTED, EXIT_OK, SicogError, printable
from sicog_mcore.files import write_json
from sicog_mcore.launcher import say
from sicog_mcore.lock import owned

PROJECT = Path(__file__).parents[1]


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the loop, see config.py")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes of training and generation")
    parser.add_argument("--only", metavar="STEP", help="run this step alone, for example on another machine")
    parser.add_argument("--plan", action="store_true", help="only show what would run, with all commands")
    options = parser.parse_args(words)
    if options.nproc < 1:
        parser.error(f"--nproc {options.nproc}: expected 1 or more")
    return options


def show_plan(planned: Sequence[Planned], console: Console, options: argparse.Namespace) -> None:
    """What will run, step by step where all may."""
    if not options.only:
        console.print(loop_console.plan_table(planned))
    console.print(loop_console.plan_summary(planned), markup=False)


def main(words: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 wrong configuration, 130 interrupted, else that of the step that failed."""
    options, console = parse(words), Console(highlight=False)
    try:
        config = read_loop(options.config)
        steps = build_steps(config, options.nproc)
        folder = Path(config.output)
        # Single steps may run on several machines at the same time: each has a lock of its own.
        owns = not (options.plan or options.only)
        with owned(folder, shlex.join(sys.argv), say, is_owner=owns):
            # A step is one process, also inside a job of many tasks, unless torchrun makes it several.
            environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
            runner = StepRunner(PROJECT, folder, options.nproc, loop_console.LiveLine(console), environment)
            planned = runner.plan(steps)
            show_plan(planned, console, options)
            if options.plan:
                commands = "\n".join(loop_console.plan_commands(planned, runner.command))
                console.print(printable(commands), markup=False, soft_wrap=True)
                return EXIT_OK
            with interruptible():
                exit_code = runner.run_only(steps, options.only) if options.only else runner.run_all(steps)
    except SicogError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    rows = loop_console.ledger_rows(runner.plan(steps))
    try:
        write_json(folder / "ledger.json", rows, shared=True)
    except SicogError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code or error.exit_code
    console.print(loop_console.ledger_table(rows, "GPU" if Path("/dev/nvidiactl").exists() else "process"))
    for place in rounds_of(config) if exit_code == EXIT_OK and not options.only else []:
        comparison = json.loads((place / COMPARISON).read_text(encoding="utf-8"))
        line = loop_console.comparison_line(place.name, comparison)
        console.print(printable(line), markup=False, soft_wrap=True)
        console.print(printable(f"report: {place / REPORT}"), markup=False, soft_wrap=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
