"""The size of a stored image is read from its header: the same as decoding gives, from a few kilobytes.

Tested with it: image_range.py.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.decode import decode_image, read_bytes, read_size, read_stored_size
from sicog_mcore.data.image_header import jpeg_header, png_header, webp_header
from sicog_mcore.data.sample import ImageRef, Size
from sicog_mcore.data.sources import open_sources
from sicog_mcore.errors import SampleError
from tests.data.zoo import IMAGES_FOLDER, ROWS_FILE, build_zoo

LIMITS = DataConfig()
ORIENTATION = 0x0112
PAGE = 4096


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of every read of an image."""
    pread, sizes = os.pread, []

    def counting(descriptor: int, length: int, offset: int) -> bytes:
        data = pread(descriptor, length, offset)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counting)
    yield sizes


def _noise(height: int = 400, width: int = 500) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _save(path: Path, file_format: str, **options: object) -> ImageRef:
    if "orientation" in options:
        exif = Image.Exif()
        exif[ORIENTATION] = options.pop("orientation")
        options["exif"] = exif
    _noise().save(path, file_format, **options)
    return ImageRef(str(path))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(("file_format", "pages"), [("JPEG", 1), ("PNG", 12), ("WEBP", 3), ("TIFF", 6)])
def test_an_upright_size_takes_a_few_pages(
    file_format: str, pages: int, orientation: int, tmp_path: Path, read: list[int]
) -> None:
    ref = _save(tmp_path / "a", file_format, orientation=orientation)
    assert os.path.getsize(ref.path) > 100_000
    size = read_stored_size(ref, LIMITS)
    assert sum(read) <= pages * PAGE
    assert size == decode_image(read_bytes(ref), LIMITS).shape[:2]
    assert size == ((500, 400) if orientation in (6, 8) else (400, 500))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"icc_profile": bytes(200_000), "orientation": 6}),  # four segments in front of the size
        ("JPEG", {"comment": b"x" * 60_000}),
        ("JPEG", {"xmp": b'<x tiff:Orientation="6"/>'}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"xmp": b'<x tiff:Orientation="8"/>', "icc_profile": bytes(100)}),
        ("PNG", {}),
    ],
)
def test_every_header_tells_the_size_of_the_pixels(
    file_format: str, options: dict[str, object], tmp_path: Path, read: list[int]
) -> None:
    ref = _save(tmp_path / "a", file_format, **dict(options))
    size = read_stored_size(ref, LIMITS)
    assert sum(read) < os.path.getsize(ref.path) / 4
    assert size == read_size(read_bytes(ref), LIMITS) == decode_image(read_bytes(ref), LIMITS).shape[:2]


@pytest.mark.parametrize("file_format", ["GIF", "AVIF"])
def test_two_formats_are_read_whole(file_format: str, tmp_path: Path) -> None:
    ref = _save(tmp_path / "a", file_format)
    assert read_stored_size(ref, LIMITS) == (400, 500)


def test_an_image_inside_a_shard_is_read_from_its_place(tmp_path: Path, read: list[int]) -> None:
    image = read_bytes(_save(tmp_path / "a", "JPEG", orientation=6))
    (tmp_path / "shard").write_bytes(b"\xff\xd8\xff" * 1000 + image + b"rest" * 2000)
    read.clear()
    assert read_stored_size(ImageRef(str(tmp_path / "shard"), 3000, len(image)), LIMITS) == (500, 400)
    assert sum(read) == PAGE


def test_every_image_of_the_zoo_has_the_size_or_the_reason_of_its_bytes(tmp_path: Path) -> None:
    build_zoo(tmp_path / "data")
    source = SourceConfig(path=str(tmp_path / "data" / ROWS_FILE), images=str(tmp_path / "data" / IMAGES_FOLDER))
    samples, seen = open_sources([source], LIMITS), 0
    for row in range(len(samples)):
        try:
            refs = samples.read(row).images
        except SampleError:
            continue
        for ref in refs:
            try:
                expected: Size | str = read_size(read_bytes(ref), LIMITS)
            except SampleError as error:
                expected = str(error)
            try:
                found: Size | str = read_stored_size(ref, LIMITS)
            except SampleError as error:
                found = str(error)
            assert found == expected, ref.path
            seen += 1
    assert seen > 30


@pytest.mark.filterwarnings("ignore::UserWarning")  # damaged EXIF
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_a_header_that_is_cut_anywhere_is_told_as_before(file_format: str, tmp_path: Path) -> None:
    data = read_bytes(_save(tmp_path / "whole", file_format))
    for cut in (1, 3, 12, 20, 29, 60, 180, 400, 620):
        (tmp_path / "cut").write_bytes(data[:cut])
        outcomes = []
        for measure in (
            lambda: read_stored_size(ImageRef(str(tmp_path / "cut")), LIMITS),
            lambda: decode_image(read_bytes(ImageRef(str(tmp_path / "cut"))), LIMITS).shape[:2],
        ):
            try:
                outcomes.append(measure())
            except SampleError as error:
                outcomes.append(error.reason)
        # What stands behind the header is only seen by decoding.
        assert outcomes[0] == outcomes[1] or outcomes[0] == (400, 500), cut


def test_unusual_headers_are_left_to_the_library() -> None:
    def encoded(file_format: str, **options: object) -> io.BytesIO:
        stream = io.BytesIO()
        _noise(8, 9).save(stream, file_format, **options)
        return stream

    assert jpeg_header(encoded("JPEG")).size == (9, 8)  # type: ignore[union-attr]
    data = bytearray(encoded("JPEG").getvalue())
    at = data.index(b"\xff\xc0") + 4
    for place, value in ((at, 12), (at + 5, 2), (at + 1, 0), (at - 2, 3)):  # bits, layers, height 0, length
        damaged = bytearray(data)
        damaged[place] = value
        if place == at + 1:
            damaged[at + 2] = 0
        assert jpeg_header(io.BytesIO(bytes(damaged))) is None
    frames = {"save_all": True, "append_images": [_noise(8, 9).rotate(90)]}
    assert webp_header(encoded("WEBP", **frames)) is None and webp_header(io.BytesIO(b"RIFF")) is None
    assert len(png_header(encoded("PNG"))) < 100
