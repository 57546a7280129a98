"""LLaVA-CoT-100k to training rows, without a model: the same questions once with four steps, once with the answer alone.

In: rows whose answers carry four tags   Out: two files that share nothing, and a list of refused rows   Next: sources.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sicog_mcore.cognition.annotation.rows import asked_row, build_tagged, choose, open_rows, write_rows
from sicog_mcore.cognition.codec import from_tags, render
from sicog_mcore.data.rows import Row
from sicog_mcore.data.sample import Sample
from sicog_mcore.data.sources import SampleIndex
from sicog_mcore.errors import SampleError

Form = Literal["cot", "direct"]
REFUSED_FILE = "refused.jsonl"


@dataclass(frozen=True)
class Converted:
    """What came of a file.

    Attributes:
        written: rows in each of the two files.
        refused: rows by reason.
    """

    written: int
    refused: Counter[str]


def convert(rows: Path, images: Path, out: Path, take: int | None, seed: int) -> Converted:
    """Writes cot.jsonl, direct.jsonl and refused.jsonl.

    Args:
        images: folder that image paths are relative to.
        take: rows to choose; None for all that are usable.

    Raises:
        ConfigError: files that cannot be read, too few rows.
    """
    samples = open_rows(rows, images, build_tagged)
    usable, refused = _survey(samples, images)
    chosen = choose(usable, take, seed)
    for form in ("cot", "direct"):
        write_rows(out / f"{form}.jsonl", _rows(samples, chosen, images, form))
    write_rows(out / REFUSED_FILE, refused)
    return Converted(len(chosen), Counter(row["reason"] for row in refused))


def convert_row(sample: Sample, images: Path, form: Form) -> Row:
    """One training row.

    Raises:
        SampleError: tags as ``from_tags`` refuses them, steps as ``render``, rows as ``asked_row``.
    """
    answers = [from_tags(turn.text) for turn in sample.turns if turn.role == "assistant"]
    texts = [render(steps, "cot") if form == "cot" else steps[-1] for steps in answers]
    return asked_row(sample, images, form, texts)


def _survey(samples: SampleIndex, images: Path) -> tuple[list[tuple[str, int]], list[dict[str, str]]]:
    """Ids and numbers of the rows of which both forms can be made, and what is wrong with the others."""
    usable, refused = [], []
    for number in range(len(samples)):
        name = ""
        try:
            sample = samples.read(number)
            name = sample.id
            convert_row(sample, images, "cot")
            convert_row(sample, images, "direct")
        except SampleError as error:
            found = {"id": name, "origin": samples.origin(number), "reason": error.reason, "detail": error.detail}
            refused.append(found)
            continue
        usable.append((sample.id, number))
    return usable, refused


def _rows(samples: SampleIndex, numbers: list[int], images: Path, form: Form) -> Iterator[Row]:
    for number in numbers:
        yield convert_row(samples.read(number), images, form)
