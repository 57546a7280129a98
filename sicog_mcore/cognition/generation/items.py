"""The user's rows as items to be asked about: an image, a question, or both; labels are not needed.

In: LLaVA rows {id, image, conversations}, the last two optional   Out: Item   Next: generate.py
Of a conversation only the first question counts. A row that cannot be used is an item too, with the reason, so that every
file of the loop has one row per item.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.preflight import ROW_FILES
from sicog_mcore.data.rows import ROLES, Row, build_sample
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample
from sicog_mcore.data.sources import open_sources
from sicog_mcore.errors import ConfigError, ConfigProblem, SampleError

ANSWER: Mapping[str, str] = {"from": "gpt", "value": "-"}  # stands in for the label that nobody needs
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Item:
    """One row.

    Attributes:
        id: of the row; where it stands (``file:line``) if the row cannot be read.
        question: without placeholder; may be empty.
        image: path relative to the folder of images; empty for an item of text only.
        refs: where the image is.
        failure, detail: why the row cannot be used; empty otherwise.
    """

    id: str
    question: str = ""
    image: str = ""
    refs: tuple[ImageRef, ...] = ()
    failure: str = ""
    detail: str = ""


def read_items(rows: Sequence[Path], images: Path, limit: int = 0) -> list[Item]:
    """The items of all files, in order.

    Args:
        rows: .json and .jsonl files.
        images: folder that image paths are relative to.
        limit: so many items at most; 0 for all.

    Raises:
        ConfigError: files that do not exist or are no lists of rows.
    """
    problems = [
        ConfigProblem("rows", str(path), "is no file of rows", f"give a {' or '.join(ROW_FILES)} file")
        for path in rows
        if path.suffix not in ROW_FILES
    ]
    if problems:
        raise ConfigError(problems)
    index = open_sources([SourceConfig(path=str(path), images=str(images)) for path in rows], DataConfig(), build_item)
    root = os.path.realpath(images)
    items = []
    for row in range(min(limit, len(index)) if limit else len(index)):
        try:
            items.append(_item(index.read(row), root))
        except SampleError as error:
            items.append(Item(_name(index.origin(row), rows), failure=error.reason, detail=error.detail))
    return items


def build_item(row: Row, images: Sequence[ImageRef], fallback_id: str, origin: str) -> Sample:
    """A row as a Sample whose first user turn is the question; see rows.build_sample, which checks it.

    Raises:
        SampleError: as ``build_sample``; several_images.
    """
    if len(images) > 1:
        raise SampleError("several_images", f"found {len(images)} images, expected at most one; split the row")
    turns = row.get("conversations") or [{"from": "human", "value": ""}]
    if isinstance(turns, list):
        first = next((turn for turn in turns if _is_question(turn)), turns[0])
        turns = [_with_placeholder(first, len(images)), dict(ANSWER)]
    return build_sample({**row, "conversations": turns}, images, fallback_id, origin)


def digest(path: Path) -> str:
    """xxh128 of a file's bytes, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _is_question(turn: object) -> bool:
    return isinstance(turn, dict) and ROLES.get(str(turn.get("from", turn.get("role")))) == "user"


def _with_placeholder(turn: object, num_images: int) -> object:
    """The question, with a placeholder in front if it mentions no image."""
    if not isinstance(turn, dict) or not isinstance(text := turn.get("value", turn.get("content")), str):
        return turn
    if IMAGE_PLACEHOLDER in text:
        return turn
    return {**turn, "value": f"{IMAGE_PLACEHOLDER}\n" * num_images + text}


def _name(origin: str, rows: Sequence[Path]) -> str:
    """Where a row stands, without the folder if the file's name says enough: records must not depend on it."""
    is_enough = len({path.name for path in rows}) == len(rows)
    return os.path.basename(origin) if is_enough else origin


def _item(sample: Sample, root: str) -> Item:
    asked = next(turn for turn in sample.turns if turn.role == "user")  # behind the row's system turn, if it has one
    question = asked.text.replace(IMAGE_PLACEHOLDER, "").strip()
    image = os.path.relpath(sample.images[0].path, root) if sample.images else ""
    return Item(sample.id, question, image, sample.images)
