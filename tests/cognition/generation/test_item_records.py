"""Requests and records of items, tested without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.cognition.generation.item_records import RecordFacts, refusal_lines, split_items
from sicog_mcore.cognition.generation.items import GenerationItem, read_items
from sicog_mcore.cognition.prompts import find_prompt
from sicog_mcore.cognition.records import PromptUse
from sicog_mcore.data.sample import ImageRef
from sicog_mcore.errors import SampleError
from sicog_mcore.files import hash_file
from sicog_mcore.rollout.requests import Answer, Result, Sampling
from sicog_mcore.rollout.sampling import candidate_seed
from tests.builders import write_image

DRAW = Sampling(temperature=0.9, top_p=0.9, top_k=0, max_new_tokens=4)
HUMAN = [{"from": "human", "value": "What is it?"}]


def facts_of(*prompts: str) -> RecordFacts:
    return RecordFacts(tuple((find_prompt(name), 1) for name in prompts), DRAW, 0, "engine", "checkpoint")


@pytest.mark.parametrize(
    ("row", "prompt", "reason"),
    [
        ({"conversations": HUMAN}, "caption", "no_image"),
        ({"image": "", "conversations": HUMAN}, "cod", "no_image"),
        ({"image": "a.png", "conversations": HUMAN, "choices": ["cat", "dog"]}, "direct", "question_incomplete"),
        ({"image": "a.png", "conversations": HUMAN, "system": "Answer in capitals."}, "cot", "question_incomplete"),
        ({"image": "a.png", "question": "What is it?"}, "direct", "question_incomplete"),
    ],
)
def test_what_a_prompt_needs_is_there_or_the_item_is_refused(
    row: dict[str, Any], prompt: str, reason: str, tmp_path: Path
) -> None:
    write_image(tmp_path / "a.png", 8, 8, seed=0)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a"} | row) + "\n", encoding="utf-8")
    (item,) = read_items([tmp_path / "rows.jsonl"], tmp_path)
    assert item.failure == ""
    with pytest.raises(SampleError) as caught:
        facts_of(prompt).request(item)
    assert caught.value.reason == reason
    other = "direct" if reason == "no_image" else "caption"
    assert len(facts_of(other).request(item).prompts) == 1


def test_a_record_says_what_was_asked_and_answered(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 8, 8, seed=0)
    item = GenerationItem("a", "What?", "a.png", (ImageRef(str(tmp_path / "a.png")),))
    facts = RecordFacts(((find_prompt("direct"), 2), (find_prompt("cot"), 1)), DRAW, 7, "engine", "checkpoint")
    request = facts.request(item)
    drawn = [Answer((5, 6), "red", (-0.125, -1.0), "stop"), Answer((5,), "blue", (0.0,), "length")]
    record = facts.record(item, Result("a", (9, 30), (tuple(drawn), (drawn[0],))))
    assert record.prompts == (PromptUse("direct", 1, 2), PromptUse("cot", 1, 1)) and record.task == "answer"
    assert record.prompt_tokens == (9, 30) and record.image_hash == hash_file(tmp_path / "a.png")
    told = [(c.prompt, c.index, c.text, c.tokens, c.log_prob, c.finish) for c in record.candidates]
    assert told == [
        ("direct", 0, "red", 2, -1.12, "stop"),
        ("direct", 1, "blue", 1, 0.0, "length"),
        ("cot", 0, "red", 2, -1.12, "stop"),
    ]
    assert request.seeds == tuple(
        tuple(c.seed for c in record.candidates if c.prompt == name) for name in ("direct", "cot")
    )
    assert record.candidates[1].seed == candidate_seed(7, "a", "direct", 1)
    failed = facts.record(item, Result("a", failure="image_missing", detail="gone"))
    assert (failed.candidates, failed.failure, failed.detail) == ((), "image_missing", "gone")


def test_items_that_cannot_be_asked_are_results_and_one_line_for_each_reason() -> None:
    items = [
        GenerationItem("a", "What?"),
        GenerationItem("b", failure="json_invalid", detail="half a row", origin="r.jsonl:2"),
        GenerationItem("c", "", origin="r.jsonl:3"),
        GenerationItem("d", failure="json_invalid", detail="no row", origin="r.jsonl:4"),
    ]
    requests, refused = split_items(facts_of("direct"), items)
    assert [request.id for request in requests] == ["a"]
    assert [(result.id, result.failure) for result in refused] == [
        ("b", "json_invalid"),
        ("c", "question_empty"),
        ("d", "json_invalid"),
    ]
    first, second = refusal_lines(items, refused)
    assert first == "refused    2 of 4 items: json_invalid, first r.jsonl:2: half a row"
    assert second.startswith("refused    1 of 4 items: question_empty, first r.jsonl:3: prompt 'direct' needs")
