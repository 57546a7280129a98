"""Makes small pictures for a page that loads nothing: pixels are encoded anew, and slices get their borders.

In: path of a record's image   Out: Thumbnail, or SampleError   Next: page.py
No byte of the file itself gets into the page: neither its metadata, nor one that a browser would read in another way.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sicog_mcore.config import DataConfig
from sicog_mcore.data.decode import decode_image, read_bytes
from sicog_mcore.data.rows import locate_image
from sicog_mcore.data.sample import Size
from sicog_mcore.data.slicing import SlicePlan
from sicog_mcore.files import hash_bytes

SIDE_PX = 360
MAX_BYTES = 14_000  # so that 500 pictures stay below 10 MB as text
QUALITIES = (78, 62, 46, 30)


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of an image.

    Attributes:
        uri: data URI of a WebP file.
        image: size of the image itself, upright (px).
        file_hash: xxh128 of the image's file.
    """

    uri: str
    image: Size
    file_hash: str


@dataclass(frozen=True)
class Line:
    """A border between slices, in pixels of the image."""

    x1: float
    y1: float
    x2: float
    y2: float


def make_thumbnail(path: str, root: str, limits: DataConfig) -> Thumbnail:
    """The picture of an image file.

    Args:
        path: as the record has it, relative to ``root``.
        root: real path of the folder of images; nothing outside it is read.
        limits: on size and aspect, those of the run.

    Raises:
        SampleError: the file cannot be used; the reasons of data/decode.py and image_path_unsafe.
    """
    # The path comes from a record, so it is held inside the folder of images.
    data = read_bytes(locate_image(path, root))
    pixels = decode_image(data, limits)
    uri = "data:image/webp;base64," + base64.b64encode(_encode(pixels)).decode("ascii")
    return Thumbnail(uri, Size(*pixels.shape[:2]), hash_bytes(data))


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    """WebP bytes within MAX_BYTES: first with less quality, then with fewer pixels."""
    image = Image.fromarray(pixels)
    scale = SIDE_PX // 2 // max(image.size)
    if scale > 1:  # a few pixels are shown as what they are, not as a speck
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    side = SIDE_PX
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=quality)
            if buffer.tell() <= MAX_BYTES:
                return buffer.getvalue()
        # Noise defeats every quality; halving the side always ends, for four times fewer pixels fit sooner or later.
        side //= 2


def slice_borders(plan: SlicePlan) -> tuple[Line, ...]:
    """Borders between the slices of an image, columns first; none for an image that is not sliced.

    The whole image is resized to the grid and cut, so slices are equal shares of it to the fraction of a pixel.
    """
    (rows, columns), (height, width) = plan.grid, plan.image
    upright = [Line(width * i / columns, 0, width * i / columns, height) for i in range(1, columns)]
    level = [Line(0, height * i / rows, width, height * i / rows) for i in range(1, rows)]
    return (*upright, *level)


def slice_centres(plan: SlicePlan) -> tuple[tuple[float, float], ...]:
    """Middle (x, y) of every slice in pixels of the image, in the order of the visual tokens."""
    (rows, columns), (height, width) = plan.grid, plan.image
    return tuple(
        (width * (column + 0.5) / columns, height * (row + 0.5) / rows)
        for row in range(rows)
        for column in range(columns)
    )
