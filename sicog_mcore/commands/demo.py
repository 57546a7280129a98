"""The demonstration: makes a small data set in the current folder and trains the demo recipe on it with two processes.

sicog demo      the same command resumes it; data/demo and runs/demo lie below the current folder

Pictures come from other packages where they are installed (the extra `demo`), else from this package alone.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from sicog_mcore.commands.demo_data import DemoDataOptions, prepare_demo_data
from sicog_mcore.commands.loop import step_environment
from sicog_mcore.commands.loop_demo_data import LoopDemoDataOptions, prepare_loop_demo
from sicog_mcore.commands.picture_sources import DISTRIBUTIONS, MissingPackage, PictureKind
from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.errors import EXIT_INTERRUPTED, ConfigError, ConfigProblem, SicogError, exit_code, printable
from sicog_mcore.flags import flag

RECIPE = "demo"
PROCESSES = 2  # as parallel.tensor of the recipe
LAST_FILE = "tokenizer.json"  # of the loop's data: what is written last


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options that ``demo`` takes.

    Attributes:
        pictures: of other packages, or this package's own (default: those of other packages where they are installed).
        steps: optimiser steps (default: as the recipe says).
    """

    pictures: PictureKind | None = None
    steps: int | None = flag(None, metavar="N")


def available_pictures() -> PictureKind:
    """Returns the richest source of pictures that is installed."""
    return "packages" if all(importlib.util.find_spec(name) for name in DISTRIBUTIONS) else "own"


def make_loop_data() -> str:
    """Makes the data of the loop's demonstration in the current folder; returns what was made, empty if it was there.

    Raises:
        ConfigError: the folder holds something else.
    """
    options = LoopDemoDataOptions(pictures=available_pictures())
    if (options.out / LAST_FILE).is_file():
        return ""
    try:
        made = prepare_loop_demo(options)
    except ValueError as error:
        fix = "start in another folder"
        raise ConfigError([ConfigProblem("data", str(options.out), str(error), fix)]) from error
    return f"{made.out}: {sum(made.counts.values())} rows for the demonstration of the loop"


def train_demo(options: DemoOptions, environment: Mapping[str, str]) -> int:
    """Trains the demo recipe on data that is there, in processes of its own; returns their exit code."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    words += ["-m", "sicog_mcore", "pretrain", "--config", RECIPE]
    words += [f"train.steps={options.steps}"] if options.steps is not None else []
    own = {name: value for name, value in step_environment(environment).items() if name not in ("RANK", "WORLD_SIZE")}
    own.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(words, env=own, check=False)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def main(options: DemoOptions, call: VerbCall) -> int:
    """Makes the data, trains, and returns the exit code of training."""
    pictures = options.pictures or available_pictures()
    try:
        made = prepare_demo_data(DemoDataOptions(pictures=pictures))
        print(printable(f"{made.out}: {made.contents or 'already complete'}"), flush=True)
        return train_demo(options, call.environment)
    except (MissingPackage, SicogError, ValueError, OSError) as error:
        print(printable(f"demo: {error}"), file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED


VERB = Verb(__doc__ or "", DemoOptions, main)
