"""Image headers tell size and orientation without the pixels, in the three formats that most images have.

In: an image file   Out: a PNG without pixels; StillHeader of a JPEG or WebP   Next: decode.py
All three are rows of chunks that begin with their length, so what is not needed is stepped over, not read. Pillow opens PNG
and WebP only as a whole, and it unpacks of a JPEG what takes longer than all the rest. Whatever is not as it mostly is, is
left to Pillow.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, NamedTuple

from PIL import ExifTags, Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
PIXELS, EXIF, END = b"IDAT", b"eXIf", b"IEND"
PNG_FRAME = 12  # length, kind and checksum of a chunk (bytes)
MAX_BROKEN_BYTES = 1 << 16  # kept of a chunk that does not end inside the file
WEBP_ANIMATION, WEBP_XMP, WEBP_EXIF = 0x02, 0x04, 0x08
EXIF_START, XMP_START = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # of an APP1 segment
APP1, SCAN = 0xE1, 0xDA
FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
# Huffman and quantisation tables, arithmetic coding, restart interval, the start of the scan, application data, comments
SEGMENTS = frozenset((0xC4, 0xDB, 0xCC, 0xDD, SCAN, *range(0xE0, 0xF0), 0xFE))
LOSSY_START, LOSSLESS_START = b"\x9d\x01\x2a", 0x2F


def png_header(file: BinaryIO) -> bytes:
    """The chunks of a PNG in front of its pixels, without texts and colour profile, and its EXIF wherever that stands.

    Pillow reads of these bytes what it reads of the file, but for the pixels; the reasons for leaving texts out are those
    of ``decode.drop_texts``.
    """
    length = file.seek(0, io.SEEK_END)
    at = len(PNG_SIGNATURE)
    before, exif, pixels = [PNG_SIGNATURE], b"", b""
    while at + 8 <= length:
        file.seek(at)
        head = file.read(8)
        size, kind = struct.unpack(">I4s", head)
        end = at + PNG_FRAME + size
        if end > length and not pixels and kind != PIXELS:
            before.append(head + file.read(MAX_BROKEN_BYTES))
            break
        if kind == PIXELS:
            pixels = head
        elif kind == EXIF and pixels and end <= length:
            exif = exif or head + file.read(end - at - 8)
        elif not pixels and kind not in TEXT_CHUNKS:
            before.append(head + file.read(end - at - 8))
        if kind == END:
            break
        at = end
    return b"".join([*before, exif, pixels])


class StillHeader(NamedTuple):
    """The header that an image of one frame has.

    Attributes:
        size: (width, height) as stored (px).
        exif: its EXIF block; empty if it has none.
        xmp: its XMP block; empty if it has none.
    """

    size: tuple[int, int]
    exif: bytes
    xmp: bytes

    def orientation(self) -> int:
        """The EXIF orientation; 1, upright, where nothing or nothing readable says otherwise."""
        if not self.exif and not self.xmp:
            return 1
        image = Image.new("L", (1, 1))
        image.info = {name: block for name, block in (("exif", self.exif), ("xmp", self.xmp)) if block}
        try:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
        except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
            return 1


def is_jpeg(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a JPEG."""
    return start[:3] == b"\xff\xd8\xff"


def jpeg_header(file: BinaryIO) -> StillHeader | None:
    """Size, EXIF and XMP of a JPEG; None where only Pillow can tell: damaged or unusual headers."""
    file.seek(2)
    size, blocks = (0, 0), {EXIF_START: b"", XMP_START: b""}
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        marker, length = head[1], int.from_bytes(head[2:], "big") - 2
        if marker not in FRAMES and marker not in SEGMENTS:
            return None
        if marker == APP1 or marker in FRAMES:
            body = file.read(length)
            if marker in FRAMES:
                is_usual = (
                    len(body) == length >= 9 and body[0] == 8 and length == 6 + 3 * body[5] and body[5] in (1, 3, 4)
                )
                if not is_usual or any(size):
                    return None
                size = (int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big"))
            for start in blocks:
                if marker == APP1 and body.startswith(start):
                    if blocks[start] or len(body) < length:
                        return None
                    blocks[start] = body
        elif length < 0 or (length and len(file.read(1)) < 1):
            return None
        else:
            file.seek(length - 1 if length else 0, io.SEEK_CUR)
        if marker == SCAN:
            xmp = blocks[XMP_START].partition(b"\0")[2]
            return StillHeader(size, blocks[EXIF_START], xmp) if all(size) else None
    return None


def is_webp(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a WebP."""
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def webp_header(file: BinaryIO) -> StillHeader | None:
    """Size, EXIF and XMP of a still WebP; None where only the decoder can tell: animations, unknown or damaged headers."""
    header = _read_webp(file)
    return header if header is not None and all(header.size) else None


def _read_webp(file: BinaryIO) -> StillHeader | None:
    length = file.seek(0, io.SEEK_END)
    file.seek(12)
    head = file.read(18)
    if len(head) < 18:
        return None
    kind, body = head[:4], head[8:]
    if kind == b"VP8 " and body[3:6] == LOSSY_START and not body[0] & 1:  # bit 0: no key frame
        width, height = struct.unpack("<HH", body[6:10])
        return StillHeader((width & 0x3FFF, height & 0x3FFF), b"", b"")
    if kind == b"VP8L" and body[0] == LOSSLESS_START:
        bits = int.from_bytes(body[1:5], "little")
        return StillHeader(((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), b"", b"")
    if kind != b"VP8X" or body[0] & WEBP_ANIMATION:
        return None
    size = (int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1)
    wanted = {name: b"" for name, flag in ((b"EXIF", WEBP_EXIF), (b"XMP ", WEBP_XMP)) if body[0] & flag}
    at = 12
    while not all(wanted.values()) and at + 8 <= length:
        file.seek(at)
        name, chunk_bytes = struct.unpack("<4sI", file.read(8))
        if name in wanted and not wanted[name]:
            wanted[name] = file.read(chunk_bytes)
        at += 8 + chunk_bytes + chunk_bytes % 2  # chunks start at even positions
    return StillHeader(size, wanted.get(b"EXIF", b""), wanted.get(b"XMP ", b""))
