"""Bytes of an image to RGB pixels, strictly: an image is either decoded whole or refused with a reason.

In: ImageRef   Out: uint8 [height, width, 3], or the size alone from the header   Next: slicing.py, patches.py
Reasons: image_missing, image_unreadable, image_empty, image_unidentified, image_too_large, image_aspect,
image_animated, image_truncated, image_corrupt. Sizes are judged from the header, before any pixel is decoded: damage behind
the header is found by ``decode_image`` alone.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from sicog_mcore.config import DataConfig
from sicog_mcore.data.image_header import (
    PNG_SIGNATURE,
    TEXT_CHUNKS,
    is_jpeg,
    is_webp,
    jpeg_header,
    png_header,
    webp_header,
)
from sicog_mcore.data.image_range import open_range
from sicog_mcore.data.sample import ImageRef, Size
from sicog_mcore.errors import SampleError

# Pillow warns of damage that it can live with. Once, for the process: filters set around a call reach other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow knows some 40 formats. Let in are those of still images that cannot run programs, as EPS can, and whose decoder
# refuses a file that is cut off, as JPEG 2000's does not.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
TAIL_BYTES = 64  # of a file, in which its end is looked for

# EXIF orientation -> what brings the image upright (orientation 1, or an unknown one, leaves it alone)
UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)

# What Pillow's plugins raise on bytes that do not follow their format.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def read_bytes(ref: ImageRef) -> bytes:
    """Reads the encoded image, whole.

    Raises:
        SampleError: image_missing; image_unreadable (no regular file, no permission, too many bytes, shard became
            shorter); image_empty.
    """
    with open_range(ref) as file:
        return file.read()


def read_size(data: bytes, limits: DataConfig) -> Size:
    """Height and width (px) of an upright image whose bytes are in memory, from its header alone.

    Args:
        data: the encoded image.
        limits: ``max_image_px`` and ``max_aspect`` are used.

    Raises:
        SampleError: image_unidentified, image_too_large, image_aspect, image_animated, image_truncated, image_corrupt.
    """
    return _header_size(io.BytesIO(data), limits)


def read_stored_size(ref: ImageRef, limits: DataConfig) -> Size:
    """Reads the size of an image that is stored; as much of it is read as its format needs, mostly the first 4 KiB.

    JPEG, BMP and PPM need what stands before the pixels, TIFF its directories wherever they are, PNG and WebP the first
    bytes of each chunk as well, since the orientation may stand behind the pixels. GIF and AVIF are read whole.

    Raises:
        SampleError: as ``read_bytes`` and ``read_size``.
    """
    with open_range(ref) as file:
        return _header_size(file, limits)


def decode_image(data: bytes, limits: DataConfig) -> NDArray[np.uint8]:
    """Decodes an image to upright RGB; transparency shows white, and 16-bit or float pixels are scaled to 8 bit.

    Args:
        data: the encoded image.
        limits: ``max_image_px`` and ``max_aspect`` are used.

    Returns:
        uint8 [height, width, 3]; the size is the one ``read_size`` gives.

    Raises:
        SampleError: as ``read_size``; image_truncated and image_corrupt also for damage behind the header.
    """
    with _naming_damage(io.BytesIO(data)):
        data = drop_texts(data)
        image = _open(io.BytesIO(data), limits)
        orientation = _orientation(image, b"eXIf" in data)
        image.load()
        rgb = _to_rgb(image)
        if orientation in UPRIGHT:
            rgb = rgb.transpose(UPRIGHT[orientation])
        return np.array(rgb)


def drop_texts(data: bytes) -> bytes:
    """A PNG without its texts and its colour profile; any other bytes as they are.

    Prompts of image generators and XMP take megabytes, which Pillow refuses to unpack, and a bomb claims to take more. The
    pixels depend on none of them, so they are left out as they are, packed.
    """
    if not data.startswith(PNG_SIGNATURE) or not any(kind in data for kind in TEXT_CHUNKS):
        return data
    kept = [PNG_SIGNATURE]
    start = at = len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind and checksum take 12 bytes
        if data[at + 4 : at + 8] in TEXT_CHUNKS and end <= len(data):
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]])


@contextmanager
def _naming_damage(file: BinaryIO) -> Iterator[None]:
    """Turns what Pillow raises on damaged bytes into a SampleError."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", str(error)) from error
    except DAMAGE as error:
        reason = "image_truncated" if _is_cut_short(file) or "truncated" in str(error) else "image_corrupt"
        raise SampleError(reason, f"{type(error).__name__}: {error} ({file.seek(0, io.SEEK_END)} bytes)") from error


