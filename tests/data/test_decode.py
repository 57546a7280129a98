"""Images are decoded whole and upright, or refused with a reason."""

from __future__ import annotations

import io
import os
import resource
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from sicog_mcore.config import DataConfig
from sicog_mcore.data.decode import decode_image, drop_texts, read_bytes, read_size
from sicog_mcore.data.sample import ImageRef, Size
from sicog_mcore.errors import SampleError

LIMITS = DataConfig()
ORIENTATION = 0x0112
MAX_LOSS = 32  # largest mean difference of pixels through a lossy format


def _photo(height: int = 40, width: int = 64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 4 % 256, y * 6 % 256, (x + y) * 2 % 256], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


def _encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def _png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1 << 20) + b"IDAT"


def _reason(data: bytes, limits: DataConfig = LIMITS) -> str:
    with pytest.raises(SampleError) as raised:
        decode_image(data, limits)
    return raised.value.reason


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "AVIF", "MPO"])
def test_every_format_decodes_to_its_pixels(file_format: str) -> None:
    if file_format == "MPO":  # two views of a phone's camera: the first one counts
        data = _encode(_photo(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 40))])
    else:
        data = _encode(_photo(), file_format)
    pixels = decode_image(data, LIMITS)
    assert pixels.shape == (40, 64, 3) and pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]
    assert read_size(data, LIMITS) == Size(40, 64)
    off = np.abs(pixels.astype(int) - np.asarray(_photo()).astype(int)).mean()
    assert off == 0 if file_format in ("PNG", "BMP", "TIFF", "PPM") else off < MAX_LOSS


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_pixels_and_size(file_format: str, orientation: int) -> None:
    quarters = np.zeros((32, 64, 3), np.uint8)
    quarters[:16, :32], quarters[:16, 32:], quarters[16:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = _encode(Image.fromarray(quarters), file_format, exif=exif)
    # where the stored image's top left, top right and bottom left quarters belong, by the EXIF standard
    upright = {1: "RGB.", 2: "GR.B", 3: ".BGR", 4: "B.RG", 5: "RBG.", 6: "BR.G", 7: ".GBR", 8: "G.RB"}[orientation]
    pixels = decode_image(data, LIMITS)
    height, width = (64, 32) if orientation > 4 else (32, 64)
    assert pixels.shape[:2] == (height, width) == read_size(data, LIMITS)
    centres = pixels[[height // 4, 3 * height // 4]][:, [width // 4, 3 * width // 4]].reshape(4, 3).astype(int)
    assert "".join("RGB"[c.argmax()] if c.max() > 128 else "." for c in centres) == upright


def test_exif_behind_the_pixels_of_a_png_is_found() -> None:
    plain, exif = _encode(_photo(), "PNG"), Image.Exif()
    exif[ORIENTATION] = 6
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = plain[:-12] + chunk + plain[-12:]
    assert read_size(data, LIMITS) == decode_image(data, LIMITS).shape[:2] == (64, 40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_counts_as_none() -> None:
    data = _encode(_photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x01" * 20)
    assert read_size(data, LIMITS) == decode_image(data, LIMITS).shape[:2] == (40, 64)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode: str) -> None:
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 10))
    stored = image.quantize(4) if mode == "P" else image.convert(mode)
    pixels = decode_image(_encode(stored, "PNG"), LIMITS)
    assert (pixels[:, :10] == 255).all() and (pixels[:, 10:] == 0).all()


def test_half_transparent_pixel_is_mixed_with_white() -> None:
    pixels = decode_image(_encode(Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "PNG"), LIMITS)
    assert pixels[0, 0].tolist() == [255, 204, 204]


def test_transparent_colour_of_an_rgb_png_shows_white() -> None:
    pixels = decode_image(_encode(Image.new("RGB", (4, 4), (9, 8, 7)), "PNG", transparency=(9, 8, 7)), LIMITS)
    assert (pixels == 255).all()


def test_cmyk_becomes_rgb() -> None:
    data = _encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red = decode_image(data, LIMITS)[4, 4].astype(int)
    assert red[0] > 245 and red[1] < 12 and red[2] < 12


@pytest.mark.parametrize(
    ("values", "expected", "file_format"),
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255], "PNG"),
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255], "TIFF"),
        (np.array([[0, 257, 32896, 65535]], np.int32), [0, 1, 128, 255], "TIFF"),
        (np.array([[-100, 0, 100_000, 199_900]], np.int32), [0, 0, 128, 255], "TIFF"),
        (np.array([[0.0, 0.2, 0.6, 1.0]], np.float32), [0, 51, 153, 255], "TIFF"),
        (np.array([[-1.0, 0.0, 1.0, 4.0]], np.float32), [0, 51, 102, 255], "TIFF"),
        (np.array([[7.0, 7.0, 7.0, 7.0]], np.float32), [0, 0, 0, 0], "TIFF"),
    ],
)
def test_deep_pixels_are_scaled_by_their_range(values: np.ndarray, expected: list[int], file_format: str) -> None:
    pixels = decode_image(_encode(Image.fromarray(values), file_format), LIMITS)
    assert pixels[0, :, 0].tolist() == expected and (pixels == pixels[:, :, :1]).all()


