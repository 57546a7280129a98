"""Converts LLaVA-CoT-100k to training rows, without a model: each question once with four steps, once with the answer.

In: rows whose answers carry four tags   Out: two files that share nothing, and a list of refused rows   Next: sources.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sicog_mcore.cognition.annotation.annotated_rows import (
    TAGGED_KEYS,
    asked_row,
    build_tagged,
    choose,
    open_rows,
    write_rows,
)
from sicog_mcore.cognition.codec import from_tags, has_tags, quote_headers, render
from sicog_mcore.cognition.item_keys import KeyCounter
from sicog_mcore.data.rows import JsonRow
from sicog_mcore.data.sample import Sample
from sicog_mcore.data.sources import SampleIndex
from sicog_mcore.errors import SampleError

CotForm = Literal["cot", "direct"]
FORMS: tuple[CotForm, ...] = get_args(CotForm)
BOTH = "both"
_Usable = tuple[int, tuple[CotForm, ...]]  # number of the row, and what can be made of it
REFUSED_FILE = "refused.jsonl"


@dataclass(frozen=True)
class Converted:
    """The result of converting a file.

    Attributes:
        written: rows in each of the two files.
        refused: rows by reason; ``only_direct`` counts those that are refused in cot.jsonl alone.
        notes: keys of the rows that are not read, for the user.
    """

    written: Mapping[CotForm, int]
    refused: Counter[str]
    only_direct: Counter[str]
    notes: Sequence[str]


def convert(rows: Path, images: Path, out: Path, take: int | None, seed: int) -> Converted:
    """Writes cot.jsonl, direct.jsonl and refused.jsonl.

    A row that has no form in steps, but an answer, is in direct.jsonl alone, and in refused.jsonl with its reason.

    Args:
        images: folder that image paths are relative to.
        take: rows to choose; None for all that are usable.

    Raises:
        ConfigError: files that cannot be read, too few rows.
    """
    counter = KeyCounter()
    samples = open_rows(rows, images, counter.watch(build_tagged, TAGGED_KEYS))
    usable, refused = _survey(samples, images)
    notes = list(counter.lines())
    chosen = choose(usable, take, seed)
    written: dict[CotForm, int] = {}
    for form in FORMS:
        numbers = [number for number, forms in chosen if form in forms]
        written[form] = write_rows(out / f"{form}.jsonl", _rows(samples, numbers, images, form))
    write_rows(out / REFUSED_FILE, refused)
    counts = {name: Counter(row["reason"] for row in refused if row["refused_in"] == name) for name in (BOTH, "cot")}
    return Converted(written, counts[BOTH], counts["cot"], notes)


def convert_row(sample: Sample, images: Path, form: CotForm) -> JsonRow:
    """One training row. Beside an answer with tags, an answer without any is kept as it is, asked for without steps.

    Raises:
        SampleError: tags as ``from_tags`` refuses them, steps as ``render``, rows as ``asked_row``.
    """
    texts, prompts = list[str](), list[CotForm]()
    answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
    has_steps = any(map(has_tags, answers))
    for answer in answers:
        # A conversation in steps may hold plain answers; these are asked for plainly as well.
        if has_steps and not has_tags(answer):
            texts.append(answer)
            prompts.append("direct")
            continue
        steps = from_tags(answer)
        texts.append(render([quote_headers(step) for step in steps], "cot") if form == "cot" else steps[-1])
        prompts.append(form)
    return asked_row(sample, images, form, texts, prompts)


def _survey(samples: SampleIndex, images: Path) -> tuple[list[tuple[str, _Usable]], list[dict[str, str]]]:
    """Ids and numbers of the rows of which a row can be made, with its forms, and what is wrong with the others."""
    usable, refused = [], []
    for number in range(len(samples)):
        name, forms = "", list[CotForm]()
        try:
            sample = samples.read(number)
            name = sample.id
            # The weaker form first: where only the steps fail, the row is refused in cot.jsonl alone.
            convert_row(sample, images, "direct")
            forms.append("direct")
            convert_row(sample, images, "cot")
            forms.append("cot")
        except SampleError as error:
            found = {"id": name, "origin": samples.origin(number), "reason": error.reason, "detail": error.detail}
            refused.append(found | {"refused_in": "cot" if forms else BOTH})
        if forms:
            usable.append((name, (number, tuple(forms))))
    return usable, refused


def _rows(samples: SampleIndex, numbers: list[int], images: Path, form: CotForm) -> Iterator[JsonRow]:
    for number in numbers:
        yield convert_row(samples.read(number), images, form)
