"""Builds the data of the loop's demonstration from images that PyPI packages ship; nothing is downloaded.

In: easy-vqa and the photographs of demo_data.py, as installed, or this package's own pictures
Out: a folder with images/, tokenizer.json, README.md, and rows:
  labelled.jsonl                       questions and short descriptions with answers, for stages 1, 1.5 and 2
  cod.jsonl caption.jsonl              descriptions in steps, and plain ones, for stage 0
  cot.jsonl direct.jsonl               answers in steps, and short ones, for stage 0
  unlabelled.jsonl questions.jsonl     images alone, and with a question: what the model makes its own data from
  evaluation.jsonl                     questions about images that occur nowhere else
Next: loop_config.py (a loop that starts from these files)
Colour and shape are the source's answers; where a shape lies is measured in its pixels. Sentences are made by rule.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sicog_mcore.cognition.annotation.annotated_rows import write_rows
from sicog_mcore.cognition.codec import render
from sicog_mcore.cognition.prompts import ask, find_prompt
from sicog_mcore.commands.demo_data import DemoImage, conversation, photographs, train_tokenizer
from sicog_mcore.commands.picture_sources import CAPTIONS, MissingPackage, PictureKind, Pictures, open_pictures
from sicog_mcore.commands.verb import Verb, VerbCall, reporting
from sicog_mcore.data.rows import JsonRow

SOURCE = "{}, sentences made by rule"
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
ROWS_OF_SKY = ("upper", "middle", "lower")
COLUMNS = ("left", "centre", "right")
BACKGROUND_DISTANCE = 60  # summed over the channels; backgrounds are one light tint
SIZES = (("labelled", 96), ("annotated", 64), ("unlabelled", 96), ("evaluation", 60))


@dataclass(frozen=True, kw_only=True)
class LoopDemoDataOptions:
    """Options that ``loop-demo-data`` takes.

    Attributes:
        out: folder to make.
        pictures: of other installed packages, or this package's own, which need no other.
    """

    out: Path = Path("data/loop_demo")
    pictures: PictureKind = "packages"


@dataclass(frozen=True)
class LoopDemoData:
    """A folder of data for the loop's demonstration.

    Attributes:
        counts: rows of each file, by its name without the ending.
    """

    out: Path
    counts: Mapping[str, int]


@dataclass(frozen=True)
class ShapeImage:
    """An image shows one shape, whose colour and form its questions tell.

    Attributes:
        source: where the image comes from, as rows say it.
        place: where the shape lies, e.g. "upper left".
        questions: about colour and shape, with answers.
    """

    number: int
    path: Path
    colour: str
    shape: str
    place: str
    questions: tuple[tuple[str, str], ...]
    source: str

    @property
    def name(self) -> str:
        """The name of its file below images/."""
        return f"shape_{self.number:04d}.png"

    @property
    def caption(self) -> str:
        """A sentence that says all of it."""
        return f"A {self.colour} {self.shape} at the {self.place}."


def read_shapes(count: int, pictures: Pictures) -> list[ShapeImage]:
    """The first images of the training set of which colour and shape are asked for.

    Raises:
        ValueError: there are fewer.
    """
    folder = pictures.shapes
    asked: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        if answer in (*SHAPES, *COLOURS):
            asked.setdefault(image, []).append((question, answer))
    found: list[ShapeImage] = []
    for number in sorted(asked):
        answers = {answer for _, answer in asked[number]}
        colours, shapes = answers & {*COLOURS}, answers & {*SHAPES}
        if colours and shapes and len(found) < count:
            path = folder / "images" / f"{number}.png"
            questions = tuple(dict(asked[number]).items())
            place, source = find_place(path), SOURCE.format(pictures.shape_name)
            found.append(ShapeImage(number, path, colours.pop(), shapes.pop(), place, questions, source))
    if len(found) < count:
        raise ValueError(f"{pictures.shape_name} has {len(found)} images that fit; {count} are wanted")
    return found


def find_place(path: Path) -> str:
    """Which third of the image, downwards and across, holds the middle of what is not background."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), np.int64)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    shape = np.abs(pixels - background).sum(-1) > BACKGROUND_DISTANCE
    y, x = (float(axis.mean()) / size for axis, size in zip(np.nonzero(shape), shape.shape, strict=True))
    return f"{ROWS_OF_SKY[int(y * 3)]} {COLUMNS[int(x * 3)]}"


def describe(shape: ShapeImage) -> list[str]:
    """The five steps of a description."""
    return [
        f"One {shape.shape}.",
        f"The {shape.shape} is {shape.colour}.",
        f"It lies at the {shape.place}.",
        "Nothing else.",
        shape.caption,
    ]


def reason(shape: ShapeImage, question: str, answer: str) -> list[str]:
    """The four steps of an answer."""
    what = "colour" if answer in COLOURS else "shape"
    return [f"Name the {what}.", f"A {shape.colour} {shape.shape}.", f"The {what} is {answer}.", answer]


def asked(shape: ShapeImage, prompt: str, question: str, answer: str, number: int = 0) -> JsonRow:
    """A training row that asks as generation will."""
    row = conversation(
        f"shape-{shape.number}-{number}#{prompt}", "", [(ask(find_prompt(prompt), question, 1), answer)], shape.source
    )
    return {"id": row["id"], "image": f"images/{shape.name}", **row}


