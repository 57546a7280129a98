"""Reads benchmarks as items: question, options, reference answers, pictures. No cell is ever evaluated.

In: TSV with VLMEvalKit's columns, JSONL, or easy-vqa from its wheel   Out: BenchmarkItem; LLaVA rows and images
Next: launch/generate.py (answers the rows), judging.py (judges the answers)
A row that cannot be used stops everything: a benchmark with fewer items is another benchmark. All of them are named by line.
"""

from __future__ import annotations

import base64
import binascii
import csv
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sicog_mcore.cognition.evaluation.cells import (
    UnreadCells,
    is_missing,
    read_letter,
    read_options,
    texts,
    unread_keys,
)
from sicog_mcore.config import DataConfig
from sicog_mcore.data.decode import read_bytes, read_size
from sicog_mcore.data.rows import JsonRow, build_sample, locate_image, parse_row
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef
from sicog_mcore.errors import RecordError, SampleError
from sicog_mcore.files import hash_bytes, hash_file, whole_file

EASY_VQA = "easy-vqa:"  # followed by "test" or "train"
MAX_CELL = 1 << 28  # characters; images stand inside cells
MIN_BASE64 = 65  # a shorter cell is the index of the row that has the same image, as in VLMEvalKit
PROBLEMS_SHOWN = 5
HARMLESS_IMAGE = "<image >"  # what a placeholder inside a text becomes
LETTER_REQUEST = "Answer with the letter of the option only."
SUFFIXES: Mapping[bytes, str] = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}
EASY_VQA_KINDS: Mapping[str, str] = {
    "yes": "yes/no",
    "no": "yes/no",
    "circle": "shape",
    "rectangle": "shape",
    "triangle": "shape",
}


@dataclass(frozen=True)
class Picture:
    """An image as the benchmark has it.

    Attributes:
        kind: of ``value``: encoded bytes, a path below the folder of images, or the id of the item with the same image.
    """

    kind: Literal["base64", "path", "same_as"]
    value: str


