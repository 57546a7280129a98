"""Reads rows that are to be annotated, and writes the training rows made of them.

In: ALLaVA, LLaVA or LLaVA-CoT rows   Out: Samples; rows in LLaVA form   Next: annotator.py, llava_cot.py
Ids of training rows carry their form ("<id>#cod"), so files made of the same items can be trained on together.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from sicog_mcore.cognition.item_keys import is_blank, turn_fields, unread_keys, unread_media
from sicog_mcore.cognition.prompts import ask, find_prompt
from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.rows import BuildSample, JsonRow, build_sample
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, Role, Sample, Turn
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.errors import ConfigError, ConfigProblem, SampleError
from sicog_mcore.files import whole_file

ROW_FILES = (".json", ".jsonl")
SPEAKERS: Mapping[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}
USERS = ("human", "user")
TAGGED_KEYS = ("id", "image", "conversations")
CAPTIONED_KEYS = (*TAGGED_KEYS, "caption")

Choice = TypeVar("Choice")


def open_rows(rows: Path, images: Path, build: BuildSample) -> SampleIndex:
    """Indexes a file; a repeated id gets the number of its row added.

    Raises:
        ConfigError: no JSON list or JSONL file, no folder of images.
    """
    if rows.suffix not in ROW_FILES:
        problem = ConfigProblem("rows", str(rows), "is no file of rows", f"give a {' or '.join(ROW_FILES)} file")
        raise ConfigError([problem])
    return open_sources([SourceConfig(path=str(rows), images=str(images))], DataConfig(duplicate_ids="keep"), build)


def build_captioned(row: JsonRow, images: Sequence[Any], fallback_id: str, origin: str) -> Sample:
    """Two turns: a question and a description, which is the field ``caption`` if there is one, else the first answer.

    Raises:
        SampleError: as ``build_sample``; no_image, media_unread.
    """
    images = _require_read(row, images, CAPTIONED_KEYS)
    if not images:
        raise SampleError("no_image", "the row has no image to describe")
    turns = row.get("conversations")
    if "caption" in row:
        asked = turns[:1] if isinstance(turns, list) else [{"from": "human", "value": find_prompt("caption").text}]
        row = row | {"conversations": [*asked, {"from": "gpt", "value": row["caption"]}]}
    row = {key: value for key, value in row.items() if key in TAGGED_KEYS}  # what the others say has been judged
    sample = build_sample(_with_placeholders(row, len(images)), images, fallback_id, origin)
    dialogue = [turn for turn in sample.turns if turn.role != "system"]
    return replace(sample, turns=tuple(dialogue[:2]))


def build_tagged(row: JsonRow, images: Sequence[Any], fallback_id: str, origin: str) -> Sample:
    """A row of LLaVA-CoT-100k, whose questions may come without placeholder.

    Raises:
        SampleError: as ``build_sample``; no_image, media_unread, key_unread.
    """
    images = _require_read(row, images, TAGGED_KEYS)
    unread = unread_keys({**row, **turn_fields(_turns(row))}, TAGGED_KEYS)
    if lost := (*unread.meaning, *unread.control):
        fix = "write what they say into the conversation, or leave them out"
        raise SampleError("key_unread", f"{', '.join(map(repr, lost)):.200} would be lost in the training row; {fix}")
    row = {key: value for key, value in row.items() if key in TAGGED_KEYS}
    return build_sample(_with_placeholders(row, len(images)), images, fallback_id, origin)


def choose(items: Sequence[tuple[str, Choice]], take: int | None, seed: int) -> list[Choice]:
    """A subset in the order of the items. Which ones depends on seed and id alone: a larger one holds the smaller ones.

    Args:
        items: id and value.
        take: size; None for all.

    Raises:
        ConfigError: there are fewer.
    """
    if take is None:
        return [value for _, value in items]
    if take > len(items):
        fix = f"take at most {len(items)}, or give more rows"
        raise ConfigError([ConfigProblem("take", take, f"only {len(items)} rows are usable", fix)])
    # The smallest hashes are taken: a larger subset then holds every smaller one, whatever order the rows are in.
    order = (xxhash.xxh3_128_intdigest(f"{seed}/{name}".encode()) for name, _ in items)
    chosen = heapq.nsmallest(take, zip(order, range(len(items)), strict=True))
    return [items[number][1] for number in sorted(number for _, number in chosen)]


def asked_row(
    sample: Sample, root: Path, prompt_id: str, answers: Sequence[str], prompts: Sequence[str] | None = None
) -> JsonRow:
    """A training row: the sample's questions as the prompt asks them, each with the answer given here.

    Args:
        root: folder that image paths are written relative to.
        prompt_id: names the row.
        prompts: id of the prompt of each answer; ``prompt_id`` for all without it.

    Raises:
        SampleError: the row could not be trained on.
    """
    given = iter(answers)
    asked = iter(prompts or [prompt_id] * len(answers))
    turns = []
    num_images = len(sample.images)  # all of them in the first question
    for turn in sample.turns:
        if turn.role == "user":
            turn = Turn("user", ask(find_prompt(next(asked)), turn.text, num_images))
            num_images = 0
        elif turn.role == "assistant":
            turn = Turn("assistant", next(given))
        turns.append({"from": SPEAKERS[turn.role], "value": turn.text})
    paths = relative_paths(sample, root)
    images = {} if not paths else {"image": paths[0] if len(paths) == 1 else paths}
    row = {"id": f"{sample.id}#{prompt_id}"} | images | {"conversations": turns}
    # Checked as the loader will check it, so that no row is written that training would refuse.
    build_sample(row, sample.images, sample.id, sample.origin)
    return row


def relative_paths(sample: Sample, root: Path) -> list[str]:
    """Image paths as rows have them."""
    real = os.path.realpath(root)
    return [os.path.relpath(image.path, real) for image in sample.images]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes JSONL that appears whole or not at all. Returns the number of rows."""
    count = 0
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _require_read(row: JsonRow, images: Sequence[Any], used: Collection[str]) -> Sequence[Any]:
    """The row's images; none for a path that is empty.

    Raises:
        SampleError: no_image, media_unread.
    """
    if is_blank(row.get("image")):
        images = ()
    turns = _turns(row)
    text = "\n".join(str(turn.get("value", turn.get("content"))) for turn in turns if _is_question(turn))
    if problem := unread_media(unread_keys({**row, **turn_fields(turns)}, used).media, text, len(images)):
        raise problem
    return images


def _turns(row: JsonRow) -> list[Any]:
    turns = row.get("conversations")
    return turns if isinstance(turns, list) else []


def _is_question(turn: object) -> bool:
    return isinstance(turn, dict) and turn.get("from", turn.get("role")) in USERS


def _with_placeholders(row: JsonRow, num_images: int) -> JsonRow:
    """The row with its placeholders before the first question, if it has none at all. What is odd is left as it is."""
    turns = row.get("conversations")
    if not num_images or not isinstance(turns, list) or IMAGE_PLACEHOLDER in str(turns):
        return row
    for number, turn in enumerate(turns):
        if _is_question(turn):
            name = "value" if "value" in turn else "content"
            if isinstance(turn.get(name), str):
                first = turn | {name: f"{IMAGE_PLACEHOLDER}\n" * num_images + turn[name]}
                return row | {"conversations": [*turns[:number], first, *turns[number + 1 :]]}
            break
    return row
