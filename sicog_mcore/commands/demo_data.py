"""Builds a small real data set from images that PyPI packages ship; nothing is downloaded.

In: easy-vqa, scikit-image, scikit-learn, matplotlib as installed, or this package's own pictures; demo_captions.json
Out: a folder with images/, train.jsonl (LLaVA format), tokenizer.json, README.md and manifest.json
Next: loop_demo_data.py. The same packages give the same bytes; a finished folder is recognised by its hashes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sicog_mcore.commands.picture_sources import CAPTIONS, MissingPackage, PictureKind, Pictures, open_pictures
from sicog_mcore.commands.verb import Verb, VerbCall, reporting
from sicog_mcore.config import DataConfig
from sicog_mcore.data.rows import JsonRow
from sicog_mcore.files import commit_folder, hash_file, whole_folder
from sicog_mcore.flags import flag

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_WORDS = ("system\n", "user\n", "assistant\n", DataConfig().system_prompt)
VOCAB_SIZE = 1024
QUESTIONS_PER_SHAPE = 4
DESCRIBE = "Describe the picture."
ANSWER_KINDS = (
    ("yes", "no"),
    ("circle", "rectangle", "triangle"),
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)

QuestionsAndAnswers = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class DemoDataOptions:
    """Options that ``demo-data`` takes.

    Attributes:
        out: folder to make.
        vqa_images: shape images.
        pictures: of other installed packages, or this package's own, which need no other.
    """

    out: Path = Path("data/demo")
    vqa_images: int = flag(300, metavar="N")
    pictures: PictureKind = "packages"

    def mistake(self) -> str:
        """Returns what is wrong with the options, empty if nothing is."""
        return f"--vqa-images {self.vqa_images}: expected 0 or more" if self.vqa_images < 0 else ""


@dataclass(frozen=True)
class DemoImage:
    """An image that is copied comes from somewhere, under a licence.

    Attributes:
        name: file name under images/.
    """

    name: str
    source: Path
    origin: str
    licence: str


def conversation(row_id: str, image: str, turns: QuestionsAndAnswers, source: str) -> JsonRow:
    """One row in LLaVA format; the image, if there is one, stands in front of the first question."""
    row: JsonRow = {"id": row_id, "image": f"images/{image}"} if image else {"id": row_id}
    texts = [text for turn in turns for text in turn]
    if image:
        texts[0] = f"<image>\n{texts[0]}"
    row["conversations"] = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return row | {"caption_source": source}


def shapes(num_images: int, pictures: Pictures) -> tuple[list[DemoImage], list[JsonRow]]:
    """The first images of the source, each with its first questions as turns of one conversation."""
    folder = pictures.shapes
    turns: dict[int, QuestionsAndAnswers] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        turns.setdefault(image, []).append((question, answer))
    if num_images > len(turns):
        raise ValueError(
            f"--vqa-images {num_images}: {pictures.shape_name} has {len(turns)} training images; ask for at most that many"
        )
    items, rows = [], []
    for image in sorted(turns)[:num_images]:
        name = f"shape_{image:04d}.png"
        items.append(DemoImage(name, folder / "images" / f"{image}.png", pictures.shape_origin, pictures.shape_licence))
        rows.append(conversation(f"shape-{image:04d}", name, turns[image][:QUESTIONS_PER_SHAPE], pictures.shape_name))
    return items, rows


def photographs(captions: dict[str, Any], pictures: Pictures) -> tuple[list[DemoImage], list[JsonRow]]:
    """Photographs, each with three rows: a caption, questions, and both in one conversation."""
    source = captions["caption_source"]
    items, rows = [], []
    for photo in captions["photos"]:
        path = pictures.photograph(photo)
        if path is None:
            continue
        items.append(DemoImage(path.name, path, photo["origin"], photo["licence"]))
        caption, questions = (
            (DESCRIBE, photo["caption"]),
            [(question, answer) for question, answer in photo["questions"]],
        )
        for kind, turns in (("caption", [caption]), ("questions", questions), ("both", [caption, *questions])):
            rows.append(conversation(f"photo-{path.stem}-{kind}", path.name, turns, source))
    return items, rows


def preference_pairs(rows: list[JsonRow]) -> list[JsonRow]:
    """Pairs for preference training: the answer of a shape's first question against a wrong one of the same kind."""
    kinds = {answer: kind for kind in ANSWER_KINDS for answer in kind}
    pairs = []
    for i, row in enumerate(rows):
        question, answer = (turn["value"] for turn in row["conversations"][:2])
        others = [other for other in kinds[answer] if other != answer]
        pair = {"id": f"pair-{row['id']}", "image": row["image"], "prompt": question}
        pairs.append(pair | {"chosen": answer, "rejected": others[i % len(others)]})
    return pairs


def text_rows(captions: dict[str, Any]) -> list[JsonRow]:
    """Rows without an image."""
    return [
        conversation(f"text-{i:02d}", "", [(question, answer)], captions["caption_source"])
        for i, (question, answer) in enumerate(captions["text_only"])
    ]


