"""Benchmarks: rows to generate from, answers judged, two checkpoints compared item by item with intervals.

prepare: In: benchmark (.tsv, .jsonl, easy-vqa:test)   Out: a folder with rows.jsonl and images/   Next: launch/generate.py
score:   In: benchmark, generations                    Out: a folder with results.jsonl and results.json
compare: In: two results, also of launch/perplexity.py Out: a table: difference, paired 95 % interval, wins and losses
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sicog_mcore.errors import EXIT_OK, DataError, RecordError, SicogError, exit_code, printable

METRICS = ("auto", "exact", "numeric", "choice", "yes_no", "attributes")
HEADER = ("", "n", "metric", "first", "second", "difference", "95 % interval", "wins", "losses", "p")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write the rows and images that answers are generated from")
    prepare.add_argument("--images", type=Path, help="folder that the benchmark's image paths are relative to")
    score = commands.add_parser("score", help="judge generations against the references")
    score.add_argument("--generations", type=Path, required=True, help="generations.jsonl or .parquet")
    score.add_argument("--prompt", help="whose answers are judged; needed where several were asked")
    score.add_argument(
        "--metric",
        choices=METRICS,
        default="auto",
        help="auto: choice with options, yes_no by the reference, else exact",
    )
    score.add_argument("--tolerance", type=float, default=0.05, help="of numeric, relative (default: %(default)s)")
    score.add_argument("--vocabulary", type=Path, help='of attributes, a JSON file: {"colour": ["red", ...], ...}')
    for command in (prepare, score):
        command.add_argument("--benchmark", required=True, help=".tsv, .jsonl, easy-vqa:test or easy-vqa:train")
        command.add_argument("--out", type=Path, required=True, help="folder to write to")
    compare = commands.add_parser("compare", help="the second result against the first, on the same items")
    compare.add_argument("first", type=Path, help="results.jsonl, or the folder that holds it")
    compare.add_argument("second", type=Path, help="the same")
    compare.add_argument("--out", type=Path, help="JSON file for the numbers of the table")
    for command in (score, compare):
        command.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> str:
    """Writes rows and images."""
    from sicog_mcore.cognition.evaluation.benchmark import write_rows
    from sicog_mcore.cognition.evaluation.cells import UnreadCells

    unread = UnreadCells()
    count = write_rows(options.benchmark, options.images, options.out, unread)
    notes(unread.lines())
    return f"{options.out / 'rows.jsonl'}: {count} rows, images relative to {options.out}"


def score(options: argparse.Namespace) -> str:
    """Judges every item of the benchmark."""
    if options.metric == "attributes" and options.vocabulary is None:
        raise RecordError("--metric attributes needs --vocabulary, the values of each kind of attribute")
    if not 0 <= options.tolerance < 1:
        raise RecordError(f"--tolerance {options.tolerance}: expected a share from 0 to below 1")
    from sicog_mcore.cognition.evaluation.benchmark import benchmark_hash, read_items
    from sicog_mcore.cognition.evaluation.cells import UnreadCells
    from sicog_mcore.cognition.evaluation.judging import (
        Judging,
        judge,
        only_prompt,
        provenance,
        summarise,
        write_results,
    )
    from sicog_mcore.cognition.records import Generation, read_by_id

    vocabulary = read_vocabulary(options.vocabulary) if options.vocabulary else None
    generations = read_by_id(options.generations, Generation)
    prompt = options.prompt or only_prompt(generations.values())
    judging = Judging(options.metric, options.tolerance, vocabulary)
    unread = UnreadCells()
    items = read_items(options.benchmark, unread)
    notes(unread.lines())
    outcomes = judge(items, generations, prompt, judging)
    about = provenance(generations.values(), prompt)
    about |= {"benchmark": options.benchmark, "benchmark_hash": benchmark_hash(options.benchmark)}
    about |= {"judging": asdict(judging)}
    summary = summarise(outcomes, about, options.seed)
    write_results(options.out, outcomes, summary)
    if not any(generation.candidates for generation in generations.values()):
        reasons = ", ".join(f"{count} x {reason}" for reason, count in summary["failures"].items())
        raise DataError(f"{options.out}: 0 of {summary['n']} items have an answer to judge ({reasons}); generate again")
    low, high = summary["interval"]
    failures = "".join(f"; {count} x {reason}" for reason, count in summary["failures"].items())
    rules = "".join(f"{count} read by {rule}, " for rule, count in summary["rules"].items())
    cut = f"; {about['cut']} cut at the longest length" if about["cut"] else ""
    mean = f"mean {summary['mean']:.4f}, 95 % interval {low:.4f} to {high:.4f}"
    return f"{options.out}: {mean}, {rules}{summary['n']} items{failures}{cut}"


def notes(lines: Iterable[str]) -> None:
    """What a user should know though it stops nothing, on the second stream."""
    for line in lines:
        print("evaluate: note: " + "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)


def read_vocabulary(path: Path) -> dict[str, list[str]]:
    """Values of each kind of attribute.

    Raises:
        RecordError: the file is no object of lists of texts.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read ({error}); give a JSON file") from error
    lists = list(values.values()) if isinstance(values, dict) else []
    if not lists or not all(isinstance(known, list) and all(isinstance(v, str) for v in known) for known in lists):
        raise RecordError(f'{path}: expected an object of lists of texts, e.g. {{"colour": ["red", "blue"]}}')
    return values


def compare(options: argparse.Namespace) -> str:
    """The table of two results; the numbers also as JSON."""
    from sicog_mcore.cognition.evaluation import judging as evaluate
    from sicog_mcore.files import write_json

    first, second = evaluate.read_outcomes(options.first), evaluate.read_outcomes(options.second)
    comparisons = [asdict(entry) for entry in evaluate.compare(first, second, options.seed)]
    ruled = [any(outcome.rule for outcome in outcomes) for outcomes in (first, second)]
    if ruled[0] != ruled[1]:
        older = options.second if ruled[0] else options.first
        notes([f"{older} does not say which rules read its answers, so older ones did; score its generations again"])
    if options.out:
        write_json(options.out, comparisons)
    unmeasured = len([outcome for outcome in first if outcome.weight == 0])
    left_out = f"\n{unmeasured} items could be measured in neither" if unmeasured else ""
    return table(comparisons) + left_out


def table(comparisons: list[dict[str, Any]]) -> str:
    """Columns of equal width; what stands first is the name of the category."""
    rows = [HEADER]
    for entry in comparisons:
        means = [f"{entry[name]:.4f}" for name in ("before", "after")]
        interval = f"{entry['low']:+.4f} to {entry['high']:+.4f}"
        p = "" if entry["p"] is None else f"{entry['p']:.3g}"
        counts = [str(entry["wins"]), str(entry["losses"])]
        name = "".join(character if character.isprintable() else "?" for character in entry["category"])
        start = (name, str(entry["n"]), entry["metric"])
        rows.append((*start, *means, f"{entry['difference']:+.4f}", interval, *counts, p))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = parse(arguments)
    try:
        commands = {"prepare": prepare, "score": score, "compare": compare}
        print(printable(commands[options.command](options)))
    except (SicogError, OSError) as error:
        print(printable(f"evaluate: {error}"), file=sys.stderr)
        return exit_code(error)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
