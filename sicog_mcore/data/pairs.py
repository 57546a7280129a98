"""Rows of preference pairs: one question, a better and a worse answer.

In: a row {id, image, prompt | conversations, chosen, rejected}   Out: Sample with ``rejected``   Next: encode.py
A prompt is a text, or the turns before the answer in LLaVA form. Everything else about a row is as in rows.py.
Further reasons: pair_equal, prompt_ambiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sicog_mcore.data.rows import Row, build_sample
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample, Turn
from sicog_mcore.errors import SampleError

PROMPT_FIELDS = ("prompt", "conversations")


def build_pair(row: Row, images: Sequence[ImageRef], fallback_id: str, origin: str) -> Sample:
    """Checks a row and gives it its meaning; both answers must be fit to be learnt.

    A prompt that is a text and mentions none of its images gets a placeholder for each, in front.

    Args:
        row: the parsed row.
        images: its images, in the order of their placeholders.
        fallback_id: id of a row that brings none.
        origin: where the row stands, for messages.

    Raises:
        SampleError: pair_equal, prompt_ambiguous, and all that ``build_sample`` raises.
    """
    turns = _prompt(row, len(images))
    chosen, rejected = (
        build_sample(
            {**row, "conversations": [*turns, {"from": "gpt", "value": _answer(row, name)}]},
            images,
            fallback_id,
            origin,
        )
        for name in ("chosen", "rejected")
    )
    if chosen.turns[-1].text.strip() == rejected.turns[-1].text.strip():
        raise SampleError("pair_equal", "chosen and rejected are the same text; remove the row")
    return replace(chosen, rejected=rejected.turns[-1].text)


def conversations(sample: Sample) -> list[tuple[Turn, ...]]:
    """What the model reads of a sample: its turns; of a pair first with the chosen, then with the rejected answer."""
    if not sample.rejected:
        return [sample.turns]
    return [sample.turns, (*sample.turns[:-1], Turn("assistant", sample.rejected))]


def _prompt(row: Row, num_images: int) -> list[object]:
    """The turns before the answer, still unchecked."""
    given = [name for name in PROMPT_FIELDS if row.get(name) is not None]
    if not given:
        raise SampleError("field_missing", f"found {sorted(row)}, expected {' or '.join(PROMPT_FIELDS)}")
    if len(given) > 1:
        raise SampleError("prompt_ambiguous", f"found {' and '.join(given)}, expected one of them")
    prompt = row[given[0]]
    if given == ["conversations"]:
        if not isinstance(prompt, list):
            raise SampleError("field_type", f"conversations is {prompt!r:.80}, expected a list of turns")
        return prompt
    if not isinstance(prompt, str):
        raise SampleError("field_type", f"prompt is {prompt!r:.80}, expected a text")
    if IMAGE_PLACEHOLDER not in prompt:
        prompt = f"{IMAGE_PLACEHOLDER}\n" * num_images + prompt
    return [{"from": "human", "value": prompt}]


def _answer(row: Row, name: str) -> object:
    if name not in row:
        raise SampleError("field_missing", f"found {sorted(row)}, expected {name}")
    return row[name]
