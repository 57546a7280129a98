"""One wording serves training and generation, and a changed wording has a new version."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from typing import get_args

import pytest
import xxhash

from sicog_mcore.cognition.codec import COD_STEPS, header
from sicog_mcore.cognition.prompts import (
    DATA_FILE,
    Style,
    ask,
    bare_question,
    find_prompt,
    load_annotator_prompt,
    load_prompts,
    read_prompts,
)
from sicog_mcore.cognition.records import Task
from sicog_mcore.errors import RecordError, SampleError

# (id, version) -> hash of the wording. When one differs: give the prompt a new version, and write both down here.
WORDINGS = {
    ("cod", 1): "c4bbe037e3b855bf",
    ("caption", 1): "a55f5b4a5b645aad",
    ("cod_question", 1): "775bf4e397ea96e1",
    ("cot", 1): "c7b1ff39d44e9cfc",
    ("direct", 1): "66a39479f278f9f8",
    ("annotator", 1): "4baeec33f0f0a92b",
}


def test_a_wording_changes_only_together_with_its_version() -> None:
    prompts = [*load_prompts().items(), ("annotator", load_annotator_prompt())]
    found = {
        (name, prompt.version): xxhash.xxh3_64_hexdigest(repr(asdict(prompt)).encode()) for name, prompt in prompts
    }
    assert found == WORDINGS


def test_the_data_file_holds_what_the_types_promise() -> None:
    for prompt in load_prompts().values():
        assert prompt.task in get_args(Task) and prompt.style in get_args(Style)
        assert prompt.text == prompt.text.strip() and "<image>" not in prompt.text
        assert prompt.text or prompt.with_question


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 2}, "found format 2, expected 1"),
        ({"more": {}}, r"fields \['more'\] are missing or unknown"),
        ({"prompts": {"cod": {"version": 1}}}, r"prompt 'cod': fields \['style', 'task', 'text', 'with_question'\]"),
        (
            {
                "prompts": {
                    "cod": {"version": 1, "task": "captoin", "style": "steps", "text": "", "with_question": True}
                }
            },
            "prompt 'cod': found task 'captoin', expected one of caption, answer",
        ),
        ({"annotator": {}}, r"annotator: fields \['prefill', 'reference', 'system', 'version'\]"),
    ],
)
def test_a_field_of_the_data_file_that_is_not_known_is_refused(change: dict[str, object], named: str) -> None:
    whole = json.loads(resources.files("sicog_mcore.cognition").joinpath(DATA_FILE).read_text(encoding="utf-8"))
    with pytest.raises(RecordError, match=named):
        read_prompts(json.dumps(whole | change))


def test_an_unknown_prompt_is_refused_by_name() -> None:
    with pytest.raises(
        RecordError, match="found prompt 'poem', expected one of cod, caption, cod_question, cot, direct"
    ):
        find_prompt("poem")


def test_placeholders_stand_first_one_per_image() -> None:
    text = find_prompt("cod").text
    assert ask(find_prompt("cod"), "ignored", 2) == f"<image>\n<image>\n{text}"
    assert ask(find_prompt("cot"), "How many?", 0) == f"How many?\n{find_prompt('cot').text}"
    assert ask(find_prompt("direct"), "How many?", 1) == "<image>\nHow many?"


@pytest.mark.parametrize("name", ["cot", "direct", "cod_question"])
def test_asking_twice_asks_once(name: str) -> None:
    prompt = find_prompt(name)
    once = ask(prompt, "<image>\nHow many?", 1)
    assert ask(prompt, once, 1) == once
    assert bare_question(once) == "How many?"
    assert ask(find_prompt("direct"), once, 1) == "<image>\nHow many?"


def test_a_request_for_a_short_answer_goes_where_steps_are_asked_for() -> None:
    question = "How many?\nAnswer the question using a single word or phrase."
    assert ask(find_prompt("cot"), question, 0) == f"How many?\n{find_prompt('cot').text}"
    assert ask(find_prompt("direct"), question, 0) == question


def test_placeholders_inside_a_question_are_taken_out_even_when_nested() -> None:
    assert ask(find_prompt("direct"), "What is <im<image>age> here?", 1).count("<image>") == 1


def test_a_question_is_needed_where_the_prompt_needs_it() -> None:
    with pytest.raises(SampleError, match="question_empty"):
        ask(find_prompt("direct"), "<image>\n", 1)


def test_the_annotator_is_asked_for_the_headers_that_the_codec_writes() -> None:
    annotator = load_annotator_prompt()
    lines = annotator.system.splitlines()
    headers = [header("cod", step) for step in range(1, len(COD_STEPS) + 1)]
    assert [line for line in lines if line.startswith("Step ")] == headers
    assert not annotator.prefill.startswith("Step")