def test_one_bit_image_is_black_and_white() -> None:
    bits = Image.fromarray(np.array([[True, False, True]]))
    assert decode_image(_encode(bits, "PNG"), LIMITS)[0, :, 1].tolist() == [255, 0, 255]


def test_pixels_that_are_no_numbers_are_refused() -> None:
    data = _encode(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "TIFF")
    assert _reason(data) == "image_corrupt"


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "JPEG", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.97])
def test_cut_off_image_is_never_decoded(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    data = _encode(Image.fromarray(noise), file_format)
    assert _reason(data[: int(len(data) * share)]) == "image_truncated"


def test_size_needs_the_header_only() -> None:
    data = _encode(_photo(), "JPEG")
    assert read_size(data[: len(data) - 100], LIMITS) == Size(40, 64)


@pytest.mark.parametrize("file_format", ["TIFF", "AVIF"])
def test_cut_off_image_without_end_mark_is_refused(file_format: str) -> None:
    data = _encode(_photo(), file_format)
    assert _reason(data[: len(data) // 2]) in ("image_truncated", "image_corrupt", "image_unidentified")


@pytest.mark.parametrize("data", [b"<html>404</html>", b"\0", b"P", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"BM"])
def test_what_is_no_image_is_unidentified(data: bytes) -> None:
    assert _reason(data) == "image_unidentified"


def test_damage_inside_a_whole_file_is_corrupt() -> None:
    data = bytearray(_encode(_photo(), "PNG"))
    data[60] ^= 0xFF
    assert _reason(bytes(data)) == "image_corrupt"


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_image_is_refused(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = _encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert _reason(data) == "image_animated"


@pytest.mark.parametrize("side", [8000, 12_000, 20_000, 2_000_000_000])
def test_decompression_bomb_is_judged_by_its_header_without_a_warning(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for judge in (read_size, decode_image):
            with pytest.raises(SampleError, match=r"px, at most 50000000 px") as raised:
                judge(_png_header(side, side), LIMITS)  # type: ignore[operator]
            assert raised.value.reason == "image_too_large"


def test_own_limit_counts_and_not_the_one_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(_encode(_photo(), "PNG"), LIMITS).shape == (40, 64, 3)
    assert _reason(_encode(_photo(), "PNG"), DataConfig(max_image_px=40 * 64 - 1)) == "image_too_large"


def test_aspect_is_bounded() -> None:
    assert _reason(_encode(Image.new("RGB", (2001, 10)), "PNG")) == "image_aspect"
    assert decode_image(_encode(Image.new("RGB", (10, 2000)), "PNG"), LIMITS).shape == (2000, 10, 3)


def test_global_settings_of_pillow_are_left_alone() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    decode_image(_encode(_photo(), "PNG"), LIMITS)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_bytes_are_read_whole_or_as_a_range(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"0123456789")
    assert read_bytes(ImageRef(str(file))) == b"0123456789"
    assert read_bytes(ImageRef(str(file), 3, 4)) == b"3456"


def test_bytes_that_cannot_be_read_have_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"12")
    os.mkfifo(tmp_path / "fifo")
    expected = {
        ImageRef(str(tmp_path / "none")): "image_missing",
        ImageRef(str(tmp_path / "short" / "none")): "image_missing",
        ImageRef(str(tmp_path)): "image_unreadable",
        ImageRef(str(tmp_path / "fifo")): "image_unreadable",
        ImageRef(str(tmp_path / "short"), 1, 5): "image_unreadable",
        ImageRef(str(tmp_path / ("x" * 300))): "image_unreadable",
        ImageRef(str(tmp_path / "empty")): "image_empty",
        ImageRef(str(tmp_path / "short"), 0, 0): "image_empty",
    }
    for ref, reason in expected.items():
        with pytest.raises(SampleError) as raised:
            read_bytes(ref)
        assert raised.value.reason == reason


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _with_chunks(*chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with further chunks behind its header, or behind its pixels."""
    data = _encode(_photo(), "PNG")
    at = len(data) - 12 if behind else 33
    return data[:at] + b"".join(chunks) + data[at:]


def _packed(size: int) -> bytes:
    packer = zlib.compressobj(9)
    blocks = [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*blocks, packer.flush()])


LARGE, BOMB = 3 << 20, 300 << 20


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "chunk",
    [
        _chunk(b"zTXt", b"prompt\0\0" + _packed(LARGE)),
        _chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + _packed(LARGE)),
        _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * LARGE),
        _chunk(b"tEXt", b"prompt\0" + b"x" * LARGE),
        _chunk(b"zTXt", b"bomb\0\0" + _packed(BOMB)),
        _chunk(b"iCCP", b"bomb\0\0" + _packed(BOMB)),
    ],
)
def test_large_text_in_a_png_is_left_aside_without_unpacking_it(chunk: bytes, behind: bool) -> None:
    data = _with_chunks(chunk, behind=behind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_size(data, LIMITS) == Size(40, 64)
    assert np.array_equal(decode_image(data, LIMITS), np.asarray(_photo()))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_many_texts_in_a_png_are_bounded_together() -> None:
    full = zlib.compress(bytes(1_000_000), 9)
    data = _with_chunks(*[_chunk(b"zTXt", b"k%d\0\0" % number + full) for number in range(5000)])
    started = time.process_time()
    assert np.array_equal(decode_image(data, LIMITS), np.asarray(_photo()))
    assert time.process_time() - started < 5  # all of them take several seconds and 5 GB


def test_only_texts_of_a_png_are_left_aside() -> None:
    texts = [_chunk(b"tEXt", b"Title\0x"), _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x")), _chunk(b"iCCP", b"x")]
    gamma = _chunk(b"gAMA", struct.pack(">I", 45455))
    assert drop_texts(_with_chunks(texts[0], gamma, *texts[1:])) == _with_chunks(gamma)
    assert drop_texts(_with_chunks(gamma)) == _with_chunks(gamma)
    jpeg = _encode(_photo(), "JPEG", comment=b"tEXt")
    assert drop_texts(jpeg) == jpeg
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    data = _encode(_photo(), "PNG", exif=turned)
    assert read_size(data[:33] + texts[0] + data[33:], LIMITS) == Size(64, 40)


@pytest.mark.parametrize("cut", [40, 60, 3000, -200])
def test_png_that_is_cut_within_or_behind_its_text_is_refused(cut: int) -> None:
    data = _with_chunks(_chunk(b"tEXt", b"p\0" + b"x" * LARGE))[:cut]
    assert _reason(data) == "image_truncated"
