"""The task: coloured pictures of real handwritten digits, described in words; rows of LLaVA JSON and a small tokenizer.

In: the digits that scikit-learn ships (UCI, 1,797 of 8x8), a seed   Out: a folder with images, rows and tokenizer.json
The digits are real, the colours are ours. Digits of the test set are the same for every seed and never anything else; those
for labels, for the loop and for validation are drawn anew by each seed, and no digit is in two of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from sicog_mcore.cognition.codec import COD_STEPS, header, render
from sicog_mcore.cognition.prompts import ask, find_prompt
from sicog_mcore.files import commit_folder, whole_folder

SIDE, DIGIT_SIDE, JITTER, NOISE = 56, 48, 1, 6.0  # px, px, px, standard deviation of 0..255
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS: Mapping[str, tuple[int, int, int]] = {
    "red": (235, 70, 60),
    "green": (70, 215, 90),
    "blue": (90, 150, 255),
    "yellow": (245, 230, 70),
    "pink": (250, 130, 220),
    "white": (250, 250, 250),
}
GROUNDS: Mapping[str, tuple[int, int, int]] = {  # darker than every ink
    "black": (10, 10, 10),
    "gray": (85, 85, 85),
    "navy": (15, 20, 95),
    "brown": (95, 50, 15),
}
SIZES: Mapping[str, int] = {"labelled": 300, "unlabelled": 997, "validation": 250, "test": 250}
TEST_SEED = 2503_12303
QUESTIONS: Mapping[str, str] = {
    "digit": "Which digit is it?",
    "ink": "Which color has the digit?",
    "ground": "Which color has the background?",
}
CAPTION_PROMPTS = ("caption", "cod")
CONTROLS = ("<|endoftext|>",)
WORD = r" ?[A-Za-z]+|\n| |[^\sA-Za-z]"

Row = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """One picture and the truth about it.

    Attributes:
        id: pool and number.
        glyph: row of scikit-learn's table.
        seed: of the jitter and the noise.
    """

    id: str
    glyph: int
    digit: str
    ink: str
    ground: str
    seed: tuple[int, ...]

    @property
    def image(self) -> str:
        """Path below the data folder."""
        return f"images/{self.id}.png"

    @property
    def caption(self) -> str:
        return f"a {self.ink} {self.digit} on {self.ground}"

    @property
    def steps(self) -> tuple[str, ...]:
        """The five steps of its description."""
        return (f"a {self.digit}", f"{self.ink} ink", f"on {self.ground}", "an empty margin", self.caption)


def draw_pools(seed: int, sizes: Mapping[str, int] = SIZES, renderings: int = 1) -> dict[str, list[Picture]]:
    """Pictures of every pool.

    Args:
        renderings: pictures made of each unlabelled digit, in different colours and places.
    """
    labels = load_digits().target
    order = np.random.default_rng(TEST_SEED).permutation(len(labels))
    test, rest = order[: SIZES["test"]], order[SIZES["test"] :]
    rest = np.random.default_rng([TEST_SEED, seed]).permutation(rest)
    starts = np.cumsum([0, sizes["labelled"], sizes["unlabelled"], sizes["validation"]])
    if starts[-1] > len(rest) or sizes["test"] > len(test):
        raise ValueError(
            f"{dict(sizes)}: {len(rest)} digits beside {len(test)} for the test are available; ask for fewer"
        )
    glyphs = {
        "labelled": rest[starts[0] : starts[1]],
        "unlabelled": np.tile(rest[starts[1] : starts[2]], renderings),
        "validation": rest[starts[2] : starts[3]],
        "test": test[: sizes["test"]],
    }
    return {
        pool: [_picture(pool, i, int(glyph), NAMES[labels[glyph]], seed) for i, glyph in enumerate(rows)]
        for pool, rows in glyphs.items()
    }


def _picture(pool: str, number: int, glyph: int, digit: str, seed: int) -> Picture:
    # The pictures of the test set are the same for every seed.
    key = (TEST_SEED if pool == "test" else seed, tuple(SIZES).index(pool), number)
    random = np.random.default_rng(key)
    ink, ground = str(random.choice(list(INKS))), str(random.choice(list(GROUNDS)))
    return Picture(f"{pool}-{number:04d}", glyph, digit, ink, ground, key)


def paint(picture: Picture, glyphs: NDArray[np.float64]) -> Image.Image:
    """The picture's pixels.

    Args:
        glyphs: [1797, 8, 8], 0 to 16.
    """
    random = np.random.default_rng((*picture.seed, 1))
    mask = Image.fromarray((glyphs[picture.glyph] * 255 / 16).astype(np.uint8))
    mask = mask.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BILINEAR)
    share = np.zeros((SIDE, SIDE, 1))
    top, left = (SIDE - DIGIT_SIDE) // 2 + random.integers(-JITTER, JITTER + 1, 2)
    share[top : top + DIGIT_SIDE, left : left + DIGIT_SIDE, 0] = np.asarray(mask) / 255
    pixels = share * np.array(INKS[picture.ink]) + (1 - share) * np.array(GROUNDS[picture.ground])
    return Image.fromarray((pixels + random.normal(0, NOISE, pixels.shape)).clip(0, 255).astype(np.uint8))


def shift(image: Image.Image, seed: Sequence[int], most: int = 2, noise: float = 12.0) -> Image.Image:
    """Another view of a picture: rolled by up to ``most`` px, with more noise."""
    random = np.random.default_rng(tuple(seed))
    pixels = np.roll(np.asarray(image), random.integers(-most, most + 1, 2), axis=(0, 1))
    return Image.fromarray((pixels + random.normal(0, noise, pixels.shape)).clip(0, 255).astype(np.uint8))


def conversation(row_id: str, image: str, turns: Sequence[tuple[str, ...]]) -> Row:
    """One row in LLaVA format."""
    texts = [text for turn in turns for text in turn]
    return {
        "id": row_id,
        "image": image,
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)],
    }


def caption_rows(picture: Picture) -> list[Row]:
    """The rows of a true description: plain, and in steps."""
    texts = (picture.caption, render(picture.steps, "cod"))
    return [
        conversation(f"{picture.id}-{prompt}", picture.image, [(ask(find_prompt(prompt), "", 1), text)])
        for prompt, text in zip(CAPTION_PROMPTS, texts, strict=True)
    ]


def question_row(picture: Picture) -> Row:
    """All questions in one conversation, each first in a third of the pictures; no answer gives away another."""
    direct, answers = find_prompt("direct"), {"digit": picture.digit, "ink": picture.ink, "ground": picture.ground}
    first = picture.seed[-1] % len(QUESTIONS)
    asked = [*QUESTIONS.items()][first:] + [*QUESTIONS.items()][:first]
    turns = [(ask(direct, text, int(i == 0)), answers[name]) for i, (name, text) in enumerate(asked)]
    return conversation(f"{picture.id}-questions", picture.image, turns)


def item(picture: Picture) -> Row:
    """The picture as the loop sees it: no question, no answer."""
    return {"id": picture.id, "image": picture.image}


def question_items(picture: Picture) -> list[Row]:
    """One item per question, without its answer."""
    return [
        conversation(f"{picture.id}-{name}", picture.image, [(f"<image>\n{text}",)]) for name, text in QUESTIONS.items()
    ]


def make_tokenizer() -> Tokenizer:
    """Words, each with the space before it. Fixed wordings are one token each, so that a step is spent on what differs."""
    fixed = [find_prompt(prompt).text for prompt in CAPTION_PROMPTS] + list(QUESTIONS.values())
    for number in range(1, len(COD_STEPS) + 1):
        fixed.append(("\n\n" if number > 1 else "") + header("cod", number) + "\n")
    texts = [picture.caption + "\n" + "\n".join(picture.steps) for picture in _all_pictures()]
    words = pre_tokenizers.Split(Regex(WORD), "isolated")
    pieces = {piece for text in texts for piece, _ in words.pre_tokenize_str(text)}
    answers = {*NAMES, *INKS, *GROUNDS}
    vocabulary = [*CONTROLS, "<unk>", "\n", ",", " ", *sorted((pieces | answers) - {"\n", ",", " "})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(CONTROLS))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in fixed])
    return tokenizer


def _all_pictures() -> Iterator[Picture]:
    for name in NAMES:
        for ink in INKS:
            for ground in GROUNDS:
                yield Picture("", 0, name, ink, ground, ())


def write_task(folder: Path, seed: int, sizes: Mapping[str, int] = SIZES, renderings: int = 1) -> None:
    """Writes the folder; it appears whole or not at all.

    Files: images/; labelled.jsonl and unlabelled_truth.jsonl, rows to learn from; unlabelled.jsonl, {validation,test}.jsonl
    and {validation,test}_questions.jsonl, items to be asked about; tokenizer.json.
    """
    partial = folder.with_name(folder.name + ".partial")
    with whole_folder(partial):
        _write_task(partial, seed, sizes, renderings)
        commit_folder(partial, folder)


def _write_task(partial: Path, seed: int, sizes: Mapping[str, int], renderings: int) -> None:
    (partial / "images").mkdir()
    pools, glyphs = draw_pools(seed, sizes, renderings), load_digits().images
    for picture in (picture for pool in pools.values() for picture in pool):
        paint(picture, glyphs).save(partial / picture.image)
    labelled = [row for picture in pools["labelled"] for row in [*caption_rows(picture), question_row(picture)]]
    files = {"labelled": labelled, "unlabelled": [item(picture) for picture in pools["unlabelled"]]}
    files["unlabelled_truth"] = [row for picture in pools["unlabelled"] for row in caption_rows(picture)]
    for pool in ("validation", "test"):
        files[pool] = [item(picture) for picture in pools[pool]]
        files[f"{pool}_questions"] = [row for picture in pools[pool] for row in question_items(picture)]
    for name, rows in files.items():
        (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_tokenizer().save(str(partial / "tokenizer.json"))


def write_views(task: Path, out: Path, seed: int) -> None:
    """Other views of the unlabelled pictures, under the same names."""
    rows = [json.loads(line) for line in (task / "unlabelled.jsonl").read_text(encoding="utf-8").splitlines()]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        with Image.open(task / row["image"]) as image:
            shift(image, (seed, number, 2)).save(out / row["image"])


def main() -> int:
    """Writes the task, or other views of its unlabelled pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--sizes", type=json.loads, default=SIZES, help="JSON: pictures of each pool")
    parser.add_argument("--renderings", type=int, default=1, help="pictures made of each unlabelled digit")
    parser.add_argument("--views-of", type=Path, help="folder of a task: write views of it instead")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.views_of:
        write_views(options.views_of, options.out, options.seed)
    else:
        write_task(options.out, options.seed, options.sizes, options.renderings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
