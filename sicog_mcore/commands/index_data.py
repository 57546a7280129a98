"""Builds the index of a run's data sets beforehand: what training would do at its start, on a machine without GPUs too.

In: the words of the training's configuration, see cli.py   Out: the index's files, one line   Next: build_index.py
It takes what training takes, so that the index is the one that training looks for: ``--preset``, ``--config``, overrides.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sicog_mcore.cli import load_experiment
from sicog_mcore.commands.verb import make_call, reporting
from sicog_mcore.config import Experiment
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.launcher import say
from sicog_mcore.stages import ALIGN, DPO, FINETUNE, PERCEPTION, PRETRAIN, REASONING, StageDefaults

if TYPE_CHECKING:
    from sicog_mcore.data.index.build_index import IndexProgress, IndexReport

STAGES: Mapping[str, StageDefaults] = {
    "": {},
    "perception": PERCEPTION,
    "reasoning": REASONING,
    "align": ALIGN,
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "dpo": DPO,
}
SHOWN_EVERY_S = 5.0


@dataclass(frozen=True)
class IndexingOptions:
    """Options that ``index`` takes.

    Attributes:
        experiment: the run whose data sets are indexed.
        processes: that index at the same time; 0 takes one for each processor if that pays.
    """

    experiment: Experiment
    processes: int = 0


def index_data(options: IndexingOptions) -> IndexReport:
    """Indexes what is not indexed yet, and tells how far it is on standard error; what was done before is kept.

    Raises:
        ConfigError: data sets that cannot be opened, or an index that cannot be written.
        MachineError: the disk is full; a process died.
    """
    from sicog_mcore.data.index.build_index import IndexOptions, build_index

    shown = time.monotonic()

    def tell(progress: IndexProgress) -> None:
        nonlocal shown
        if time.monotonic() - shown >= SHOWN_EVERY_S:
            shown = time.monotonic()
            say(progress)

    return build_index(options.experiment, IndexOptions(processes=options.processes), tell)


@dataclass(frozen=True)
class IndexVerb:
    """The verb, whose words are those of the configuration and two of its own."""

    about: str

    def start(
        self,
        arguments: Sequence[str] | None = None,
        environment: MutableMapping[str, str] | None = None,
        program: tuple[str, ...] = (),
    ) -> int:
        """Builds the index that the words describe and returns the exit code; see verb.Startable."""
        call = make_call(arguments, environment, program)
        parser = argparse.ArgumentParser(
            prog=call.usage_name, description=self.about, add_help=False, allow_abbrev=False
        )
        parser.add_argument("--processes", type=int, default=0, metavar="N", help="that index; 0: one per processor")
        parser.add_argument(
            "--stage", choices=tuple(STAGES), default="", help="training stage whose defaults count (default: none)"
        )
        own, words = parser.parse_known_args(list(call.arguments))
        if own.processes < 0:
            parser.error(f"--processes {own.processes}: expected 0 or more")
        if {"-h", "--help"} & set(words):
            print(parser.format_help())

        def work() -> str:
            experiment = read_experiment(words, STAGES[own.stage], call.usage_name)
            return "\n".join(index_data(IndexingOptions(experiment, own.processes)).lines())

        return reporting("index", work)


def read_experiment(words: Sequence[str], stage: StageDefaults, program: str) -> Experiment:
    """Reads the configuration of a run, however many ranks it will have.

    Raises:
        ConfigError: anything wrong with it.
    """
    from sicog_mcore.data.preflight import check_inputs

    seen: list[Experiment] = []

    def note(experiment: Experiment) -> list[ConfigProblem]:
        seen.append(experiment)
        return []

    with suppress(ConfigError):
        load_experiment(list(words), 1, note, stage, program)
    # One replica of the model: which layout it has is known only now, and does not matter to an index.
    world_size = seen[0].parallel.model_size if seen else 1
    return load_experiment(list(words), world_size, check_inputs, stage, program)


VERB = IndexVerb((__doc__ or "").splitlines()[0])
