"""The user's rows as items to be asked about: an image, a question, or both; labels are not needed.

In: LLaVA rows {id, image, conversations}, the last two optional   Out: GenerationItem   Next: generate.py
Of a conversation only the first question counts. A row that cannot be used is an item too, with the reason, so that every
file of the loop has one row per item. Nothing of a row is passed over in silence: see row_keys.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sicog_mcore.cognition.item_keys import KeyCounter, is_blank, turn_fields, unread_keys, unread_media
from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.preflight import ROW_FILES
from sicog_mcore.data.rows import ROLES, JsonRow, build_sample
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample
from sicog_mcore.data.sources import open_sources
from sicog_mcore.errors import ConfigError, ConfigProblem, SampleError
from sicog_mcore.files import hash_file

ANSWER: Mapping[str, str] = {"from": "gpt", "value": "-"}  # stands in for the label that nobody needs
USED_KEYS = ("id", "image", "conversations")


@dataclass(frozen=True)
class GenerationItem:
    """One row to generate answers for.

    Attributes:
        id: of the row; where it stands (``file:line``) if the row cannot be read.
        question: without placeholder; may be empty.
        image: path relative to the folder of images; empty for an item of text only.
        refs: where the image is.
        failure, detail: why the row cannot be used; empty otherwise.
        origin: ``file:line`` of the row.
        unasked: keys of the row that belong to its question, but are not asked.
    """

    id: str
    question: str = ""
    image: str = ""
    refs: tuple[ImageRef, ...] = ()
    failure: str = ""
    detail: str = ""
    origin: str = ""
    unasked: tuple[str, ...] = ()

    def image_hash(self) -> str:
        """``hash_file`` of the image as it is now; empty where there is none, or where it cannot be read."""
        try:
            return hash_file(Path(self.refs[0].path)) if self.refs else ""
        except OSError:
            return ""


def read_items(
    rows: Sequence[Path], images: Path, limit: int = 0, counter: KeyCounter | None = None
) -> list[GenerationItem]:
    """The items of all files, in order.

    Args:
        rows: .json and .jsonl files.
        images: folder that image paths are relative to.
        limit: so many items at most; 0 for all.
        counter: counts the keys of the rows that are not read.

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
    builder = _Builder(counter or KeyCounter())
    sources = [SourceConfig(path=str(path), images=str(images)) for path in rows]
    index = open_sources(sources, DataConfig(), builder.build)
    root = os.path.realpath(images)
    items = []
    for row in range(min(limit, len(index)) if limit else len(index)):
        origin = _name(index.origin(row), rows)
        try:
            items.append(builder.item(index.read(row), root, origin))
        except SampleError as error:
            items.append(GenerationItem(origin, failure=error.reason, detail=error.detail, origin=origin))
    return items


def build_item(row: JsonRow, images: Sequence[ImageRef], fallback_id: str, origin: str) -> Sample:
    """A row as a Sample whose first user turn is the question; see rows.build_sample, which checks it.

    Raises:
        SampleError: as ``build_sample``; several_images.
    """
    if len(images) > 1:
        raise SampleError("several_images", f"found {len(images)} images, expected at most one; split the row")
    turns = row.get("conversations") or [{"from": "human", "value": ""}]
    if isinstance(turns, list):
        turns = [_with_placeholder(_first_question(turns), len(images)), dict(ANSWER)]
    # Other keys are judged by whoever calls this: what a training row would lose need not matter to a question.
    return build_sample({"id": row.get("id"), "conversations": turns}, images, fallback_id, origin)


class _Builder:
    """Builds a Sample of each row, and keeps what no Sample tells of the row that was built last."""

    def __init__(self, counter: KeyCounter) -> None:
        self._counter = counter
        self._problem: SampleError | None = None
        self._unasked: tuple[str, ...] = ()

    def build(self, row: JsonRow, images: Sequence[ImageRef], fallback_id: str, origin: str) -> Sample:
        """As ``build_item``; of a row whose picture is not read, only the id is."""
        if is_blank(row.get("image")):
            images = ()
        question = _question(row)
        unread = unread_keys({**row, **turn_fields([question])}, USED_KEYS)
        self._counter.add((*unread.media, *unread.meaning, *unread.control, *unread.unknown), origin)
        text = question.get("value", question.get("content"))
        self._problem = unread_media(unread.media, text if isinstance(text, str) else "", len(images))
        self._unasked = unread.meaning
        if self._problem:
            row, images = {"id": row.get("id")}, ()
        return build_item(row, images, fallback_id, origin)

    def item(self, sample: Sample, root: str, origin: str) -> GenerationItem:
        """The item of the row that was built last."""
        if self._problem:
            return GenerationItem(sample.id, failure=self._problem.reason, detail=self._problem.detail, origin=origin)
        question = sample.turns[0].text.replace(IMAGE_PLACEHOLDER, "").strip()
        image = os.path.relpath(sample.images[0].path, root) if sample.images else ""
        return GenerationItem(sample.id, question, image, sample.images, origin=origin, unasked=self._unasked)


def _question(row: JsonRow) -> JsonRow:
    """The turn that is asked; empty where there is none."""
    turns = row.get("conversations")
    turn = _first_question(turns) if isinstance(turns, list) and turns else None
    return turn if isinstance(turn, dict) else {}


def _first_question(turns: list[object]) -> object:
    return next((turn for turn in turns if _is_question(turn)), turns[0])


def _is_question(turn: object) -> bool:
    return isinstance(turn, dict) and ROLES.get(str(turn.get("from", turn.get("role")))) == "user"


def _with_placeholder(turn: object, num_images: int) -> object:
    """The question, with a placeholder in front if it mentions no image."""
    if not isinstance(turn, dict) or not isinstance(text := turn.get("value", turn.get("content")), str):
        return turn
    if IMAGE_PLACEHOLDER in text:
        num_images = 0
    return {"from": turn.get("from", turn.get("role")), "value": f"{IMAGE_PLACEHOLDER}\n" * num_images + text}


def _name(origin: str, rows: Sequence[Path]) -> str:
    """Where a row stands, without the folder if the file's name says enough: records must not depend on it."""
    is_enough = len({path.name for path in rows}) == len(rows)
    return os.path.basename(origin) if is_enough else origin
