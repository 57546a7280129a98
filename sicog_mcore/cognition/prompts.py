"""The prompts of the model: every wording once, for training rows and for generation alike.

In: prompts.json   Out: Prompt, the text of a user turn   Next: codec.py (what it answers), generate.py, annotator.py
A wording that changes gets a new version; records name both, so answers to different wordings are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, get_args

from sicog_mcore.cognition.records import Task
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER
from sicog_mcore.errors import RecordError, SampleError

Style = Literal["steps", "plain"]
DATA_FILE = "prompts.json"
FORMAT = 1


@dataclass(frozen=True)
class Prompt:
    """One prompt: a way to ask.

    Attributes:
        style: whether the answer is expected in the steps of codec.py.
        text: our wording.
        with_question: the text follows the item's own question; otherwise it stands alone.
    """

    id: str
    version: int
    task: Task
    style: Style
    text: str
    with_question: bool


@dataclass(frozen=True)
class AnnotatorPrompt:
    """The instructions of a stronger model that annotates.

    Attributes:
        system: role, steps and rules.
        reference: line before the description that the data set already has.
        prefill: start of the answer, given as a turn of the assistant.
    """

    version: int
    system: str
    reference: str
    prefill: str


@cache
def load_prompts() -> Mapping[str, Prompt]:
    """All prompts by id."""
    return MappingProxyType({name: Prompt(id=name, **fields) for name, fields in _data()["prompts"].items()})


@cache
def load_annotator_prompt() -> AnnotatorPrompt:
    """The annotator's instructions."""
    fields = _data()["annotator"]
    return AnnotatorPrompt(**fields | {"system": "\n".join(fields["system"])})


def find_prompt(prompt_id: str) -> Prompt:
    """A prompt by its id.

    Raises:
        RecordError: there is none; the known ones are named.
    """
    prompts = load_prompts()
    if prompt_id not in prompts:
        raise RecordError(f"found prompt {prompt_id!r}, expected one of {', '.join(prompts)}")
    return prompts[prompt_id]


def ask(prompt: Prompt, question: str, num_images: int) -> str:
    """The user turn: one placeholder per image, each with a line of its own, then the text.

    Args:
        question: the item's own; unused unless the prompt is ``with_question``. Placeholders and requests of ours that it
            already holds are taken out, and so is a request for a short answer where steps are asked for.

    Raises:
        SampleError: question_empty.
    """
    text = prompt.text
    if prompt.with_question:
        own = bare_question(question)
        # A question that also asks for a short answer would contradict the request for steps.
        if prompt.style == "steps":
            own = _without(own, _short_answer_requests())
        if not own:
            raise SampleError(
                "question_empty", f"prompt {prompt.id!r} needs the item's question; found {question!r:.80}"
            )
        text = f"{own}\n{text}" if text else own
    return f"{IMAGE_PLACEHOLDER}\n" * num_images + text


def bare_question(text: str) -> str:
    """A user turn without placeholders and without the requests that ``ask`` appends."""
    requests = (prompt.text for prompt in load_prompts().values() if prompt.with_question and prompt.text)
    return _without(text, (IMAGE_PLACEHOLDER, *requests))


def _without(text: str, parts: tuple[str, ...]) -> str:
    """Takes the parts out, also those that only appear when another one is gone."""
    # Taking one out may join the halves of another.
    while any(part in text for part in parts):
        for part in parts:
            text = text.replace(part, "")
    return text.strip()


@cache
def _short_answer_requests() -> tuple[str, ...]:
    return tuple(_data()["short_answer_requests"])


def _data() -> dict[str, Any]:
    return read_prompts(resources.files(__package__).joinpath(DATA_FILE).read_text(encoding="utf-8"))


def read_prompts(text: str) -> dict[str, Any]:
    """The contents of a file of prompts, each of its fields known and of the type it should have.

    Raises:
        RecordError: names the first field that is not.
    """
    data: dict[str, Any] = json.loads(text)
    own = [field.name for field in fields(Prompt) if field.name != "id"]
    _require_fields(data, ("format", "prompts", "short_answer_requests", "annotator"), DATA_FILE)
    if data["format"] != FORMAT:
        raise RecordError(f"{DATA_FILE}: found format {data['format']!r}, expected {FORMAT}")
    for name, prompt in data["prompts"].items():
        where = f"{DATA_FILE}: prompt {name!r}"
        _require_fields(prompt, own, where)
        for field, allowed in (("task", get_args(Task)), ("style", get_args(Style))):
            if prompt[field] not in allowed:
                raise RecordError(f"{where}: found {field} {prompt[field]!r}, expected one of {', '.join(allowed)}")
    _require_fields(data["annotator"], [field.name for field in fields(AnnotatorPrompt)], f"{DATA_FILE}: annotator")
    return data


def _require_fields(found: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    if odd := sorted(found.keys() ^ set(names)):
        raise RecordError(f"{where}: fields {odd} are missing or unknown, expected {', '.join(names)}")