@dataclass(frozen=True)
class BenchmarkItem:
    """One question of a benchmark.

    Attributes:
        question: without hint and options.
        answers: each of them is right; the letter where there are options.
        options: text by letter; empty for an open question.
        origin: ``file:line``.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""
    category: str = ""
    pictures: tuple[Picture, ...] = ()
    origin: str = ""


def read_items(benchmark: str, unread: UnreadCells | None = None) -> list[BenchmarkItem]:
    """All items, without their pictures.

    Args:
        benchmark: path of a .tsv or .jsonl file, "easy-vqa:test", or "easy-vqa:train".
        unread: is told the keys that nothing reads.

    Raises:
        RecordError: no such benchmark, no items, or rows that cannot be used.
    """
    return [replace(item, pictures=()) for item in _checked(benchmark, unread)]


def benchmark_hash(benchmark: str) -> str:
    """``content_hash`` of the file that holds the questions."""
    return content_hash(_file(benchmark))


def content_hash(path: Path) -> str:
    """xxh128 of a file in hexadecimal; empty for a folder."""
    return "" if path.is_dir() else hash_file(path)


def prompt_text(item: BenchmarkItem) -> str:
    """Writes the prompt: hint, question, options, and for these the request for a letter."""
    options = [f"{letter}. {text}" for letter, text in item.options.items()]
    lines = [item.hint, item.question, *options, LETTER_REQUEST if options else ""]
    return "\n".join(line for line in lines if line)


def write_rows(benchmark: str, images: Path | None, out: Path, unread: UnreadCells | None = None) -> int:
    """Writes ``rows.jsonl`` (LLaVA form) and ``images/`` (named by content). The rows appear last, whole or not at all.

    Args:
        images: folder that image paths are relative to; nothing outside it is read.
        out: folder to write to.
        unread: is told the keys that nothing reads.

    Returns:
        number of rows.

    Raises:
        RecordError: as ``read_items``; an image that is missing, unsafe, no image, or not base64.
    """
    # The whole benchmark is read twice: a bad row must be known before the first file is written.
    for _ in _checked(benchmark, unread):
        pass
    root = os.path.realpath(_easy_vqa_images(benchmark) if benchmark.startswith(EASY_VQA) else images or ".")
    names: dict[str, list[str]] = {}  # by id of the item
    problems, count = [], 0
    (out / "images").mkdir(parents=True, exist_ok=True)
    # Images first, each under the hash of its content; rows appear last, so that none points at a missing image.
    with whole_file(out / "rows.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in _checked(benchmark):
            try:
                names[item.id] = [_place(picture, root, out / "images", names) for picture in item.pictures]
                file.write(json.dumps(_row(item, names[item.id]), ensure_ascii=False) + "\n")
            except SampleError as error:
                problems.append(f"{item.origin}: {error}")
            count += 1
        _refuse(problems, count)
    return count


def _row(item: BenchmarkItem, names: Sequence[str]) -> JsonRow:
    text, answer = (t.replace(IMAGE_PLACEHOLDER, HARMLESS_IMAGE) for t in (prompt_text(item), item.answers[0]))
    turns = [
        {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n" * len(names) + text},
        {"from": "gpt", "value": answer},
    ]
    row: JsonRow = {"id": item.id, **({"image": [f"images/{name}" for name in names]} if names else {})}
    row["conversations"] = turns
    build_sample(row, [ImageRef(name) for name in names], item.id, item.origin)
    return row


def _place(picture: Picture, root: str, folder: Path, names: Mapping[str, Sequence[str]]) -> str:
    """Writes one picture below ``folder`` and returns its name, which is made of its content and of nothing else."""
    if picture.kind == "same_as":
        if len(names.get(picture.value, ())) != 1:
            raise SampleError("image_missing", f"no row before has the index {picture.value!r:.80} and one image")
        return names[picture.value][0]
    data = _decode(picture.value) if picture.kind == "base64" else read_bytes(locate_image(picture.value, root))
    # Refuses bytes that are no image before they get a name.
    read_size(data, DataConfig())
    # The suffix follows the content too: benchmarks name pictures wrongly.
    suffix = next((suffix for start, suffix in SUFFIXES.items() if data.startswith(start)), ".img")
    path = folder / (hash_bytes(data) + suffix)
    if not path.exists() or path.stat().st_size != len(data):
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
    return path.name


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("image_unidentified", f"{text[:40]!r}... is not base64: {error}") from error


def _checked(benchmark: str, unread: UnreadCells | None = None) -> Iterator[BenchmarkItem]:
    """All items; the bad rows are reported at the end, all together."""
    problems: list[str] = []
    seen: dict[str, str] = {}
    for origin, row in _rows(benchmark):
        try:
            if isinstance(row, SampleError):
                raise row
            item, by_index = _item(row, origin)
            keys = unread_keys(row)
            if item.id in seen:
                raise SampleError("duplicate_id", f"{item.id!r} stands in {seen[item.id]} already")
        except SampleError as error:
            problems.append(f"{origin}: {error}")
            continue
        seen[item.id] = origin
        if unread is not None:
            unread.add(keys, origin)
            unread.indices += by_index
        yield item
    _refuse(problems, len(problems) + len(seen))
    if not seen:
        raise RecordError(f"{benchmark} has no rows; name another benchmark")


def _refuse(problems: Sequence[str], count: int) -> None:
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:PROBLEMS_SHOWN])
        more = f"\n  - and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise RecordError(f"{len(problems)} of {count} rows cannot be used; repair or remove them:\n{shown}{more}")


def _rows(benchmark: str) -> Iterator[tuple[str, JsonRow | SampleError]]:
    """(origin, row) or (origin, problem) in the order of the file."""
    path = _file(benchmark)
    if benchmark.startswith(EASY_VQA):
        for number, (question, answer, image) in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            category = EASY_VQA_KINDS.get(answer, "colour")
            row = {"id": f"{benchmark}-{number}", "question": question, "answer": answer, "category": category}
            yield f"{path}: entry {number}", row | {"image": f"{image}.png"}
    elif path.suffix == ".tsv":
        yield from _tsv_rows(path)
    else:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}:{number}", parse_row(line, nan_is_null=True)
                    except SampleError as error:
                        yield f"{path}:{number}", error


def _tsv_rows(path: Path) -> Iterator[tuple[str, JsonRow | SampleError]]:
    """Rows with the column ``index`` as id and the column ``image`` as pixels."""
    csv.field_size_limit(MAX_CELL)  # of the whole process: the module has no other way
    with path.open("rb") as file:
        reader = csv.reader(_decoded(file, path), delimiter="\t", strict=True)
        header: list[str] = []
        while True:
            # A cell may hold line ends, so lines are counted by the reader and not by rows.
            origin = f"{path}:{reader.line_num + 1}"  # of the row's first line
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield origin, SampleError("row_unreadable", f"{error}; quote cells that hold tabs, quotes or line ends")
                continue
            if cells is None:
                return
            if not header:
                header = cells
                if len(set(header)) < len(header):
                    doubled = sorted({name for name in header if header.count(name) > 1})
                    raise RecordError(f"{origin}: two columns {', '.join(doubled)!r:.80}; rename or remove one of them")
                if missing := {"index", "question", "answer"} - set(header):
                    found = ", ".join(header)
                    raise RecordError(f"{origin}: no column {', '.join(sorted(missing))}; found {found[:200]}")
            elif cells and len(cells) != len(header):
                yield origin, SampleError("row_unreadable", f"found {len(cells)} cells, the header has {len(header)}")
            elif cells:
                row = dict(zip(header, cells, strict=True))
                yield origin, row | {"id": row["index"], "pixels": row.pop("image", "")}


def _decoded(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(f"{path}:{number}: not UTF-8 ({error}); convert the file") from error


def _item(row: JsonRow, origin: str) -> tuple[BenchmarkItem, bool]:
    """A row of either format as an item, and whether its answer is the index of an option.

    Raises:
        SampleError: field_missing, field_type, answer_empty, options.
    """
    if "conversations" in row:
        row = _of_conversation(row, origin)
    name = next((str(row[key]).strip() for key in ("id", "index") if not is_missing(row.get(key))), "")
    if not name:
        raise SampleError("field_missing", f"found {sorted(row)}, expected id or index")
    options, keys = read_options(row)
    answers = () if is_missing(row.get("answer")) else tuple(text.strip() for text in texts(row["answer"]))
    if not answers or any(map(is_missing, answers)):
        raise SampleError(
            "answer_empty", f"found {row.get('answer')!r:.80}, no reference answer; use a split that has answers"
        )
    # Open questions keep their answers as texts; with options the answer becomes a letter.
    by_index = False
    if options:
        letter, by_index = read_letter(row["answer"], options, keys)
        answers = (letter,)
    question = row.get("question")
    if not isinstance(question, str) or is_missing(question):
        raise SampleError("field_missing", f"question is {question!r:.80}, expected a text")
    hint, category = ("" if is_missing(row.get(key)) else str(row[key]).strip() for key in ("hint", "category"))
    return BenchmarkItem(name, question.strip(), answers, options, hint, category, _pictures(row), origin), by_index


def _of_conversation(row: JsonRow, origin: str) -> JsonRow:
    """A LLaVA row of one question and its answer."""
    paths = texts(row.get("image"))
    sample = build_sample(row, [ImageRef(path) for path in paths], "", origin)
    turns = [turn for turn in sample.turns if turn.role != "system"]
    if len(turns) != 2:
        raise SampleError("turns_order", f"found {len(turns)} turns, expected one question and its answer")
    question = turns[0].text.replace(IMAGE_PLACEHOLDER, "").strip()
    return {**row, "id": sample.id, "question": question, "answer": turns[1].text, "image": paths}


def _pictures(row: JsonRow) -> tuple[Picture, ...]:
    """Pixels or the index of another row, else paths."""
    found = {key: [] if is_missing(row.get(key)) else texts(row[key]) for key in ("pixels", "image", "image_path")}
    if pixels := found["pixels"]:
        # A short cell is no picture but the index of the row that has the same one.
        return tuple(Picture("base64" if len(cell) >= MIN_BASE64 else "same_as", cell) for cell in pixels)
    return tuple(Picture("path", path) for path in [*found["image"], *found["image_path"]])


def _file(benchmark: str) -> Path:
    if benchmark.startswith(EASY_VQA):
        return _easy_vqa_images(benchmark).with_name("questions.json")
    path = Path(benchmark)
    if path.suffix not in (".tsv", ".jsonl") or not path.is_file():
        problem = "is no .tsv or .jsonl file" if path.exists() else "does not exist"
        raise RecordError(f"{benchmark} {problem}; give one, or {EASY_VQA}test")
    return path


def _easy_vqa_images(benchmark: str) -> Path:
    split = benchmark.removeprefix(EASY_VQA)
    package = importlib.util.find_spec("easy_vqa")
    if split not in ("test", "train") or package is None or package.origin is None:
        problem = "easy-vqa is not installed: pip install -e .[demo]" if package is None else f"no split {split!r}"
        raise RecordError(f"{benchmark}: {problem}; expected {EASY_VQA}test or {EASY_VQA}train")
    return Path(package.origin).parent / "data" / split / "images"
