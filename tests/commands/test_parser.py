"""Options and words: whatever options there are, their words give them back, and what words do not fit is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sicog_mcore.commands.parser import make_parser, option_forms, read_options, to_words
from sicog_mcore.flags import flag

NO_SURROGATES = st.characters(exclude_categories=["Cs"])
WORDS = st.text(NO_SURROGATES, max_size=8)
INNER = WORDS.filter(lambda word: not word.startswith("-"))  # within a list a word that looks like a flag is one
NUMBERS = st.floats(allow_nan=False)


def count(word: str) -> tuple[str, int]:
    name, _, number = word.rpartition("=")
    return name, int(number)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A group.

    Attributes:
        tall, wide: sizes.
        kind: of two.
    """

    tall: int = 3
    wide: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Every form at once.

    Attributes:
        first: a positional word with 50 % of the weight.
        needed: a name.
        asked: counts by name.
        pairs: two paths, again and again.
        part: a group.
        on: is switched off.
        loud: is switched on.
        x, y: exclude each other.
    """

    first: str = flag(is_positional=True)
    needed: str
    asked: tuple[tuple[str, int], ...] = flag(parse=count, write=lambda pair: f"{pair[0]}={pair[1]}")
    pairs: tuple[tuple[Path, Path], ...] = flag((), is_repeated=True)
    part: Part = Part()
    on: bool = True
    loud: bool = False
    x: str | None = flag(None, group="one")
    y: float | None = flag(None, short="-y", group="one")
    paths: tuple[Path, ...] = field(default=())

    def mistake(self) -> str:
        return "needed must not be 'forbidden'" if self.needed == "forbidden" else ""


@st.composite
def wholes(draw: st.DrawFn) -> Whole:
    chosen = draw(st.sampled_from(["x", "y", ""]))
    return Whole(
        first=draw(WORDS),
        needed=draw(WORDS.filter(lambda word: word != "forbidden")),
        asked=tuple(draw(st.lists(st.tuples(INNER, st.integers(0)), min_size=1, max_size=3))),
        pairs=tuple(draw(st.lists(st.tuples(INNER.map(Path), INNER.map(Path)), max_size=2))),
        part=Part(tall=draw(st.integers()), wide=draw(NUMBERS), kind=draw(st.sampled_from(["a", "b"]))),
        on=draw(st.booleans()),
        loud=draw(st.booleans()),
        x=draw(WORDS) if chosen == "x" else None,
        y=draw(NUMBERS) if chosen == "y" else None,
        paths=tuple(draw(st.lists(INNER.map(Path), max_size=2))),
    )


@given(wholes())
def test_words_give_the_options_back(options: Whole) -> None:
    assert read_options(Whole, to_words(options)) == options


def test_the_forms_of_today_are_read() -> None:
    words = "--asked cod=2 caption=1 --needed n --pairs A B --pairs C D --no-on -y 2 --kind b --paths p q -- word"
    found = read_options(Whole, words.split())
    assert found == Whole(
        first="word",
        needed="n",
        asked=(("cod", 2), ("caption", 1)),
        pairs=((Path("A"), Path("B")), (Path("C"), Path("D"))),
        on=False,
        y=2.0,
        part=Part(kind="b"),
        paths=(Path("p"), Path("q")),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("w --asked a=1", "required: --needed"),
        ("w --needed n --asked a", "argument --asked: invalid count value: 'a'"),
        ("w --needed n --asked a=1 --kind c", "argument --kind: invalid choice: 'c' (choose from 'a', 'b')"),
        ("w --needed n --asked a=1 --x 1 -y 2", "argument --y/-y: not allowed with argument --x"),
        ("w --needed n --asked a=1 --pairs A", "argument --pairs: expected 2 arguments"),
        ("w --needed forbidden --asked a=1", "needed must not be 'forbidden'"),
    ],
)
def test_wrong_words_end_with_two(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read_options(Whole, words.split())
    assert message in capsys.readouterr().err


def test_help_comes_from_the_docstring() -> None:
    text = " ".join(make_parser(Whole, "About.", "sicog whole").format_help().split())
    assert "usage: sicog whole" in text and "a positional word with 50 % of the weight" in text
    assert "--tall TALL sizes (default: 3)" in text and "--wide WIDE sizes (default: 0.5)" in text
    assert "--no-on is switched off" in text and "--needed NEEDED a name" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"paths": (Path("-p"),)}, "'-p' would be read as a flag"), ({"asked": ()}, "no words stand for an empty list")],
)
def test_what_no_words_stand_for_is_said(changed: dict[str, object], message: str) -> None:
    options = Whole(**{"first": "f", "needed": "n", "asked": (("a", 1),), **changed})
    with pytest.raises(ValueError, match=message):
        to_words(options)


def test_nested_fields_keep_their_path() -> None:
    assert [form.dest for form in option_forms(Whole)][4:7] == ["part.tall", "part.wide", "part.kind"]
