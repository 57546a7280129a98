"""Thumbnails are small, free of metadata and the same every time; slices are drawn where the image is cut."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from sicog_mcore.cognition.reporting.thumbnails import (
    MAX_BYTES,
    SIDE_PX,
    Line,
    make_thumbnail,
    slice_borders,
    slice_centres,
)
from sicog_mcore.config import DataConfig, SlicingConfig
from sicog_mcore.data.sample import Size
from sicog_mcore.data.slicing import plan_slices
from sicog_mcore.errors import SampleError
from tests.rounds import write_image


def picture(uri: str) -> tuple[Image.Image, bytes]:
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return Image.open(io.BytesIO(data)), data


def thumbnail(folder: Path, name: str) -> tuple[Image.Image, bytes]:
    return picture(make_thumbnail(name, os.path.realpath(folder), DataConfig()).uri)


def test_the_worst_image_stays_small(tmp_path: Path) -> None:
    write_image(tmp_path, "noise.png", 700, 900)
    small, data = thumbnail(tmp_path, "noise.png")
    assert len(data) <= MAX_BYTES and max(small.size) <= SIDE_PX
    assert small.width / small.height == pytest.approx(9 / 7, rel=0.02)
    assert thumbnail(tmp_path, "noise.png")[1] == data


def test_metadata_is_dropped_and_its_orientation_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "<script>taken at home</script>"
    write_image(tmp_path, "a.jpg", 40, 80, exif=exif.tobytes())
    small, data = thumbnail(tmp_path, "a.jpg")
    assert b"taken at home" in (tmp_path / "a.jpg").read_bytes() and b"taken at home" not in data
    assert small.width * 2 == small.height and not small.getexif()


def test_a_few_pixels_are_shown_large(tmp_path: Path) -> None:
    write_image(tmp_path, "digit.png", 8, 8)
    assert thumbnail(tmp_path, "digit.png")[0].size == (176, 176)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.png", "image_missing"), ("../a.png", "image_path_unsafe"), ("x.svg", "image_unidentified")],
)
def test_what_is_no_picture_has_a_reason(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    with pytest.raises(SampleError) as error:
        thumbnail(tmp_path, name)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("size", "lines"),
    [
        (Size(336, 336), ()),
        (Size(480, 640), (Line(320, 0, 320, 480), Line(0, 240, 640, 240))),  # 2 x 2
        (Size(427, 640), (Line(320, 0, 320, 427),)),  # two columns
        (
            Size(900, 1024),
            (Line(1024 / 3, 0, 1024 / 3, 900), Line(2048 / 3, 0, 2048 / 3, 900), Line(0, 450, 1024, 450)),
        ),
        (
            Size(1024, 768),
            (Line(384, 0, 384, 1024), Line(0, 1024 / 3, 768, 1024 / 3), Line(0, 2048 / 3, 768, 2048 / 3)),
        ),
    ],
)
def test_borders_lie_where_the_image_is_cut(size: Size, lines: tuple[Line, ...]) -> None:
    plan = plan_slices(size, SlicingConfig(), patch_px=14)
    assert slice_borders(plan) == lines
    assert len(slice_centres(plan)) == plan.num_slices


def test_slices_are_numbered_row_by_row() -> None:
    plan = plan_slices(Size(427, 640), SlicingConfig(), patch_px=14)
    assert slice_centres(plan) == ((160, 213.5), (480, 213.5))
