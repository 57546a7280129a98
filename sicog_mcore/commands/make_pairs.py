"""Preference pairs from answers to spoiled images: writes the spoiled images, and joins answers into rows of pairs.

corrupt: In: LLaVA rows and images   Out: a folder with images/ and rows.jsonl, to generate answers from
join: In: the same rows, rejected answers {id, answer}, maybe chosen ones   Out: rows of pairs
Next: data/pairs.py. Everything is joined by id; a row that yields no pair is counted and named by its reason.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from PIL import Image

from sicog_mcore.cognition.annotation.annotated_rows import write_rows
from sicog_mcore.commands.verb import Verb, VerbCall, VerbFamily
from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.corrupt import Corruption, corrupt
from sicog_mcore.data.decode import decode_image, read_bytes
from sicog_mcore.data.pairs import build_pair
from sicog_mcore.data.rows import JsonRow, parse_row
from sicog_mcore.data.sample import Role, Sample
from sicog_mcore.data.sources import open_sources
from sicog_mcore.errors import EXIT_GIVE_UP, EXIT_OK, SampleError, SicogError, exit_code, printable
from sicog_mcore.files import made_folder

SPEAKERS: Mapping[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}
ROW_FILES = (".json", ".jsonl")

KINDS: tuple[Corruption, ...] = get_args(Corruption)


@dataclass(frozen=True, kw_only=True)
class SpoilOptions:
    """Options that ``make-pairs corrupt`` takes.

    Attributes:
        seed: decides which kind each image gets, and how.
        kinds: one is drawn for each image.
        out: folder for rows.jsonl and images/.
        rows: LLaVA rows, .json or .jsonl.
        images: folder that their image paths are relative to.
    """

    seed: int = 42
    kinds: tuple[Corruption, ...] = KINDS
    out: Path
    rows: Path
    images: Path


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Options that ``make-pairs join`` takes.

    Attributes:
        rejected: JSONL of {id, answer}.
        chosen: the same; without it the rows' own last answers.
        out: JSONL file of pairs.
        rows: LLaVA rows, .json or .jsonl.
        images: folder that their image paths are relative to.
    """

    rejected: Path
    chosen: Path | None = None
    out: Path
    rows: Path
    images: Path


@dataclass(frozen=True)
class MadeRows:
    """Rows that a verb has written.

    Attributes:
        out: folder or file, as asked for.
        rows: number of rows in it.
        refused: rows that were left out, by reason.
    """

    out: Path
    rows: int
    refused: Counter[str]


def read_samples(rows: Path, images: Path, refused: Counter[str], say: Callable[[str], None]) -> Iterator[Sample]:
    """Yields the usable rows of a file; the reasons of all others are counted."""
    if rows.suffix not in ROW_FILES:
        raise ValueError(f"{rows} is no {' or '.join(ROW_FILES)} file")
    samples = open_sources([SourceConfig(path=str(rows), images=str(images))], DataConfig())
    for note in samples.notes:
        say(note)
    for row in range(len(samples)):
        try:
            yield samples.read(row)
        except SampleError as error:
            refused[error.reason] += 1


def prompt_row(sample: Sample, images: list[str]) -> JsonRow:
    """Id, images and the turns before the last answer, in LLaVA form."""
    turns = [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in sample.turns[:-1]]
    return {"id": sample.id} | ({"image": images} if images else {}) | {"conversations": turns}


@contextmanager
def new_files(folder: Path) -> Iterator[list[Path]]:
    """A folder, and a list for the files that are written to it; they are removed if the block fails."""
    written: list[Path] = []
    with made_folder(folder):
        try:
            yield written
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise


def corrupted_rows(
    options: SpoilOptions, refused: Counter[str], written: list[Path], say: Callable[[str], None]
) -> Iterator[JsonRow]:
    """Spoils the images of each row, writes them, and names them in the row; rows without an image are left out."""
    limits, folder = DataConfig(), options.out / "images"
    for number, sample in enumerate(read_samples(options.rows, options.images, refused, say)):
        if not sample.images:
            refused["no_image"] += 1
            continue
        try:
            pixels = [decode_image(read_bytes(image), limits) for image in sample.images]
        except SampleError as error:
            refused[error.reason] += 1
            continue
        spoiled = [corrupt(p, f"{sample.id}#{i}", options.seed, options.kinds) for i, p in enumerate(pixels)]
        names = [f"{number:08d}-{i}.png" for i in range(len(spoiled))]
        for name, image in zip(names, spoiled, strict=True):
            written.append(folder / name)
            Image.fromarray(image.pixels).save(folder / name)
        yield prompt_row(sample, names) | {"corruption": [image.kind for image in spoiled]}


