"""Judgements, summaries and comparisons, all with numbers that can be checked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.cognition.codec import render
from sicog_mcore.cognition.evaluation.benchmark import BenchmarkItem
from sicog_mcore.cognition.evaluation.judging import (
    ALL,
    ItemOutcome,
    Judging,
    compare,
    judge,
    only_prompt,
    provenance,
    read_outcomes,
    summarise,
    write_results,
)
from sicog_mcore.cognition.records import Candidate, Generation, PromptUse
from sicog_mcore.errors import RecordError
from sicog_mcore.rollout.requests import Sampling

OPTIONS = {"A": "a cat", "B": "a dog"}
VOCABULARY = {"colour": ["red", "blue"], "digit": ["three", "four"]}


def generation(name: str, text: str | None, prompt: str = "direct", **changes: object) -> Generation:
    """One greedy answer; None is an item that failed."""
    candidates = () if text is None else (Candidate(prompt, 0, 1, text, 3, -1.0, "stop"),)
    made = Generation(
        id=name,
        task="answer",
        image="",
        image_hash="",
        question="q",
        prompts=(PromptUse(prompt, 1, 1),),
        engine="native",
        checkpoint="c0",
        sampling=Sampling(temperature=0.0),
        seed=0,
        candidates=candidates,
        failure="image_missing" if text is None else "",
    )
    return replace(made, **changes)


AUTO = Judging()


def values(
    items: list[BenchmarkItem], texts: Mapping[str, str | None], judging: Judging = AUTO, prompt: str = "direct"
) -> list[tuple[float, str, str]]:
    """(value, found, failure) of each item."""
    generations = {name: generation(name, text, prompt) for name, text in texts.items()}
    return [(o.value, o.found, o.failure) for o in judge(items, generations, prompt, judging)]


def outcome(name: str, value: float, category: str = "", metric: str = "exact", weight: float = 1.0) -> ItemOutcome:
    return ItemOutcome(name, category, metric, value, weight, "", ("x",))  # type: ignore[arg-type]


def test_every_item_counts_whatever_became_of_it() -> None:
    items = [BenchmarkItem(str(i), "q", ("red circle",)) for i in range(5)]
    texts = {"0": "A red circle.", "1": "The answer is: red circle", "2": "blue", "3": None}
    assert values(items, texts) == [
        (1.0, "A red circle.", ""),
        (1.0, "red circle", ""),
        (0.0, "blue", ""),
        (0.0, "", "image_missing"),
        (0.0, "", "no_generation"),
    ]


def test_any_reference_is_right() -> None:
    items = [BenchmarkItem("0", "q", ("yes", "yeah"))]
    assert values(items, {"0": "Yeah!"})[0][0] == 1.0


def test_numbers_are_judged_with_tolerance_and_texts_by_plain_form() -> None:
    items = [
        BenchmarkItem(str(i), "q", (reference,)) for i, reference in enumerate(["100", "100", "100", "a few", "0.5"])
    ]
    texts = {"0": "It is 104", "1": "106", "2": "many", "3": "A few", "4": "50%"}
    assert values(items, texts, Judging("numeric")) == [
        (1.0, "104", ""),
        (0.0, "106", ""),
        (0.0, "many", "no_number"),
        (1.0, "A few", ""),
        (1.0, "0.5", ""),
    ]
    assert values(items[:1], {"0": "104"}, Judging("numeric", tolerance=0.0))[0][0] == 0.0


def test_options_are_judged_by_letter_or_by_their_own_words() -> None:
    items = [BenchmarkItem(str(i), "q", ("B",), OPTIONS) for i in range(4)]
    texts = {"0": "The answer is (B) because A is wrong.", "1": "a dog", "2": "A", "3": "neither"}
    assert values(items, texts) == [(1.0, "B", ""), (1.0, "B", ""), (0.0, "A", ""), (0.0, "", "no_choice")]


def test_of_steps_only_the_last_one_is_judged() -> None:
    right = render(["Find the animal.", "A cat, option A.", "It barks, so not A.", "The answer is B."], "cot")
    items = [BenchmarkItem(name, "q", ("B",), OPTIONS) for name in ("0", "1")]
    found = values(items, {"0": right, "1": "The answer is B."}, prompt="cot")
    assert found == [(1.0, "B", ""), (0.0, "", "no_final_step")]


def readings(
    items: list[BenchmarkItem], texts: Mapping[str, str], judging: Judging = AUTO
) -> list[tuple[str, float, str, str]]:
    """(metric, value, found, rule or failure) of each item."""
    made = {name: generation(name, text) for name, text in texts.items()}
    return [(o.metric, o.value, o.found, o.rule or o.failure) for o in judge(items, made, "direct", judging)]


def test_every_score_names_the_rule_that_read_the_answer() -> None:
    items = [BenchmarkItem(str(i), "q", ("B",), OPTIONS) for i in range(5)]
    texts = {
        "0": r"Not A, so \boxed{B}",
        "1": "答案是B",
        "2": "It is a dog",
        "3": "<think>B",
        "4": "A: right. B: right.",
    }
    assert readings(items, texts) == [
        ("choice", 1.0, "B", "boxed"),
        ("choice", 1.0, "B", "cue"),
        ("choice", 1.0, "B", "own_words"),
        ("choice", 0.0, "", "think_not_closed"),
        ("choice", 0.0, "", "several_answers"),
    ]
    made = {name: generation(name, text) for name, text in texts.items()}
    summary = summarise(judge(items, made, "direct", AUTO), {})
    assert summary["rules"] == {"boxed": 1, "cue": 1, "own_words": 1}
    assert summary["failures"] == {"think_not_closed": 1, "several_answers": 1}
    assert summary["format"] == 2


def test_yes_and_no_are_judged_by_the_first_word() -> None:
    references = ["yes", "No", "no", "yes", "yes", "否", "a yes man"]
    items = [BenchmarkItem(str(i), "q", (reference,)) for i, reference in enumerate(references)]
    texts = {
        "0": "Yes, it is.",
        "1": "No, there is no dog.",
        "2": "It is not blue.",
        "3": "No.",
        "4": "It is blue.",
        "5": "没有。",
        "6": "Yes",
    }
    assert readings(items, texts) == [
        ("yes_no", 1.0, "yes", "yes_no_first_word"),
        ("yes_no", 1.0, "no", "yes_no_first_word"),
        ("yes_no", 1.0, "no", "yes_no_negation"),
        ("yes_no", 0.0, "no", "yes_no_first_word"),
        ("yes_no", 0.0, "", "no_yes_no"),
        ("yes_no", 1.0, "no", "yes_no_first_word"),
        ("exact", 0.0, "Yes", "whole"),
    ]
    with pytest.raises(RecordError, match="neither yes nor no"):
        readings(items, texts, Judging("yes_no"))


@pytest.mark.parametrize(
    ("text", "reference", "value", "rule"),
    [
        (r"\boxed{12}", "12", 1.0, "boxed"),
        (r"So $\fbox{\text{red}}$", "red", 1.0, "boxed"),
        ("<answer>12</answer>", "12", 1.0, "answer_tag"),
        ("<CONCLUSION> red </CONCLUSION>", "Red.", 1.0, "answer_tag"),
        ('{"answer": "red"}', "red", 1.0, "json"),
        ("<think>blue</think>red", "red", 1.0, "whole"),
        ("The answer is red because it is hot.", "red", 1.0, "cue"),
        ("The answer is red. It is hot.", "red", 1.0, "cue"),
        ("The answer is 12.\nThere are 12 of them.", "12", 1.0, "cue"),
        ("The answer is Dr. No.", "Dr. No", 1.0, "cue"),
        ("### Final Answer\n\n**red**", "red", 1.0, "cue"),
        ("3 x 4 = 12\n#### 12", "12", 1.0, "cue"),
        (r"$\text{red}$", "red", 1.0, "whole"),
        ("12.0", "12", 1.0, "bare_number"),
        ("１２", "12", 1.0, "whole"),
        ("The answer is 12.0", "twelve", 1.0, "bare_number"),
        ("twenty-one", "21", 1.0, "bare_number"),
        ("3×10⁸", "3e8", 1.0, "bare_number"),
        ("1 234", "1,234", 1.0, "bare_number"),
        ("$12.00$", "12", 1.0, "bare_number"),
        ("十二", "12", 1.0, "bare_number"),
        ("6/8", "3/4", 0.0, "whole"),
        ("12cm", "12", 0.0, "whole"),
        ("12.5", "12", 0.0, "whole"),
        ("007", "7", 0.0, "whole"),
        ("12 apples", "12", 0.0, "whole"),
        (r"\boxed{1} or \boxed{2}", "1", 0.0, "several_answers"),
    ],
)
def test_open_answers_are_taken_out_of_their_wrappers(text: str, reference: str, value: float, rule: str) -> None:
    (reading,) = readings([BenchmarkItem("0", "q", (reference,))], {"0": text})
    assert (reading[0], reading[1], reading[3]) == ("exact", value, rule)


def test_numbers_are_read_however_they_are_spelled() -> None:
    texts = ["12cm", "3/4", r"\boxed{1{,}234}", "3×10⁸", "twenty-one", "3 or 4"]
    items = [BenchmarkItem(str(i), "q", (ref,)) for i, ref in enumerate(["12", "0.75", "1234", "3e8", "21", "3"])]
    found = readings(items, {str(i): text for i, text in enumerate(texts)}, Judging("numeric"))
    assert [(value, rule) for _, value, _, rule in found] == [
        (1.0, "only_number"),
        (1.0, "only_number"),
        (1.0, "boxed"),
        (1.0, "only_number"),
        (1.0, "only_number"),
        (0.0, "no_number"),
    ]


def test_results_of_format_1_are_still_read(tmp_path: Path) -> None:
    write_results(tmp_path, [outcome("0", 1.0)], {})
    row = json.loads((tmp_path / "results.jsonl").read_text())
    del row["rule"]
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    assert read_outcomes(tmp_path) == [outcome("0", 1.0)]


def test_attributes_are_judged_by_f1() -> None:
    items = [BenchmarkItem("0", "q", ("a red three",)), BenchmarkItem("1", "q", ("a blue four",))]
    found = values(items, {"0": "Red, 4 and blue", "1": "nothing"}, Judging("attributes", vocabulary=VOCABULARY))
    assert found[0] == (2 / 5, "colour=blue, colour=red, digit=four", "")
    assert found[1][0] == 0.0
    with pytest.raises(RecordError, match="names no attribute"):
        values([BenchmarkItem("2", "q", ("green",))], {}, Judging("attributes", vocabulary=VOCABULARY))


@pytest.mark.parametrize(
    ("generations", "message"),
    [
        ({"9": generation("9", "x")}, "'9' are no items"),
        ({"0": generation("0", "x", "caption")}, "0 candidates of prompt 'direct'"),
        ({"0": replace(generation("0", "x"), candidates=generation("0", "x").candidates * 2)}, "2 candidates"),
    ],
)
def test_answers_that_do_not_belong_are_refused(generations: dict[str, Generation], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        judge([BenchmarkItem("0", "q", ("a",))], generations, "direct", Judging())


def test_what_was_mixed_is_refused() -> None:
    one, other = generation("0", "x"), generation("1", "x", checkpoint="c1")
    assert provenance([one, generation("1", "y")], "direct")["checkpoint"] == "c0"
    with pytest.raises(RecordError, match="one checkpoint"):
        provenance([one, other], "direct")
    with pytest.raises(RecordError, match="say which one"):
        only_prompt([one, generation("1", "x", "caption")])
    with pytest.raises(RecordError, match="none"):
        only_prompt([])


def test_cut_answers_are_counted() -> None:
    cut = replace(generation("0", "x").candidates[0], finish="length")
    made = [generation("0", "x", candidates=(cut,)), generation("1", "y")]
    assert provenance(made, "direct")["cut"] == 1


def test_a_summary_has_means_per_category() -> None:
    outcomes = [outcome("0", 1.0, "a"), outcome("1", 0.0, "a"), outcome("2", 1.0, "b")]
    outcomes.append(replace(outcome("3", 0.0, "b"), failure="no_generation"))
    summary = summarise(outcomes, {"checkpoint": "c0"})
    assert (summary["n"], summary["mean"], summary["failures"]) == (4, 0.5, {"no_generation": 1})
    assert {name: entry["mean"] for name, entry in summary["categories"].items()} == {"a": 0.5, "b": 0.5}
    assert summary["interval"][0] < 0.5 < summary["interval"][1]
    assert summary["checkpoint"] == "c0"


def test_perplexity_weighs_tokens_and_leaves_out_what_was_not_measured() -> None:
    outcomes = [outcome("0", 1.0, metric="loss", weight=3.0), outcome("1", 2.0, metric="loss", weight=1.0)]
    outcomes.append(ItemOutcome("2", "", "loss", 0.0, 0.0, failure="image_missing"))
    summary = summarise(outcomes, {})
    assert (summary["n"], summary["mean"], summary["tokens"]) == (3, 1.25, 4)
    assert summary["perplexity"] == pytest.approx(math.exp(1.25))
    assert summary["failures"] == {"image_missing": 1}


def test_a_comparison_by_hand() -> None:
    before = [outcome(str(i), float(i < 4), "a" if i < 5 else "b") for i in range(10)]
    after = [outcome(str(i), float(i >= 1), "a" if i < 5 else "b") for i in range(10)]
    overall, a, b = compare(before, list(reversed(after)))
    assert (overall.category, overall.n, overall.before, overall.after) == (ALL, 10, 0.4, 0.9)
    assert overall.difference == pytest.approx(0.5)
    assert (overall.wins, overall.losses, overall.p) == (6, 1, pytest.approx(2 * (1 + 7) / 2**7))
    assert 0.1 <= overall.low < 0.5 < overall.high <= 0.9
    assert (a.category, a.n, a.difference) == ("a", 5, 0.0)
    assert (b.category, b.low, b.high, b.p) == ("b", 1.0, 1.0, 2 / 2**5)


def test_a_lower_loss_wins() -> None:
    before = [outcome(str(i), 2.0, metric="loss", weight=float(i + 1)) for i in range(3)]
    after = [outcome(str(i), float(i), metric="loss", weight=float(i + 1)) for i in range(3)]
    (entry,) = compare(before, after)
    assert entry.difference == pytest.approx((0 + 2 + 6) / 6 - 2)
    assert (entry.wins, entry.losses, entry.p) == (2, 0, None)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ([outcome("0", 1.0)], "item sets differ: '1' only in the first"),
        ([outcome("0", 1.0), outcome("1", 1.0), outcome("2", 1.0)], "item sets differ: '2' only in the second"),
        ([outcome("0", 1.0), outcome("1", 1.0, "other")], "'1' differ in metric, category"),
        ([outcome("0", 1.0), outcome("1", 1.0, metric="choice")], "'1' differ in metric"),
        ([outcome("0", 1.0), outcome("1", 1.0, weight=2.0)], "'1' differ in metric, category, weight"),
        ([outcome("0", 1.0), replace(outcome("1", 1.0), expected=("y",))], "'1' differ in metric"),
    ],
)
def test_results_of_other_items_are_not_compared(after: list[ItemOutcome], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        compare([outcome("0", 1.0), outcome("1", 0.0)], after)


def test_results_come_back_from_disk(tmp_path: Path) -> None:
    outcomes = [replace(outcome("ä\ud800", 0.5), failure="no_number"), outcome("1", 1.0, "c")]
    write_results(tmp_path, outcomes, summarise(outcomes, {}))
    assert read_outcomes(tmp_path) == outcomes
    assert json.loads((tmp_path / "results.json").read_text())["mean"] == 0.75


@pytest.mark.parametrize(
    "change",
    [
        {"value": "1"},
        {"value": None},
        {"value": True},
        {"weight": -1},
        {"metric": "bleu"},
        {"id": 3},
        {"extra": 1},
        {"rule": 1},
    ],
)
def test_a_damaged_result_is_named_by_line(tmp_path: Path, change: dict) -> None:
    write_results(tmp_path, [outcome("0", 1.0), outcome("1", 1.0)], {})
    path = tmp_path / "results.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n")
    with pytest.raises(RecordError, match=r"results.jsonl:2: no outcome"):
        read_outcomes(path)


def test_missing_empty_and_repeated_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="does not exist"):
        read_outcomes(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(RecordError, match="no items"):
        read_outcomes(tmp_path)
    write_results(tmp_path, [outcome("0", 1.0)] * 2, {})
    with pytest.raises(RecordError, match="'0' occur more than once"):
        read_outcomes(tmp_path)
