"""The package's own pictures: drawn shapes are what their questions say, photographs are small and have a source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sicog_mcore.commands.loop_demo_data import find_place
from sicog_mcore.commands.picture_sources import COLOURS, OWN_PHOTOGRAPHS, draw_shapes, open_pictures

COUNT = 60
MOST_BYTES = 300_000


def test_drawn_shapes_are_what_their_questions_say(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "a", COUNT)
    draw_shapes(tmp_path / "b", COUNT)
    questions = json.loads((tmp_path / "a/questions.json").read_text())
    assert len(questions) == 4 * COUNT
    places = set()
    for _, answer, number in questions[1::4]:
        path = tmp_path / f"a/images/{number}.png"
        assert path.read_bytes() == (tmp_path / f"b/images/{number}.png").read_bytes()
        with Image.open(path) as image:
            counts = sorted(image.getcolors(64 * 64))
        assert image.size == (64, 64) and [colour for _, colour in counts][0] == COLOURS[answer] and counts[0][0] > 60
        places.add(find_place(path))
    assert len(places) == 9
    assert {answer for _, answer, _ in questions[1::4]} == set(COLOURS)


def test_the_photographs_are_small_and_each_has_a_source() -> None:
    files = sorted(OWN_PHOTOGRAPHS.glob("*.jpg"))
    assert len(files) == 11 and sum(path.stat().st_size for path in files) < MOST_BYTES
    sources = (OWN_PHOTOGRAPHS / "SOURCES.md").read_text()
    for path in files:
        (line,) = [line for line in sources.splitlines() if line.startswith(f"| {path.name} |")]
        assert "CC0" in line or "public domain" in line


def test_more_shapes_than_are_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 4000 shapes are drawn"), open_pictures("own", 4001):
        pass


def test_a_photograph_that_does_not_lie_here_is_left_out() -> None:
    with open_pictures("own", 1) as pictures:
        assert (
            pictures.photograph({"package": "skimage", "file": "data/astronaut.png"})
            == OWN_PHOTOGRAPHS / "astronaut.jpg"
        )
        assert pictures.photograph({"package": "sklearn", "file": "datasets/images/china.jpg"}) is None