def _is_cut_short(file: BinaryIO) -> bool:
    """Whether the end of the file is missing, for formats that mark their end. Asked only after decoding failed."""
    length = file.seek(0, io.SEEK_END)
    file.seek(max(0, length - TAIL_BYTES))
    tail = file.read()
    file.seek(0)
    start = file.read(8)
    if start.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in tail
    if start.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    if start.startswith(b"RIFF"):
        return length < 8 + int.from_bytes(start[4:8], "little")
    if start.startswith(b"GIF8"):
        return b"\x3b" not in tail[-16:]
    return False


def _header_size(file: BinaryIO, limits: DataConfig) -> Size:
    """The upright size of an image; of its bytes only those are read that tell it."""
    with _naming_damage(file):
        start = file.read(16)
        header = jpeg_header(file) if is_jpeg(start) else webp_header(file) if is_webp(start) else None
        if header is not None:
            _judge_size(header.size, limits)
            return _upright_size(header.size, header.orientation())
        if start.startswith(PNG_SIGNATURE):
            file = io.BytesIO(png_header(file))
        image = _open(file, limits)
        return _upright_size(image.size, _orientation(image, has_exif="exif" in image.info))


def _open(file: BinaryIO, limits: DataConfig) -> Image.Image:
    """Identifies the image and judges its header; no pixel is decoded."""
    image = _identify(file)
    _judge_size(image.size, limits)
    # A JPEG from a phone may carry a preview or a second view (MPO): its first image is the photograph.
    if image.format != "MPO" and hasattr(image, "is_animated") and image.is_animated:
        detail = f"{image.format} with several frames, expected one; export the frame that is meant"
        raise SampleError("image_animated", detail)
    return image


def _judge_size(size: tuple[int, int], limits: DataConfig) -> None:
    """Holds an image's (width, height) against the limits."""
    width, height = size
    if width * height > limits.max_image_px:
        detail = f"{width}x{height} px, at most {limits.max_image_px} px in all; shrink it or raise data.max_image_px"
        raise SampleError("image_too_large", detail)
    if max(width, height) > limits.max_aspect * min(width, height):
        detail = f"{width}x{height} px, at most {limits.max_aspect:g}:1; crop it or raise data.max_aspect"
        raise SampleError("image_aspect", detail)


def _identify(file: BinaryIO) -> Image.Image:
    """Opens the image with the plugin that recognises it.

    Not ``Image.open``: it compares the size with a limit global to the process, before ours is asked.
    """
    Image.init()
    file.seek(0)
    start = file.read(16)
    for name in FORMATS:
        plugin, accepts = Image.OPEN[name]
        try:
            if accepts is None or accepts(start) is True:  # a text instead says that this Pillow was built without it
                file.seek(0)
                return plugin(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            if _is_cut_short(file):
                raise
    detail = f"bytes {start!r}... are no {', '.join(FORMATS)}; convert or remove the image"
    raise SampleError("image_unidentified", detail)


def _orientation(image: Image.Image, has_exif: bool) -> int:
    """EXIF orientation that is still to be applied; damaged EXIF counts as none, as in every viewer.

    Args:
        has_exif: of a PNG, whether the bytes at hand have EXIF anywhere.
    """
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF upright itself, in the header already
    if image.format == "PNG" and "exif" not in image.info and not has_exif:
        return 1  # asking Pillow would decode the image, to look for EXIF behind the pixels
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1


def _upright_size(size: tuple[int, int], orientation: int) -> Size:
    width, height = size
    return Size(width, height) if orientation in SWAPS_SIDES else Size(height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any pixel format to RGB: deep pixels scaled to 8 bit, transparency over white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bit(np.asarray(image), image.mode))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _to_8_bit(pixels: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    """Scales by the format's value range, or by the image's own where the format names none or the image exceeds it."""
    values = pixels.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("pixels hold NaN or infinity")
    low, high = 0.0, 1.0 if mode == "F" else 65535.0
    if values.min() < low or values.max() > high:
        low, high = float(values.min()), float(values.max())
    span = high - low or 1.0  # an image of one value is black
    scaled: NDArray[np.uint8] = np.rint((values - low) * (255.0 / span)).astype(np.uint8)
    return scaled
