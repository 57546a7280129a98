"""A zoo of bad and of tricky inputs, each with its expected outcome: images, rows and lines of one JSONL data set."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROWS_FILE = "zoo.jsonl"
IMAGES_FOLDER = "images"
OK = "ok"
ORIENTATION = 0x0112
OVERSIZE = 16 * 2**20 + 1


@dataclass(frozen=True)
class ZooCase:
    """One input.

    Attributes:
        name: what is special; good and tricky rows carry it as their id.
        row: number of the row in the data set.
        expected: reason code, or "ok".
    """

    name: str
    row: int
    expected: str


class _Line(NamedTuple):
    name: str
    raw: bytes
    expected: str


def build_zoo(folder: Path) -> list[ZooCase]:
    """Writes ``zoo.jsonl`` and the folder ``images`` into ``folder``; returns the cases in the order of the rows."""
    images = folder / IMAGES_FOLDER
    images.mkdir(parents=True)
    (folder / "secret.png").write_bytes(_encode(_photo(), "PNG"))
    lines = [*_image_lines(images), *_path_lines(images), *_row_lines(), *_raw_lines()]
    # Blank lines are no rows; the mark at the start is what editors on Windows write.
    (folder / ROWS_FILE).write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(line.raw for line in lines) + b"\n\n")
    return [ZooCase(line.name, row, line.expected) for row, line in enumerate(lines)]


def _row(name: str, expected: str, **changes: object) -> _Line:
    """A good row that shows one image, with some of its fields changed; None removes a field."""
    turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A gradient."}]
    fields: dict[str, object] = {"id": name, "image": "good.png", "conversations": turns, **changes}
    return _Line(name, json.dumps({k: v for k, v in fields.items() if v is not None}).encode(), expected)


def _chat(*turns: tuple[object, object]) -> list[dict[str, object]]:
    return [_turn(role, text) for role, text in turns]


def _turn(role: object, text: object) -> dict[str, object]:
    return {"from": role, "value": text}


def _photo(height: int = 48, width: int = 64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 3 % 256, y * 5 % 256, (x + y) % 256], axis=-1).astype(np.uint8))


def _encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def _png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\1\0IDAT"
    )


def _image_lines(images: Path) -> Iterator[_Line]:
    """One good row for every image file; what differs is the file."""
    for name, (data, expected) in {**_tricky_images(), **_bad_images()}.items():
        (images / name).write_bytes(data)
        yield _row(name, expected, image=name)


def _tricky_images() -> dict[str, tuple[bytes, str]]:
    """Images that decode, if one knows how."""
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    half_clear = Image.new("RGBA", (64, 48), (255, 0, 0, 255))
    half_clear.paste((0, 0, 255, 0), (0, 0, 32, 48))
    deep = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
    files = {
        "good.png": _encode(_photo(), "PNG"),
        "large.jpg": _encode(_photo(480, 640), "JPEG"),
        "exif_rotated.jpg": _encode(_photo(), "JPEG", exif=turned),
        "exif_rotated.png": _encode(_photo(), "PNG", exif=turned),
        "cmyk.jpg": _encode(Image.new("CMYK", (64, 48), (0, 255, 255, 0)), "JPEG", quality=95),
        "grey_16_bit.png": _encode(Image.fromarray(np.rint(deep).astype(np.uint16)), "PNG"),
        "grey_32_bit.tif": _encode(Image.fromarray(np.rint(deep).astype(np.int32)), "TIFF"),
        "grey_float.tif": _encode(Image.fromarray((deep / 65535).astype(np.float32)), "TIFF"),
        "one_bit.png": _encode(_photo().convert("1"), "PNG"),
        "alpha.png": _encode(half_clear, "PNG"),
        "grey_alpha.png": _encode(half_clear.convert("LA"), "PNG"),
        "palette.gif": _encode(_photo(), "GIF"),
        "palette_alpha.png": _encode(half_clear.quantize(4), "PNG"),
        "webp_named.jpg": _encode(_photo(), "WEBP"),
        "one_pixel.png": _encode(_photo(1, 1), "PNG"),
        "narrow.png": _encode(_photo(3, 600), "PNG"),
        "übung 図.png": _encode(_photo(), "PNG"),
    }
    return {name: (data, OK) for name, data in files.items()}


def _bad_images() -> dict[str, tuple[bytes, str]]:
    """Files that must not become pixels."""
    photo, jpeg = _photo(), _encode(_photo(480, 640), "JPEG")
    png, webp = _encode(photo, "PNG"), _encode(photo, "WEBP")
    frames = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]}
    return {
        "empty.jpg": (b"", "image_empty"),
        "html.jpg": (b"<html><body>404 Not Found</body></html>", "image_unidentified"),
        "vector.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_unidentified"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_unidentified"),
        "truncated.jpg": (jpeg[: len(jpeg) * 3 // 5], "image_truncated"),
        "truncated_header.jpg": (jpeg[:30], "image_truncated"),
        "truncated.png": (png[: len(png) // 2], "image_truncated"),
        "truncated.webp": (webp[: len(webp) // 2], "image_truncated"),
        "corrupt.png": (png[:60] + bytes([png[60] ^ 0xFF]) + png[61:], "image_corrupt"),
        "bomb.png": (_png_header(20_000, 20_000), "image_too_large"),
        "bomb_under_the_limit_of_pillow.png": (_png_header(8_000, 8_000), "image_too_large"),
        "thread.png": (_encode(_photo(1, 10_000), "PNG"), "image_aspect"),
        "animated.gif": (_encode(photo, "GIF", **frames), "image_animated"),
        "animated.webp": (_encode(photo, "WEBP", **frames), "image_animated"),
        "animated.png": (_encode(photo, "PNG", **frames), "image_animated"),
        "pages.tif": (_encode(photo, "TIFF", **frames), "image_animated"),
    }


def _path_lines(images: Path) -> Iterator[_Line]:
    """Image paths that lead nowhere, to what is no file, or out of the image folder."""
    os.symlink(images.parent / "secret.png", images / "link_out.png")
    os.symlink("good.png", images / "link_inside.png")
    os.symlink("loop.png", images / "loop.png")
    (images / "folder.png").mkdir()
    os.mkfifo(images / "pipe.png")
    yield _row("link_inside", OK, image="link_inside.png")
    yield _row("missing_file", "image_missing", image="nowhere.png")
    yield _row("path_is_a_folder", "image_unreadable", image="folder.png")
    yield _row("path_is_a_pipe", "image_unreadable", image="pipe.png")
    yield _row("path_is_a_loop", "image_unreadable", image="loop.png")
    unsafe = {
        "path_climbs": "../secret.png",
        "path_climbs_inside": "a/../../secret.png",
        "path_climbs_as_on_windows": "..\\secret.png",
        "path_is_absolute": str(images / "good.png"),
        "path_has_a_drive": "C:\\secret.png",
        "path_is_a_link_out": "link_out.png",
        "path_holds_nul": "good.png\0.jpg",
        "path_is_a_file_url": "file:///etc/passwd",
        "path_is_a_web_url": "http://169.254.169.254/latest",
    }
    for name, path in unsafe.items():
        yield _row(name, "image_path_unsafe", image=path)


def _row_lines() -> Iterator[_Line]:
    """Rows that are JSON but not what they should be, and two that are fine."""
    question, answer = ("human", "<image>\nWhat?"), ("gpt", "That.")
    yield _row("text_only", OK, image=None, conversations=_chat(("human", "Hello"), answer))
    roles = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>"}]
    yield _row("role_and_content", OK, conversations=[*roles, {"role": "assistant", "content": "A gradient."}])
    yield _row(
        "two_images", OK, image=["good.png"] * 2, conversations=_chat(("human", "<image> <image>\nSame?"), answer)
    )
    yield _row("no_conversations", "field_missing", conversations=None)
    yield _row("turn_without_text", "field_missing", conversations=[{"from": "human"}])
    yield _row("image_is_a_number", "field_type", image=7)
    yield _row("text_is_a_list", "field_type", conversations=_chat(("human", ["<image>"]), answer))
    yield _row("id_is_an_object", "field_type", id={"a": 1})
    yield _row("unknown_role", "role_unknown", conversations=_chat(("robot", "<image>"), answer))
    yield _row("no_turns", "turns_order", conversations=[])
    yield _row("answer_first", "turns_order", conversations=_chat(answer, question))
    yield _row("no_answer", "turns_order", conversations=_chat(question))
    yield _row("late_system_turn", "turns_order", conversations=_chat(question, answer, ("system", "Be brief.")))
    yield _row("empty_answer", "answer_empty", conversations=_chat(question, ("gpt", " \n")))
    yield _row("image_in_answer", "image_token_in_answer", conversations=_chat(question, ("gpt", "An <image>.")))
    yield _row("no_placeholder", "image_count_mismatch", conversations=_chat(("human", "What?"), answer))
    yield _row("two_placeholders", "image_count_mismatch", conversations=_chat(("human", "<image> <image>"), answer))
    yield _row("placeholder_without_image", "image_count_mismatch", image=None)
    yield _row("half_a_surrogate_pair", "not_utf8", conversations=_chat(question, ("gpt", "\ud800")))
    yield _row("system_field", OK, system="Be brief.")
    yield _row("blank_image_path", OK, image="", conversations=_chat(("human", "Hello"), answer))
    yield _row("talk_of_a_tag", OK, image=None, conversations=_chat(("human", "What is the <video> tag?"), answer))
    yield _row("harmless_and_unknown_keys", OK, source="web", width=64, mood="good")
    yield _row("answer_of_no_width", "answer_empty", conversations=_chat(question, ("gpt", "\u200b\ufeff")))
    yield _row("images_under_another_key", "key_unsupported", image=None, images=["good.png"])
    yield _row("a_film", "key_unsupported", video="a.mp4")
    yield _row(
        "loss_switched_off", "key_unsupported", conversations=[_turn(*question), {**_turn(*answer), "loss": False}]
    )
    yield _row("key_in_capitals", "key_unsupported", Image="other.png")
    yield _row("tag_of_a_film", "media_missing", image=None, conversations=_chat(("human", "<video>\nWhat?"), answer))
    yield _row("token_of_a_model", "media_missing", conversations=_chat(question, ("gpt", "<|image_pad|>")))
    yield _row(
        "two_system_turns", "system_ambiguous", system="a", conversations=_chat(("system", "b"), question, answer)
    )
    yield _row("id_repeated", "duplicate_id", id="good.png")


def _raw_lines() -> Iterator[_Line]:
    """Lines that are no row at all."""
    yield _Line("not_json", b'{"id": "x", ', "json_invalid")
    yield _Line("single_quotes", b"{'id': 'x'}", "json_invalid")
    yield _Line("nul_bytes", b"\0" * 64, "json_invalid")
    yield _Line("nested_too_deep", b"[" * 200_000, "json_invalid")
    yield _Line("huge_number", b'{"id": ' + b"9" * 5000 + b"}", "json_invalid")
    yield _Line("key_twice", b'{"id": "x", "image": "a.png", "image": "b.png"}', "key_repeated")
    yield _Line("not_a_number", b'{"id": "y", "score": NaN}', "json_invalid")
    yield _Line("a_list", b"[1, 2]", "field_type")
    yield _Line("latin_1", '{"id": "Übung"}'.encode("latin-1"), "not_utf8")
    yield _Line("giant_line", b'{"id": "' + b"x" * OVERSIZE + b'"}', "line_too_long")
    yield _row("good_after_all_that", OK, id=None)
