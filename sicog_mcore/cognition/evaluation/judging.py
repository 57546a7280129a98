"""Judges answers by references: one outcome per item, means with intervals, and two checkpoints compared by item.

In: items of benchmark.py, generations   Out: ItemOutcomes (results.jsonl), a summary (results.json), Comparisons
Every item of the benchmark counts: one without an answer, or whose answer cannot be read, is judged wrong and says why.
Next: tools/evaluate.py
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from sicog_mcore.cognition.answer_grammar import Reading, read_quantity, read_text, read_yes_no, spoken
from sicog_mcore.cognition.answers import (
    attribute_f1,
    attributes,
    is_bare_number,
    normalise,
    read_choice,
    read_number,
    same_number,
)
from sicog_mcore.cognition.codec import final_clause
from sicog_mcore.cognition.evaluation.benchmark import BenchmarkItem
from sicog_mcore.cognition.evaluation.intervals import bootstrap_interval, mcnemar_p, weighted_mean
from sicog_mcore.cognition.prompts import Prompt, find_prompt
from sicog_mcore.cognition.records import Candidate, Generation
from sicog_mcore.cognition.spelling import plain
from sicog_mcore.errors import RecordError
from sicog_mcore.files import whole_file

FORMAT = 2  # 1 had no rules
OUTCOMES, SUMMARY = "results.jsonl", "results.json"
ALL = "(all)"  # the row of a table that stands for all categories
SHOWN = 3  # ids in a message
YES_NO: Mapping[str, frozenset[str]] = {  # references in plain form
    "yes": frozenset(("yes", "yeah", "yep", "是", "是的", "有", "对", "对的", "はい")),
    "no": frozenset(("no", "nope", "不是", "否", "没有", "不", "不对", "いいえ")),
}

Metric = Literal["exact", "numeric", "choice", "yes_no", "attributes", "loss"]
AttributeVocabulary = Mapping[str, Sequence[str]]


class Judged(NamedTuple):
    """The worth of an answer, the text found in it and its rule, or why nothing was found."""

    value: float
    found: str = ""
    rule: str = ""
    failure: str = ""


Judge = Callable[[str, BenchmarkItem], Judged]  # of a clause and its item


@dataclass(frozen=True)
class Judging:
    """The settings of judging.

    Attributes:
        metric: "auto" takes choice for items with options, yes_no where all references are that, and exact for all others.
            Numeric is ChartQA's relaxed accuracy: numbers within a tolerance, texts by plain form.
        tolerance: largest difference as a share of the reference (numeric).
        vocabulary: values of each kind of attribute (attributes).
    """

    metric: Literal["auto", "exact", "numeric", "choice", "yes_no", "attributes"] = "auto"
    tolerance: float = 0.05
    vocabulary: AttributeVocabulary | None = None


@dataclass(frozen=True)
class ItemOutcome:
    """The outcome of one item.

    Attributes:
        value: between 0 and 1; for the metric "loss" the mean over the answer's tokens, in nats.
        weight: of the item: 1, or the answer's tokens. 0 for an item that could not be measured.
        found: text that was taken from the answer.
        expected: the references.
        failure: why there was nothing to judge; empty otherwise.
        rule: that read the answer (answer_grammar.py); empty where nothing was read, and in files of format 1.
    """

    id: str
    category: str
    metric: Metric
    value: float
    weight: float
    found: str = ""
    expected: tuple[str, ...] = ()
    failure: str = ""
    rule: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints on the same items.

    Attributes:
        category: or "(all)".
        before, after: means of the two.
        difference: after - before, with its paired 95 % interval from low to high.
        wins, losses: items on which the second is better, or worse.
        p: of McNemar's exact test; None where a value is neither 0 nor 1.
    """

    category: str
    metric: str
    n: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    p: float | None


def judge(
    items: Sequence[BenchmarkItem], generations: Mapping[str, Generation], prompt_id: str, judging: Judging
) -> list[ItemOutcome]:
    """One outcome per item of the benchmark, in its order.

    Args:
        generations: by id; items that it lacks are failures.
        prompt_id: whose candidate is judged; each generation must have exactly one.

    Raises:
        RecordError: generations of other items, or not one candidate; a metric that does not fit an item.
    """
    # Answers to other items would be left out without a word.
    if strangers := sorted(generations.keys() - {item.id for item in items}):
        raise RecordError(f"{_some(strangers)} are no items of this benchmark; generate from its own rows")
    prompt = find_prompt(prompt_id)
    # Over the items of the benchmark, not over the generations: a missing answer counts as wrong.
    return [_outcome(item, generations.get(item.id), prompt, judging) for item in items]


