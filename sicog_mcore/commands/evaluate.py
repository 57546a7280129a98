"""Benchmarks: rows to generate from, answers judged, two checkpoints compared item by item with intervals.

prepare: In: benchmark (.tsv, .jsonl, easy-vqa:test)   Out: a folder with rows.jsonl and images/   Next: generate
score:   In: benchmark, generations                    Out: a folder with results.jsonl and results.json
compare: In: two results, also of perplexity           Out: a table: difference, paired 95 % interval, wins and losses
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sicog_mcore.cognition.step_options import BenchmarkOptions, CompareOptions, JudgeOptions
from sicog_mcore.commands.verb import Verb, VerbCall, VerbFamily, reporting
from sicog_mcore.errors import DataError, RecordError

HEADER = ("", "n", "metric", "first", "second", "difference", "95 % interval", "wins", "losses", "p")


@dataclass(frozen=True)
class PreparedBenchmark:
    """Rows that answers can be generated from.

    Attributes:
        folder: holds rows.jsonl, and images/ that their paths are relative to.
        rows: how many there are.
    """

    folder: Path
    rows: int


@dataclass(frozen=True)
class JudgedAnswers:
    """Scores that answers to a benchmark reached.

    Attributes:
        folder: holds results.jsonl and results.json.
        summary: the same as in results.json: mean, interval, counts.
        answered: items for which there is an answer at all.
        cut: answers that reached the longest length.
    """

    folder: Path
    summary: Mapping[str, Any]
    answered: int
    cut: int


@dataclass(frozen=True)
class ComparedResults:
    """Two results, item by item.

    Attributes:
        entries: one mapping over all items, then one for each category, as they are written to JSON.
        unmeasured: items that could be measured in neither.
    """

    entries: list[dict[str, Any]]
    unmeasured: int


def prepare_benchmark(options: BenchmarkOptions) -> PreparedBenchmark:
    """Writes rows and images.

    Raises:
        RecordError: the benchmark is missing or damaged.
    """
    from sicog_mcore.cognition.evaluation.benchmark import write_rows
    from sicog_mcore.cognition.evaluation.cells import UnreadCells

    unread = UnreadCells()
    count = write_rows(options.benchmark, options.images, options.out, unread)
    notes(unread.lines())
    return PreparedBenchmark(options.out, count)


def judge_answers(options: JudgeOptions) -> JudgedAnswers:
    """Judges every item of the benchmark and writes the results.

    Raises:
        RecordError: a file is missing or damaged, or options that do not fit each other.
    """
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
    answered = sum(bool(generation.candidates) for generation in generations.values())
    return JudgedAnswers(options.out, summary, answered, about["cut"])


def notes(lines: Iterable[str]) -> None:
    """Prints notes, which stop nothing, to the second stream."""
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


def compare_results(options: CompareOptions) -> ComparedResults:
    """Compares the second result with the first; the numbers also as JSON where a file is named.

    Raises:
        RecordError: a result is missing or damaged, or they are of other items.
    """
    from sicog_mcore.cognition.evaluation import judging
    from sicog_mcore.files import write_json

    first, second = judging.read_outcomes(options.first), judging.read_outcomes(options.second)
    entries = [asdict(entry) for entry in judging.compare(first, second, options.seed)]
    ruled = [any(outcome.rule for outcome in outcomes) for outcomes in (first, second)]
    if ruled[0] != ruled[1]:
        older = options.second if ruled[0] else options.first
        notes([f"{older} does not say which rules read its answers, so older ones did; score its generations again"])
    if options.out:
        write_json(options.out, entries)
    return ComparedResults(entries, len([outcome for outcome in first if outcome.weight == 0]))


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


def prepare(options: BenchmarkOptions, call: VerbCall) -> int:
    """Prepares and prints a line; returns the exit code."""

    def work() -> str:
        made = prepare_benchmark(options)
        return f"{made.folder / 'rows.jsonl'}: {made.rows} rows, images relative to {made.folder}"

    return reporting("evaluate", work)


def score(options: JudgeOptions, call: VerbCall) -> int:
    """Judges and prints a line; returns the exit code."""

    def work() -> str:
        judged = judge_answers(options)
        summary, reasons = judged.summary, judged.summary["failures"].items()
        if not judged.answered:
            listed = ", ".join(f"{count} x {reason}" for reason, count in reasons)
            raise DataError(
                f"{options.out}: 0 of {summary['n']} items have an answer to judge ({listed}); generate again"
            )
        low, high = summary["interval"]
        failures = "".join(f"; {count} x {reason}" for reason, count in reasons)
        rules = "".join(f"{count} read by {rule}, " for rule, count in summary["rules"].items())
        cut = f"; {judged.cut} cut at the longest length" if judged.cut else ""
        mean = f"mean {summary['mean']:.4f}, 95 % interval {low:.4f} to {high:.4f}"
        return f"{judged.folder}: {mean}, {rules}{summary['n']} items{failures}{cut}"

    return reporting("evaluate", work)


def compare(options: CompareOptions, call: VerbCall) -> int:
    """Compares and prints a table; returns the exit code."""

    def work() -> str:
        compared = compare_results(options)
        left_out = f"\n{compared.unmeasured} items could be measured in neither" if compared.unmeasured else ""
        return table(compared.entries) + left_out

    return reporting("evaluate", work)


VERB = VerbFamily(
    (__doc__ or "").splitlines()[0],
    {
        "prepare": Verb("write the rows and images that answers are generated from", BenchmarkOptions, prepare),
        "score": Verb("judge generations against the references", JudgeOptions, score),
        "compare": Verb("the second result against the first, on the same items", CompareOptions, compare),
    },
)