def train_tokenizer(rows: list[JsonRow]) -> Tokenizer:
    """Byte-level BPE on the texts of the rows; covers every byte, so no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    tokenizer.train_from_iterator([*texts, *(CHAT_WORDS * len(rows))], trainer)  # the template writes them in every row
    return tokenizer


def readme(photos: list[DemoImage], num_shapes: int, num_rows: int, caption_source: str, pictures: Pictures) -> str:
    """Origin and licence of everything in the folder."""
    lines = [
        "# Demo data of sicog_mcore",
        "",
        f"{num_rows} rows in LLaVA format, made by `sicog demo-data` from files of installed packages.",
        "Image paths in train.jsonl are relative to this folder.",
        "",
        f"- Captions, questions and answers labelled `{caption_source}`: Apache-2.0, as the project.",
        f"- {num_shapes} images `shape_*.png` with their questions and answers (labelled `{pictures.shape_name}`):"
        f" {pictures.shape_origin}, {pictures.shape_licence}.",
        "- tokenizer.json: trained on the text of these rows.",
        "",
        "| photograph | origin | licence |",
        "|---|---|---|",
        *(f"| {photo.name} | {photo.origin} | {photo.licence} |" for photo in photos),
    ]
    return "\n".join(lines) + "\n"


def files_below(folder: Path) -> Iterator[Path]:
    """Yields every file of a finished folder that its manifest lists."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json")


def request(num_images: int, pictures: Pictures) -> dict[str, str | int]:
    """Gives the request that determines the bytes; a folder made from another request is made anew."""
    versions = {**pictures.versions, "tokenizers": metadata.version("tokenizers")}
    return {"vqa_images": num_images, "captions": hash_file(CAPTIONS), "program": hash_file(Path(__file__)), **versions}


def is_complete(out: Path, wanted: dict[str, str | int]) -> bool:
    """Whether the folder was made from the same request and still holds exactly the bytes of its manifest."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    if manifest.get("request") != wanted:
        return False
    return manifest["files"] == {path.relative_to(out).as_posix(): hash_file(path) for path in files_below(out)}


def write(folder: Path, num_images: int, wanted: dict[str, str | int], pictures: Pictures) -> str:
    """Writes all files into an empty folder; returns one line that says what they hold."""
    captions = json.loads(CAPTIONS.read_text(encoding="utf-8"))
    shape_items, shape_rows = shapes(num_images, pictures)
    photo_items, photo_rows = photographs(captions, pictures)
    items, rows = [*photo_items, *shape_items], [*photo_rows, *shape_rows, *text_rows(captions)]
    (folder / "images").mkdir(parents=True)
    for item in items:
        shutil.copyfile(item.source, folder / "images" / item.name)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    pairs = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in preference_pairs(shape_rows)]
    (folder / "pairs.jsonl").write_text("".join(pairs), encoding="utf-8")
    tokenizer = train_tokenizer(rows)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = readme(photo_items, len(shape_items), len(rows), captions["caption_source"], pictures)
    (folder / "README.md").write_text(text, encoding="utf-8")
    files = {path.relative_to(folder).as_posix(): hash_file(path) for path in files_below(folder)}
    manifest = json.dumps({"request": wanted, "files": files}, indent=1)
    (folder / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
    return (
        f"{len(rows)} rows: {len(photo_rows)} on {len(photo_items)} photographs, {len(shape_rows)} on shapes,"
        f" {len(rows) - len(photo_rows) - len(shape_rows)} without an image; {tokenizer.get_vocab_size()} tokens"
    )


@dataclass(frozen=True)
class DemoData:
    """A folder of demo data.

    Attributes:
        contents: what was written into it, in words; empty where it was complete already.
    """

    out: Path
    contents: str


def prepare_demo_data(options: DemoDataOptions) -> DemoData:
    """Makes the folder if it is not complete; it appears whole or not at all.

    Raises:
        MissingPackage: a package that ships images is not installed.
        ValueError: more images were asked for than there are, or the folder holds something else.
    """
    with open_pictures(options.pictures, options.vqa_images) as pictures:
        return _prepare(options.out, options.vqa_images, pictures)


def _prepare(out: Path, num_images: int, pictures: Pictures) -> DemoData:
    wanted = request(num_images, pictures)
    if is_complete(out, wanted):
        return DemoData(out, "")
    if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not demo data; choose another --out, or remove it")
    partial = out.with_name(out.name + ".partial")
    with whole_folder(partial):
        contents = write(partial, num_images, wanted, pictures)
        if out.exists():
            shutil.rmtree(out)
        commit_folder(partial, out)
    return DemoData(out, contents)


def main(options: DemoDataOptions, call: VerbCall) -> int:
    """Makes the folder and says what it holds; returns the exit code."""

    def work() -> str:
        made = prepare_demo_data(options)
        return f"{made.out}: {made.contents or 'already complete'}"

    return reporting("prepare_demo_data", work, (MissingPackage, ValueError))


VERB = Verb((__doc__ or "").splitlines()[0], DemoDataOptions, main)
