"""Weights of other projects into our checkpoints, our checkpoints into folders for transformers, and what is in either.

    sicog convert import --preset uhd_qwen2_7b --init.tower CLIP --init.decoder QWEN --out weights/start
    sicog convert export --checkpoint runs/stage2 --out exported --what vlm
    sicog convert inspect PATH
    sicog convert unpickle mm_projector.bin --out projector.safetensors

Training imports by itself (the same --init fields); `import` is for checking beforehand, and for importing once for many
runs: its result is given as --init.checkpoint. `import --dry-run` reads headers only. Models larger than one machine's
memory: start it with torchrun, and give --tensor and --pipeline; what is written does not depend on them.
Exit code 0: done; 1: --verify found a difference; 2: something does not fit, and the message says what; 75: a full disk.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sicog_mcore.commands.parser import add_options, formatter_for, options_from
from sicog_mcore.commands.verb import make_call
from sicog_mcore.commands.weight_options import (
    ImportFlags,
    ImportOptions,
    InspectOptions,
    UnpickleOptions,
    WeightExportOptions,
)
from sicog_mcore.errors import EXIT_OK, CheckpointError, SicogError, exit_code, printable
from sicog_mcore.ranks import silence_megatron

if TYPE_CHECKING:
    from sicog_mcore.commands.weight_steps import RankVoice, WeightListing  # imports torch

EXIT_DIFFERS = 1
IMPORT_USAGE = "%(prog)s --preset NAME --init.PART PATH ... [--config FILE.yaml] [--group.field VALUE] --out FOLDER"


def main_import(options: ImportOptions, voice: RankVoice) -> int:
    """Runs ``convert import``; returns the exit code."""
    from sicog_mcore.commands.weight_steps import import_weights

    found = import_weights(options, voice)
    if found.differs:
        return EXIT_DIFFERS
    if found.out is not None:
        voice.say(f"written: {found.out}; start from it with --init.checkpoint {found.out}")
    return EXIT_OK


def main_export(options: WeightExportOptions, voice: RankVoice) -> int:
    """Runs ``convert export``; returns the exit code."""
    from sicog_mcore.commands.weight_steps import export_weights

    return EXIT_DIFFERS if export_weights(options, voice).differs else EXIT_OK


def main_inspect(options: InspectOptions, voice: RankVoice) -> int:
    """Runs ``convert inspect``; returns the exit code.

    Raises:
        CheckpointError: the weights cannot be imported.
    """
    from sicog_mcore.commands.weight_steps import list_weights

    found = list_weights(options, voice)
    show_listing(found)
    voice.say(*found.notes)
    if found.problems:
        listed = "\n".join(f"  - {problem}" for problem in found.problems)
        raise CheckpointError(f"{options.path} cannot be imported:\n{listed}")
    return EXIT_OK


def show_listing(found: WeightListing) -> None:
    """Prints a line for each tensor, and the parameters of each part."""
    print(printable(found.title))
    for part, name, shape, dtype in found.rows:
        print(printable(f"  {part or '-':10} {name:80} {str(list(shape)):22} {dtype}"))
    for kind, count in found.parameters().items():
        print(f"{kind}: {count:,} parameters")


def main_unpickle(options: UnpickleOptions, voice: RankVoice) -> int:
    """Runs ``convert unpickle``; returns the exit code."""
    from sicog_mcore.commands.weight_steps import unpickle

    count = unpickle(options)
    print(printable(f"written: {options.out} ({count} tensors)"))
    return EXIT_OK


@dataclass(frozen=True)
class WeightWord:
    """A word below ``convert``.

    Attributes:
        about: one line of help.
        options: dataclass of its flags.
        main: does the work, prints, and returns the exit code.
    """

    about: str
    options: type
    main: Callable[[Any, RankVoice], int]


WORDS: Mapping[str, WeightWord] = {
    "import": WeightWord("other weights -> one of our checkpoints, without optimizer state", ImportFlags, main_import),
    "export": WeightWord("one of our checkpoints -> a folder for transformers", WeightExportOptions, main_export),
    "inspect": WeightWord("family, names, shapes, dtypes, parameters per part", InspectOptions, main_inspect),
    "unpickle": WeightWord("an old .bin file -> safetensors; opened as tensors only", UnpickleOptions, main_unpickle),
}


@dataclass(frozen=True)
class WeightVerb:
    """The verb convert. Its word ``import`` also takes every field of an experiment, which other families do not.

    Attributes:
        about: its help.
    """

    about: str

    def start(
        self,
        arguments: Sequence[str] | None = None,
        environment: MutableMapping[str, str] | None = None,
        program: tuple[str, ...] = (),
    ) -> int:
        """Finds the word, reads its options and runs; see Startable."""
        call = make_call(arguments, environment, program)
        found, rest = make_weight_parser(self.about, call.usage_name).parse_known_args(list(call.arguments))
        word = WORDS[found.command]
        options = options_from(word.options, found)
        is_import = word.options is ImportFlags
        if is_import:
            options = ImportOptions(flags=options, experiment=tuple(rest))
        silence_megatron("torch")  # before it is imported
        from sicog_mcore.commands.weight_steps import RankVoice
        from sicog_mcore.parallel.topology import stop_topology

        voice = RankVoice()
        try:
            if rest and not is_import:
                raise CheckpointError(f"unknown arguments: {' '.join(rest)}")
            return word.main(options, voice)
        except SicogError as error:
            if voice.is_main:
                print(printable(f"error: {error}"), file=sys.stderr)
            return exit_code(error)
        finally:
            stop_topology()


def make_weight_parser(about: str, program: str) -> argparse.ArgumentParser:
    """Returns the parser of all words below ``convert``."""
    parser = argparse.ArgumentParser(prog=program, description=about, formatter_class=formatter_for(about))
    below = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, word in WORDS.items():
        command = below.add_parser(name, help=word.about, description=word.about)
        if word.options is ImportFlags:
            command.usage = IMPORT_USAGE
        add_options(command, word.options)
    return parser


VERB = WeightVerb((__doc__ or "").strip())