def answered(shapes: Iterable[ShapeImage]) -> Iterator[tuple[ShapeImage, int, str, str]]:
    """Of each image one question about the colour and one about the shape."""
    for shape in shapes:
        for number, kind in enumerate((COLOURS, SHAPES)):
            question, answer = next(entry for entry in shape.questions if entry[1] in kind)
            yield shape, number, question, answer


def make_rows(parts: dict[str, list[ShapeImage]], photo_rows: Sequence[JsonRow]) -> dict[str, list[JsonRow]]:
    """All files of rows, by name."""
    annotated, unlabelled = parts["annotated"], parts["unlabelled"]
    captions = [row for row in photo_rows if row["id"].endswith("-caption")]
    photos = [{"id": row["id"].removesuffix("-caption"), "image": row["image"]} for row in captions]
    return {
        "labelled": [
            *(asked(s, "direct", q, a, i) for s, i, q, a in answered(parts["labelled"])),
            *(asked(shape, "caption", "", shape.caption) for shape in parts["labelled"]),
        ],
        "cod": [asked(shape, "cod", "", render(describe(shape), "cod")) for shape in annotated],
        "caption": [asked(shape, "caption", "", shape.caption) for shape in annotated],
        "cot": [asked(s, "cot", q, render(reason(s, q, a), "cot"), i) for s, i, q, a in answered(annotated)],
        "direct": [asked(s, "direct", q, a, i) for s, i, q, a in answered(annotated)],
        "unlabelled": [{"id": f"image-{s.number}", "image": f"images/{s.name}"} for s in unlabelled] + photos,
        "questions": [
            {
                "id": f"question-{s.number}",
                "image": f"images/{s.name}",
                "conversations": [{"from": "human", "value": f"<image>\n{q}"}],
            }
            for s, i, q, _ in answered(unlabelled)
            if i == s.number % 2
        ],
        "evaluation": [
            {
                "id": f"evaluation-{s.number}-{i}",
                "image": f"images/{s.name}",
                "question": q,
                "answer": a,
                "category": ("colour", "shape")[i],
            }
            for s, i, q, a in answered(parts["evaluation"])
        ],
    }


def readme(photos: Sequence[DemoImage], counts: dict[str, int], pictures: Pictures) -> str:
    """Origin and licence of everything in the folder."""
    lines = [
        "# Data of the loop's demonstration",
        "",
        "Made by `sicog loop-demo-data` from files of installed packages. Images `shape_*.png` and the answers about",
        f"their colour and shape: {pictures.shape_origin}, {pictures.shape_licence}. Sentences around these answers are made"
        " by rule: Apache-2.0.",
        "",
        *(f"- {name}.jsonl: {count} rows" for name, count in counts.items()),
        "",
        "| photograph | origin | licence |",
        "|---|---|---|",
        *(f"| {photo.name} | {photo.origin} | {photo.licence} |" for photo in photos),
    ]
    return "\n".join(lines) + "\n"


def texts(rows: dict[str, list[JsonRow]]) -> list[JsonRow]:
    """The rows that have answers, for the vocabulary."""
    return [row for name in ("labelled", "cod", "caption", "cot", "direct") for row in rows[name]]


def prepare_loop_demo(options: LoopDemoDataOptions) -> LoopDemoData:
    """Writes the folder; the same packages give the same bytes.

    Raises:
        MissingPackage: a package that ships images is not installed.
        ValueError: the folder holds something else.
    """
    count = sum(size for _, size in SIZES)
    with open_pictures(options.pictures, count) as pictures:
        return _prepare(options.out, count, pictures)


def _prepare(out: Path, count: int, pictures: Pictures) -> LoopDemoData:
    if out.exists() and not (out / "README.md").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not this data; choose another --out, or remove it")
    shapes = iter(read_shapes(count, pictures))
    parts = {name: [next(shapes) for _ in range(size)] for name, size in SIZES}
    photos, photo_rows = photographs(json.loads(CAPTIONS.read_text(encoding="utf-8")), pictures)
    rows = make_rows(parts, photo_rows)
    (out / "images").mkdir(parents=True, exist_ok=True)
    counts = {name: len(content) for name, content in rows.items()}
    text = readme(photos, counts, pictures)
    (out / "README.md").write_text(text, encoding="utf-8")  # first: by it the folder is known as ours
    copies = [(photo.source, photo.name) for photo in photos] + [
        (s.path, s.name) for part in parts.values() for s in part
    ]
    for source, name in copies:
        shutil.copyfile(source, out / "images" / name)
    for name, content in rows.items():
        write_rows(out / f"{name}.jsonl", content)
    train_tokenizer(texts(rows)).save(str(out / "tokenizer.json"))
    return LoopDemoData(out, counts)


def main(options: LoopDemoDataOptions, call: VerbCall) -> int:
    """Makes the folder and says what it holds; returns the exit code."""

    def work() -> str:
        made = prepare_loop_demo(options)
        return f"{made.out}: {', '.join(f'{count} {name}' for name, count in made.counts.items())}"

    return reporting("prepare_loop_demo", work, (MissingPackage, ValueError))


VERB = Verb((__doc__ or "").splitlines()[0], LoopDemoDataOptions, main)
