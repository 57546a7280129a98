"""Rows of preference pairs: one question, a better and a worse answer.

In: a row {id, image, prompt | conversations, chosen, rejected}   Out: Sample with one further answer   Next: encode.py
A prompt is a text, or the turns before the answer in LLaVA form; an answer is a text, or a turn of the assistant.
Everything else about a row is as in rows.py.
Further reasons: pair_equal, prompt_ambiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sicog_mcore.data.row_keys import PAIR_KEYS, shown, shown_keys, suggestion
from sicog_mcore.data.rows import JsonRow, build_dialogue, check_keys, missing, read_turn
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample, Turn
from sicog_mcore.errors import SampleError

PROMPT_FIELDS = ("prompt", "conversations")
ANSWER_FIELDS = ("chosen", "rejected")


def build_pair(row: JsonRow, images: Sequence[ImageRef], fallback_id: str, origin: str) -> Sample:
    """Checks a row and gives it its meaning; both answers must be fit to be learnt.

    A prompt that is a text and mentions none of its images gets a placeholder for each, in front.

    Args:
        row: the parsed row.
        images: its images, in the order of their placeholders.
        fallback_id: id of a row that brings none.
        origin: where the row stands, for messages.

    Raises:
        SampleError: pair_equal, prompt_ambiguous, and all that ``rows.build_sample`` raises.
    """
    turns = _prompt(row, len(images))
    answers = {name: _answer(row, name) for name in ANSWER_FIELDS}
    check_keys(row, PAIR_KEYS, len(images))
    given: JsonRow = {name: row[name] for name in ("id", "system") if name in row}
    chosen, rejected = (
        build_dialogue({**given, "conversations": [*turns, answers[name]]}, images, fallback_id, origin)
        for name in ANSWER_FIELDS
    )
    if chosen.turns[-1].text.strip() == rejected.turns[-1].text.strip():
        raise SampleError("pair_equal", "chosen and rejected are the same text; remove the row")
    return replace(chosen, answers=(rejected.turns[-1].text,))


def conversations(sample: Sample) -> list[tuple[Turn, ...]]:
    """Lists the conversations of a sample: its turns, and those turns with each further answer as the last one."""
    return [sample.turns, *((*sample.turns[:-1], Turn("assistant", text)) for text in sample.answers)]


def _prompt(row: JsonRow, num_images: int) -> list[object]:
    """The turns before the answer, still unchecked."""
    given = [name for name in PROMPT_FIELDS if row.get(name) is not None]
    if not given:
        hints = "".join(dict.fromkeys(suggestion(row, name) for name in reversed(PROMPT_FIELDS)))
        raise SampleError("field_missing", f"found {shown_keys(row)}, expected {' or '.join(PROMPT_FIELDS)}{hints}")
    if len(given) > 1:
        raise SampleError("prompt_ambiguous", f"found {' and '.join(given)}, expected one of them")
    prompt = row[given[0]]
    if given == ["conversations"]:
        if not isinstance(prompt, list):
            raise SampleError("field_type", f"conversations is {shown(prompt)}, expected a list of turns")
        return prompt
    if not isinstance(prompt, str):
        remedy = "; write turns under 'conversations'" if isinstance(prompt, list) else ""
        raise SampleError("field_type", f"prompt is {shown(prompt)}, expected a text{remedy}")
    if IMAGE_PLACEHOLDER not in prompt:
        prompt = f"{IMAGE_PLACEHOLDER}\n" * num_images + prompt
    return [{"from": "human", "value": prompt}]


def _answer(row: JsonRow, name: str) -> object:
    """One of the two answers as a turn; in the row it is a text, or a turn of the assistant."""
    if name not in row:
        raise SampleError("field_missing", missing(row, name, PAIR_KEYS, 1))
    answer = row[name]
    if isinstance(answer, str):
        return {"from": "gpt", "value": answer}
    if not isinstance(answer, dict):
        raise SampleError("field_type", f"{name} is {shown(answer)}, expected a text or a turn of the assistant")
    if (role := read_turn(answer, name).role) != "assistant":
        raise SampleError("role_unknown", f"{name} is a turn of the {role}, expected one of the assistant")
    return answer
