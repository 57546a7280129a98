"""Curates a round: keeps what the model agrees with itself about, and writes it as training data and preference pairs.

In: generations.jsonl and scores.jsonl of a folder, images   Out: decisions.jsonl, curated/, pairs.jsonl, funnel.json there
Next: train_stage.py on curated/, report.py
Exit code 17: the funnel let too little through, or suspiciously much; its table is printed, and nothing is written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from sicog_mcore.cognition.curation.conversations import PairBounds
from sicog_mcore.cognition.curation.curated_round import CURATED, curate
from sicog_mcore.cognition.curation.filters import LengthLimits, parse_per_prompt
from sicog_mcore.cognition.curation.funnel import Funnel, StarvedFunnel
from sicog_mcore.cognition.curation.selection import CandidateSource, Curation, RowKind, ScoreFile
from sicog_mcore.cognition.reporting.rounds import record_file
from sicog_mcore.cognition.step_options import CurateOptions
from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.errors import EXIT_GIVE_UP, EXIT_OK, ConfigError, ConfigProblem, SicogError, exit_code, printable
from sicog_mcore.lock import owned

KINDS: tuple[RowKind, ...] = get_args(RowKind)


def read_sources(options: CurateOptions) -> Iterator[CandidateSource]:
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


def read_mix(values: Sequence[str]) -> Iterator[tuple[RowKind, float]]:
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


def curation_of(options: CurateOptions) -> Curation:
    """Returns what the options ask for, their words read.

    Raises:
        ConfigError: a value that cannot be read.
    """
    rules = options.rules
    limits = LengthLimits(
        parse_per_prompt("--min-tokens", rules.min_tokens),
        parse_per_prompt("--max-tokens", rules.max_tokens),
        rules.max_repetition,
    )
    return Curation(
        sources=tuple(read_sources(options)),
        images=options.images,
        text=rules.text,
        evaluation=options.evaluation,
        limits=limits,
        image_radius=rules.image_radius,
        evaluation_radius=rules.evaluation_radius,
        text_similarity=rules.text_similarity,
        text_min_words=rules.text_min_words,
        forms=rules.forms,
        formats=rules.formats,
        mix=tuple(read_mix(rules.mix)),
        pairs=PairBounds(rules.pair_margin, rules.pair_length_ratio),
        seed=options.seed,
        min_rows=rules.min_kept,
        min_share=rules.min_share,
        max_share=rules.max_share,
        workers=rules.workers,
    )


def curate_round(options: CurateOptions, command: str = "") -> Funnel:
    """Curates the round and returns what its funnel let through; the folder of the round is owned meanwhile.

    Args:
        command: what is told to others that want the folder.

    Raises:
        StarvedFunnel: too little came through, or suspiciously much; nothing was written.
        ConfigError: a value that cannot be read, or the folder is in use.
        RecordError: a file is missing or damaged.
    """
    settings = curation_of(options)
    with owned(options.round, command, lambda line: print(printable(line), file=sys.stderr)):
        return curate(settings, options.round)


def main(options: CurateOptions, call: VerbCall) -> int:
    """Curates and prints the funnel; returns the exit code."""
    console = Console()
    try:
        funnel = curate_round(options, call.command)
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


VERB = Verb((__doc__ or "").splitlines()[0], CurateOptions, main)