def only_prompt(generations: Iterable[Generation]) -> str:
    """The prompt that all generations were asked with.

    Raises:
        RecordError: there are several, or none.
    """
    asked = {use.id for generation in generations for use in generation.prompts}
    if len(asked) != 1:
        raise RecordError(f"found the prompts {', '.join(sorted(asked)) or 'none'}; say which one is to be judged")
    return asked.pop()


def provenance(generations: Iterable[Generation], prompt_id: str) -> dict[str, Any]:
    """Gives the origin that all generations share, and how many answers were cut at the longest length.

    Raises:
        RecordError: they come from several checkpoints, engines, ways of sampling or versions of the prompt.
    """
    made, num_cut = set(), 0
    for generation in generations:
        version = next((use.version for use in generation.prompts if use.id == prompt_id), None)
        made.add((generation.engine, generation.checkpoint, version, generation.sampling))
        num_cut += sum(c.prompt == prompt_id and c.finish == "length" for c in generation.candidates)
    if len(made) != 1:
        found = "; ".join(sorted(" ".join(map(str, source)) for source in made))
        raise RecordError(
            f"expected generations of one checkpoint, prompt and way of sampling, found: {found or 'none'}"
        )
    engine, checkpoint, version, sampling = made.pop()
    sources = {"engine": engine, "checkpoint": checkpoint, "prompt": prompt_id, "prompt_version": version}
    return sources | {"sampling": asdict(sampling), "cut": num_cut}


