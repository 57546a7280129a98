"""Images of items and of evaluation sets are marked from files, folders and TSV files; none is passed over in silence."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from sicog_mcore.cognition.curation.image_marks import mark_evaluation, mark_items
from sicog_mcore.cognition.curation.near_duplicates import ImageMark, content_hash
from sicog_mcore.errors import ConfigError, SampleError
from tests.builders import write_image


def test_every_item_image_has_a_mark_or_a_reason_whatever_the_threads(tmp_path: Path) -> None:
    for seed in range(3):
        write_image(tmp_path / f"{seed}.png", 40, 60, seed)
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths = ["0.png", "1.png", "0.png", "bad.png", "gone.png", "2.png"]
    marks = mark_items(paths, tmp_path, workers=1)
    assert list(marks) == ["0.png", "1.png", "bad.png", "gone.png", "2.png"]
    kinds = [type(mark) for mark in marks.values()]
    assert kinds == [ImageMark, ImageMark, SampleError, SampleError, ImageMark]
    found = marks["1.png"]
    assert isinstance(found, ImageMark) and found.content == content_hash((tmp_path / "1.png").read_bytes())
    assert list(map(str, mark_items(paths, tmp_path, workers=4).values())) == list(map(str, marks.values()))


def test_evaluation_images_come_from_files_folders_and_tables(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "deep" / "a.JPG", 30, 30, 1)
    (tmp_path / "set" / "broken.png").write_bytes(b"known by its bytes alone")
    (tmp_path / "set" / "readme.txt").write_text("no image")
    data = (tmp_path / "set" / "deep" / "a.JPG").read_bytes()
    table = tmp_path / "bench.tsv"
    table.write_text(f"index\timage\n0\t{base64.b64encode(data).decode()}\n1\t0\n")  # row 1 has the image of row 0
    marked = mark_evaluation([tmp_path / "set", table, tmp_path / "set" / "deep" / "a.JPG"], workers=2)
    assert [name for name, _ in marked] == ["broken.png", "a.JPG", "bench.tsv:2", "a.JPG"]
    assert [mark.content for _, mark in marked[1:]] == [content_hash(data)] * 3
    assert marked[0][1] == ImageMark(content_hash(b"known by its bytes alone"), None, b"")


@pytest.mark.parametrize("name", ["empty", "gone", "text.tsv"])
def test_a_source_without_an_image_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tsv").write_text("question\nwhat\n")
    with pytest.raises(ConfigError, match=f"--evaluation = '{tmp_path / name}'"):
        mark_evaluation([tmp_path / name], workers=1)