def read_answers(path: Path) -> dict[str, str]:
    """Answers by sample id, from JSONL rows {id, answer}."""
    answers: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = parse_row(line)
        except SampleError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if not isinstance(row.get("answer"), str) or "id" not in row:
            raise ValueError(f"{path}:{number}: found {sorted(row)}, expected id and answer")
        if answers.setdefault(str(row["id"]), row["answer"]) != row["answer"]:
            raise ValueError(f"{path}:{number}: a second answer for {row['id']!r}; keep one per id")
    return answers


def pair_rows(options: PairOptions, refused: Counter[str], say: Callable[[str], None]) -> Iterator[JsonRow]:
    """Joins answers by id; the chosen one is the row's own last answer unless others are given."""
    rejected = read_answers(options.rejected)
    chosen = read_answers(options.chosen) if options.chosen else None
    root = os.path.realpath(options.images)
    for sample in read_samples(options.rows, options.images, refused, say):
        better = sample.turns[-1].text if chosen is None else chosen.get(sample.id)
        if better is None or sample.id not in rejected:
            refused["no_answer"] += 1
            continue
        images = [os.path.relpath(image.path, root) for image in sample.images]
        row = prompt_row(sample, images) | {"chosen": better, "rejected": rejected[sample.id]}
        try:
            build_pair(row, sample.images, sample.id, sample.origin)
        except SampleError as error:
            refused[error.reason] += 1
            continue
        yield row


def spoil(options: SpoilOptions, say: Callable[[str], None]) -> MadeRows:
    """Writes spoiled images, and rows without their last answers that name them.

    Args:
        say: is told what should be known of the rows.

    Raises:
        ValueError: the rows are in a file of another kind.
        SicogError, OSError: files cannot be read or written; the images that were written are gone then.
    """
    refused: Counter[str] = Counter()
    with new_files(options.out / "images") as written:
        count = write_rows(options.out / "rows.jsonl", corrupted_rows(options, refused, written, say))
    return MadeRows(options.out, count, refused)


def join_pairs(options: PairOptions, say: Callable[[str], None]) -> MadeRows:
    """Writes rows of pairs; answers are joined to rows by id.

    Args:
        say: is told what should be known of the rows.

    Raises:
        ValueError: the rows are in a file of another kind, or an answer is damaged or there twice.
        SicogError, OSError: files cannot be read or written.
    """
    refused: Counter[str] = Counter()
    return MadeRows(options.out, write_rows(options.out, pair_rows(options, refused, say)), refused)


def tell(text: str) -> None:
    """Says something of the rows on standard error."""
    print(f"make_pairs: {text}", file=sys.stderr)


def main(work: Callable[[], MadeRows]) -> int:
    """Makes rows and says how many; returns the exit code."""
    try:
        made = work()
    except (SicogError, ValueError, OSError) as error:
        print(printable(f"make_pairs: {error}"), file=sys.stderr)
        return exit_code(error)
    left_out = ", ".join(f"{number} x {reason}" for reason, number in made.refused.most_common())
    print(printable(f"{made.out}: {made.rows} rows" + (f"; left out: {left_out}" if left_out else "")))
    if not made.rows:
        print(printable("make_pairs: no row could be made; correct what they were left out for"), file=sys.stderr)
        return EXIT_GIVE_UP
    return EXIT_OK


def main_spoil(options: SpoilOptions, call: VerbCall) -> int:
    """Runs ``make-pairs corrupt``; returns the exit code."""
    return main(lambda: spoil(options, tell))


def main_join(options: PairOptions, call: VerbCall) -> int:
    """Runs ``make-pairs join``; returns the exit code."""
    return main(lambda: join_pairs(options, tell))


VERB = VerbFamily(
    (__doc__ or "").splitlines()[0],
    {
        "corrupt": Verb("write spoiled images, to generate rejected answers from", SpoilOptions, main_spoil),
        "join": Verb("write rows of pairs", PairOptions, main_join),
    },
)