def summarise(outcomes: Sequence[ItemOutcome], about: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Means, 95 % bootstrap intervals, failures and how often each rule read an answer, over all items and per category.

    Args:
        about: where the outcomes come from; stands in the summary as it is.
    """
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure)
    rules = Counter(outcome.rule for outcome in outcomes if outcome.rule)
    counts = {"failures": dict(failures.most_common()), "rules": dict(rules.most_common())}
    categories = {name: _mean(group, seed) for name, group in _groups(outcomes).items()}
    overall = categories.pop(ALL)
    return {"format": FORMAT, **overall, **counts, "categories": categories, **about}


def write_results(folder: Path, outcomes: Sequence[ItemOutcome], summary: Mapping[str, Any]) -> None:
    """Writes results.jsonl and results.json; each appears whole or not at all, the summary last."""
    lines = "".join(json.dumps(asdict(outcome), allow_nan=False) + "\n" for outcome in outcomes)
    for name, text in ((OUTCOMES, lines), (SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")):
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def read_outcomes(path: Path) -> list[ItemOutcome]:
    """The outcomes of a results.jsonl, or of the folder that holds one.

    Raises:
        RecordError: names file and line.
    """
    path = path / OUTCOMES if path.is_dir() else path
    if not path.is_file():
        raise RecordError(f"{path} does not exist; run the score or perplexity step that writes it first")
    with path.open("rb") as file:
        outcomes = [_read_outcome(line, f"{path}:{number}") for number, line in enumerate(file, 1)]
    if not outcomes:
        raise RecordError(f"{path} has no items; make it again")
    if repeated := [name for name, count in Counter(outcome.id for outcome in outcomes).items() if count > 1]:
        raise RecordError(f"{path}: {_some(repeated)} occur more than once; make it again")
    return outcomes


def compare(before: Sequence[ItemOutcome], after: Sequence[ItemOutcome], seed: int = 0) -> list[Comparison]:
    """Compares the second with the first: all items, then each category by name. Intervals are of paired differences.

    Raises:
        RecordError: the items differ, or were measured differently.
    """
    by_id = {outcome.id: outcome for outcome in after}
    ids = {outcome.id for outcome in before}
    if ids != by_id.keys():
        only = [f"{_some(sorted(s))} only in the {which}" for which, s in _sides(ids, by_id.keys()) if s]
        raise RecordError(f"the item sets differ: {'; '.join(only)}; compare results of the same benchmark")
    pairs = [(outcome, by_id[outcome.id]) for outcome in before]
    if differing := [a.id for a, b in pairs if _task(a) != _task(b)]:
        raise RecordError(
            f"{_some(differing)} differ in metric, category, weight or reference (for perplexity also where only one could "
            "be measured); judge both in the same way, with the same tokenizer"
        )
    if len({outcome.metric == "loss" for outcome in before}) > 1:
        raise RecordError("losses stand beside other metrics; compare files that one command wrote")
    # Weights were just found equal, so an item counts in both or in neither.
    measured = [(a, b) for a, b in pairs if a.weight > 0]
    second = {a.id: b for a, b in measured}
    groups = _groups([a for a, _ in measured])
    return [_comparison(name, [(a, second[a.id]) for a in group], seed) for name, group in groups.items() if group]


def _outcome(item: BenchmarkItem, generation: Generation | None, prompt: Prompt, judging: Judging) -> ItemOutcome:
    metric = _metric(item, judging)
    if generation is None or generation.failure:
        failure = generation.failure if generation else "no_generation"
        return ItemOutcome(item.id, item.category, metric, 0.0, 1.0, "", item.answers, failure)
    text = _candidate(generation, prompt.id).text
    clause = final_clause(text, prompt.style, prompt.task)
    if clause is None:
        without = "no_final_step" if prompt.style == "steps" else "empty_answer"
        failure = "think_not_closed" if spoken(text) is None else without
        return ItemOutcome(item.id, item.category, metric, 0.0, 1.0, "", item.answers, failure)
    judged = _judge_of(metric, judging)(clause, item)
    return ItemOutcome(
        item.id, item.category, metric, judged.value, 1.0, judged.found, item.answers, judged.failure, judged.rule
    )


def _metric(item: BenchmarkItem, judging: Judging) -> Metric:
    if judging.metric == "auto":
        if item.options:
            return "choice"
        return "yes_no" if all(_plain_yes_no(answer) for answer in item.answers) else "exact"
    if judging.metric == "yes_no" and not all(_plain_yes_no(answer) for answer in item.answers):
        raise RecordError(f"{item.origin}: the reference of {item.id!r} is neither yes nor no; use metric auto")
    if judging.metric == "choice" and not item.options:
        raise RecordError(f"{item.origin}: {item.id!r} has no options to choose from; use metric auto")
    if judging.metric == "attributes":
        if not judging.vocabulary:
            raise RecordError("metric attributes needs a vocabulary: the values of each kind of attribute")
        if not all(attributes(answer, judging.vocabulary) for answer in item.answers):
            raise RecordError(f"{item.origin}: the reference of {item.id!r} names no attribute of the vocabulary")
    return judging.metric


def _judge_of(metric: Metric, judging: Judging) -> Judge:
    if metric == "choice":
        return _choice
    if metric == "yes_no":
        return _yes_no
    if metric == "numeric":
        return partial(_numeric, tolerance=judging.tolerance)
    if metric == "attributes":
        return partial(_attributes, vocabulary=judging.vocabulary or {})
    return _exact


def _exact(clause: str, item: BenchmarkItem) -> Judged:
    """The whole clause, or what it states in a wrapper or behind "the answer is"; numbers also by value: 12.0 is 12."""
    stated = read_text(clause)
    if stated.value is None:
        return Judged(0.0, "", "", stated.failure)
    wanted = {normalise(answer) for answer in item.answers}
    # Both spellings count: normalise alone keeps LaTeX, which plain form takes out.
    if {normalise(stated.value), normalise(plain(stated.value))} & wanted:
        return Judged(1.0, stated.value, stated.rule)
    if normalise(clause) in wanted:
        return Judged(1.0, clause, "whole")
    numbers = [answer for answer in item.answers if is_bare_number(answer)] if is_bare_number(stated.value) else []
    right = any(same_number(stated.value, answer) for answer in numbers)
    return Judged(float(right), stated.value, "bare_number" if right else stated.rule)


def _numeric(clause: str, item: BenchmarkItem, tolerance: float) -> Judged:
    exact = _exact(clause, item)
    # A text that is equal needs no tolerance; equal numbers are judged anew, to name the rule that read them.
    by_text = exact.value and exact.rule != "bare_number"
    if by_text or exact.failure or all(read_number(answer) is None for answer in item.answers):
        return exact
    number: Reading[float] = read_quantity(clause)
    if number.value is None:
        return Judged(0.0, exact.found, "", number.failure)
    right = any(same_number(clause, answer, tolerance) for answer in item.answers)
    return Judged(float(right), f"{number.value:g}", number.rule)


def _choice(clause: str, item: BenchmarkItem) -> Judged:
    letter = read_choice(clause, item.options)
    return Judged(float(letter.value == item.answers[0]), letter.value or "", letter.rule, letter.failure)


def _yes_no(clause: str, item: BenchmarkItem) -> Judged:
    answer = read_yes_no(clause)
    right = answer.value is not None and answer.value in {_plain_yes_no(reference) for reference in item.answers}
    return Judged(float(right), answer.value or "", answer.rule, answer.failure)


def _plain_yes_no(reference: str) -> str | None:
    """Reads a reference that is nothing but a yes or a no."""
    plain = normalise(reference)
    return next((answer for answer, words in YES_NO.items() if plain in words), None)


def _attributes(clause: str, item: BenchmarkItem, vocabulary: AttributeVocabulary) -> Judged:
    found = attributes(clause, vocabulary)
    value = max(attribute_f1(found, attributes(answer, vocabulary)) for answer in item.answers)
    return Judged(value, ", ".join(f"{kind}={name}" for kind, name in sorted(found)), "vocabulary" if found else "")


def _candidate(generation: Generation, prompt_id: str) -> Candidate:
    candidates = [candidate for candidate in generation.candidates if candidate.prompt == prompt_id]
    if len(candidates) != 1:
        found = f"{len(candidates)} candidates of prompt {prompt_id!r}"
        raise RecordError(f"{generation.id!r} has {found}, expected one; generate greedily, one candidate per prompt")
    return candidates[0]


def _groups(outcomes: Sequence[ItemOutcome]) -> dict[str, list[ItemOutcome]]:
    """All, then by category; one category that holds everything says nothing and is left out."""
    groups: dict[str, list[ItemOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.category, []).append(outcome)
    named = {name or "(none)": group for name, group in sorted(groups.items())} if len(groups) > 1 else {}
    return {ALL: list(outcomes), **named}


def _mean(outcomes: Sequence[ItemOutcome], seed: int) -> dict[str, Any]:
    measured = [outcome for outcome in outcomes if outcome.weight > 0]
    entry: dict[str, Any] = {"n": len(outcomes), "metrics": sorted({outcome.metric for outcome in outcomes})}
    if not measured:
        return entry | {"mean": None, "interval": None}
    values, weights = [outcome.value for outcome in measured], [outcome.weight for outcome in measured]
    mean, interval = weighted_mean(values, weights), bootstrap_interval(values, weights, seed=seed)
    if measured[0].metric == "loss":
        entry |= {"perplexity": _exp(mean), "perplexity_interval": [_exp(bound) for bound in interval]}
        entry |= {"tokens": int(sum(weights))}
    return entry | {"mean": mean, "interval": list(interval)}


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # JSON has no infinity


def _comparison(name: str, pairs: Sequence[tuple[ItemOutcome, ItemOutcome]], seed: int) -> Comparison:
    weights = [a.weight for a, _ in pairs]
    first, second = [a.value for a, _ in pairs], [b.value for _, b in pairs]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    # Of the differences, pair by pair: items that are hard for both then widen no interval.
    low, high = bootstrap_interval(differences, weights, seed=seed)
    metric = ", ".join(sorted({a.metric for a, _ in pairs}))
    rises, falls = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    # A loss is better when it falls.
    wins, losses = (falls, rises) if metric == "loss" else (rises, falls)
    # McNemar's test is about items that are right or wrong, nothing between.
    binary = all(value in (0.0, 1.0) for value in first + second) and metric != "loss"
    return Comparison(
        category=name,
        metric=metric,
        n=len(pairs),
        before=weighted_mean(first, weights),
        after=weighted_mean(second, weights),
        difference=weighted_mean(differences, weights),
        low=low,
        high=high,
        wins=wins,
        losses=losses,
        p=mcnemar_p(wins, losses) if binary else None,
    )


def _task(outcome: ItemOutcome) -> tuple[object, ...]:
    return outcome.metric, outcome.category, outcome.weight, outcome.expected


def _sides(first: set[str], second: Iterable[str]) -> tuple[tuple[str, set[str]], tuple[str, set[str]]]:
    return ("first", first - set(second)), ("second", set(second) - first)


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(repr(name) for name in ids[:SHOWN]) + more


def _read_outcome(line: bytes, origin: str) -> ItemOutcome:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or (row | {"rule": ""}).keys() != {field.name for field in fields(ItemOutcome)}:
            raise ValueError(f"found {sorted(row) if isinstance(row, dict) else row!r}")
        texts = [row["id"], row["category"], row["found"], row["failure"], row.get("rule", ""), *row["expected"]]
        numbers = [row["value"], row["weight"]]
        if not all(isinstance(text, str) for text in texts) or not all(
            type(number) in (int, float) for number in numbers
        ):
            raise ValueError("a field has the wrong type")
        if not all(map(math.isfinite, numbers)) or row["weight"] < 0:
            raise ValueError(f"found value and weight {numbers}, expected finite numbers, and a weight of at least 0")
        if row["metric"] not in get_args(Metric):
            raise ValueError(f"unknown metric {row['metric']!r}")
    except (ValueError, TypeError) as error:
        raise RecordError(f"{origin}: no outcome of an item: {error}; make the file again") from error
    return ItemOutcome(**row | {"expected": tuple(row["expected"])})
