"""Curates a round: keeps what the model agrees with itself about, and writes it as training data and preference pairs.

In: generations.jsonl and scores.jsonl of a folder, images   Out: decisions.jsonl, curated/, pairs.jsonl, funnel.json there
Next: launch/pretrain_stage15.py on curated/, tools/report.py, tools/why.py
Exit code 17: the funnel let too little through, or suspiciously much; its table is printed, and nothing is written.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from rich.console import Console

from sicog_mcore.cognition.curation.conversations import PairBounds, RowForm
from sicog_mcore.cognition.curation.curated_round import CURATED, curate
from sicog_mcore.cognition.curation.datasets import Format
from sicog_mcore.cognition.curation.filters import LengthLimits, parse_per_prompt
from sicog_mcore.cognition.curation.funnel import StarvedFunnel
from sicog_mcore.cognition.curation.selection import CandidateSource, Curation, RowKind, ScoreFile
from sicog_mcore.cognition.reporting.rounds import record_file
from sicog_mcore.errors import EXIT_GIVE_UP, EXIT_OK, ConfigError, ConfigProblem, SicogError, exit_code, printable
from sicog_mcore.lock import owned

KINDS: tuple[RowKind, ...] = get_args(RowKind)
PER_PROMPT = ("NUMBER", "PROMPT=NUMBER")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--round", type=Path, required=True, help="folder of the round; receives what is written")
    add("--images", type=Path, required=True, help="folder that the items' image paths are relative to")
    add(
        *("--tau", "-t"),
        nargs="+",
        metavar=PER_PROMPT,
        help="least score of a winner, e.g. 0.85 cod=0.9 plain=0.8 (ids or styles of prompts)",
    )
    add(
        "--source",
        nargs="+",
        action="append",
        default=[],
        metavar=("GENERATIONS", "SCORES TAU"),
        help="instead of --tau and the round's own files; SCORES TAU may come again, then each scorer may object",
    )
    add("--text", type=Path, help="LLaVA rows without images, to be mixed in")
    add(
        *("--evaluation", "-e"),
        type=Path,
        nargs="+",
        default=[],
        help="images, folders or TSV files of evaluation images; nothing like them is kept",
    )
    _add_filters(parser)
    _add_outputs(parser)
    return parser.parse_args(arguments)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--min-tokens", nargs="+", metavar=PER_PROMPT, default=["2"], help="least length of a winner")
    add("--max-tokens", nargs="+", metavar=PER_PROMPT, default=["0"], help="largest length of a winner; 0 for any")
    add("--max-repetition", type=float, default=0.3, help="largest share of repeated runs of four words in a step")
    add("--image-radius", type=int, default=4, help="bits of 64 in which repeated images may differ; -1: equal bytes")
    add("--evaluation-radius", type=int, default=8, help="the same for images of the evaluation")
    add("--text-similarity", type=float, default=0.9, help="from which on texts are repeated; 0 compares none")
    add("--text-min-words", type=int, default=20, help="shorter texts are never compared")
    add("--min-kept", type=int, default=1, help="fewer training rows end with exit code 17")
    add("--min-share", type=float, default=0.05, help="so does a smaller share of items that pass all filters")
    add("--max-share", type=float, default=1.0, help="and a larger one")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--forms", nargs="+", choices=get_args(RowForm), default=["chain"], help="rows that are made of each item")
    add("--formats", nargs="+", choices=get_args(Format), default=["jsonl"], help="files in curated/")
    add("--mix", nargs="+", metavar="KIND=PART", default=[], help=f"ratio of rows: {', '.join(KINDS)}; unnamed: none")
    add("--pair-margin", type=float, default=0.05, help="by which a rejected answer scores lower")
    add("--pair-length-ratio", type=float, default=1.5, help="by which chosen and rejected may differ in length")
    add("--seed", type=int, default=42)
    add("--workers", type=int, default=4, help="threads that decode images; the result does not depend on them")


def read_sources(options: argparse.Namespace) -> Iterator[CandidateSource]:
    """The files that --source names, or the round's own with --tau.

    Raises:
        ConfigError: both, neither, or a source without scores and thresholds.
    """
    fix = "give --tau 0.85, or --source GENERATIONS SCORES 0.85 once for each generation run"
    if bool(options.tau) == bool(options.source):
        given = "both are given" if options.tau else "neither is given"
        raise ConfigError([ConfigProblem("--tau, --source", options.tau, given, fix)])
    if options.tau:
        threshold = parse_per_prompt("--tau", options.tau)
        yield CandidateSource(
            record_file(options.round, "generations"), (ScoreFile(record_file(options.round, "scores"), threshold),)
        )
    for generations, *values in options.source:
        groups: list[tuple[str, list[str]]] = []
        for value in values:
            if groups and (_is_number(value) or groups[-1][1] and "=" in value):
                groups[-1][1].append(value)
            else:
                groups.append((value, []))
        if not groups:
            raise ConfigError([ConfigProblem("--source", generations, "has no scores", fix)])
        files = [ScoreFile(Path(name), parse_per_prompt("--source", numbers)) for name, numbers in groups]
        yield CandidateSource(Path(generations), tuple(files))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_mix(values: list[str]) -> Iterator[tuple[RowKind, float]]:
    """Reads "caption=2 answer=1".

    Raises:
        ConfigError: another kind, or no number.
    """
    for value in values:
        name, _, part = value.partition("=")
        kind = next((kind for kind in KINDS if kind == name), None)
        if kind is None or not _is_number(part):
            fix = f"give KIND=PART with one of {', '.join(KINDS)}, e.g. caption=2 answer=1 text=1"
            raise ConfigError([ConfigProblem("--mix", value, "is no part of a mix", fix)])
        yield kind, float(part)


def main(arguments: list[str] | None = None) -> int:
    """Curates; returns the exit code."""
    options = parse(arguments)
    console = Console()
    try:
        settings = read_options(options)
        with owned(options.round, shlex.join(sys.argv), lambda line: print(printable(line), file=sys.stderr)):
            funnel = curate(settings, options.round)
    except StarvedFunnel as error:
        console.print(error.funnel.table())
        print(printable(f"curate: {error}"), file=sys.stderr)
        return EXIT_GIVE_UP
    except (SicogError, OSError) as error:
        print(printable(f"curate: {error}"), file=sys.stderr)
        return exit_code(error)
    console.print(funnel.table())
    rows = ", ".join(f"{count} {form}" for form, count in sorted(funnel.rows.items()))
    pairs = ", ".join(f"{count} {what}" for what, count in sorted(funnel.pairs.items()))
    print(printable(f"{options.round / CURATED}: {funnel.rows.total()} rows ({rows}); pairs: {pairs or 'none'}"))
    return EXIT_OK


def read_options(options: argparse.Namespace) -> Curation:
    """What the command line asks for.

    Raises:
        ConfigError: a value that cannot be read.
    """
    limits = LengthLimits(
        parse_per_prompt("--min-tokens", options.min_tokens),
        parse_per_prompt("--max-tokens", options.max_tokens),
        options.max_repetition,
    )
    return Curation(
        sources=tuple(read_sources(options)),
        images=options.images,
        text=options.text,
        evaluation=tuple(options.evaluation),
        limits=limits,
        image_radius=options.image_radius,
        evaluation_radius=options.evaluation_radius,
        text_similarity=options.text_similarity,
        text_min_words=options.text_min_words,
        forms=tuple(options.forms),
        formats=tuple(options.formats),
        mix=tuple(read_mix(options.mix)),
        pairs=PairBounds(options.pair_margin, options.pair_length_ratio),
        seed=options.seed,
        min_rows=options.min_kept,
        min_share=options.min_share,
        max_share=options.max_share,
        workers=options.workers,
    )


if __name__ == "__main__":
    sys.exit(main())
