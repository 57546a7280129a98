"""Shards are read in place, sample by sample; what is unsafe or damaged becomes a row with a reason."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.decode import decode_image, read_bytes
from sicog_mcore.data.sample import Turn
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.errors import SampleError

DATA = DataConfig()
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]


def _png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(stream, "PNG")
    return stream.getvalue()


def _open(path: Path) -> SampleIndex:
    return open_sources([SourceConfig(path=str(path))], DATA)


def _tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def _sample(name: str, text: str = "json") -> dict[str, bytes]:
    fields = json.dumps({"id": f"id-{name}", "conversations": TURNS}).encode()
    return {f"{name}.png": _png(), f"{name}.{text}": fields if text == "json" else b"A square.\n"}


def _reason(index: SampleIndex, row: int) -> str:
    with pytest.raises(SampleError) as raised:
        index.read(row)
    return raised.value.reason


def test_shard_samples_are_read_in_place(tmp_path: Path) -> None:
    members = {**_sample("x/0001"), **_sample("x/0002", "txt"), "x/0002.meta.json": b"{}"}
    index = _open(_tar(tmp_path / "s-0.tar", members))
    first, second = index.read(0), index.read(1)
    assert (first.id, second.id) == ("id-x/0001", "s-0-1")
    assert first.origin == f"{tmp_path}/s-0.tar:x/0001"
    assert second.turns == (Turn("user", "<image>"), Turn("assistant", "A square."))
    for sample in (first, second):
        assert decode_image(read_bytes(sample.images[0]), DATA)[0, 0].tolist() == [255, 0, 0]


def test_folder_of_shards_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        _tar(tmp_path / f"{name}.tar", _sample(name))
    index = _open(tmp_path)
    assert [index.read(row).id for row in range(2)] == ["id-a", "id-b"]


def test_numbered_images_of_a_sample_keep_their_order(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image> <image>"}, TURNS[1]]
    members = {"a.0.PNG": _png("red"), "a.1.png": _png("blue"), "a.json": json.dumps({"conversations": turns}).encode()}
    sample = _open(_tar(tmp_path / "s.tar", members)).read(0)
    colours = [decode_image(read_bytes(image), DATA)[0, 0].tolist() for image in sample.images]
    assert colours == [[255, 0, 0], [0, 0, 255]]


def test_links_devices_and_climbing_names_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name in ("../up.json", "/etc/root.json"):
            member = tarfile.TarInfo(name)
            member.size = 2
            archive.addfile(member, io.BytesIO(b"{}"))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    index = _open(tmp_path / "s.tar")
    assert [_reason(index, row) for row in range(len(index))] == ["member_unsafe"] * 5


def test_incomplete_samples_have_a_reason(tmp_path: Path) -> None:
    members = {
        "a.png": _png(),
        "b.json": json.dumps({"image": "b.png", "conversations": TURNS}).encode(),
        "c.png": _png(),
        "c.txt": b"\xff",
        "d.png": _png(),
        "d.json": b"{",
        "e.png": b"",
        "e.txt": b" ",
    }
    index = _open(_tar(tmp_path / "s.tar", members))
    reasons = ["field_missing", "image_count_mismatch", "not_utf8", "json_invalid", "answer_empty"]
    assert [_reason(index, row) for row in range(len(index))] == reasons


def test_truncated_shard_keeps_what_can_be_read_and_says_so_once(tmp_path: Path) -> None:
    members = {name: data for key in "abcd" for name, data in _sample(key).items()}
    whole = _tar(tmp_path / "s.tar", members).read_bytes()
    blocks = len(members) * 2 * 512
    for size in range(0, blocks + 512, 256):  # a sample takes 2048 bytes
        (tmp_path / "s.tar").write_bytes(whole[:size])
        index = _open(tmp_path / "s.tar")
        *good, last = range(len(index))
        assert [index.read(row).id for row in good] == [f"id-{key}" for key in "abcd"[: len(good)]]
        assert len(good) >= size // 2048 and _reason(index, last) == "shard_damaged"


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, b"\x1f\x8b" + b"x" * 2000])
def test_shard_that_is_no_tar_is_one_bad_row(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    index = _open(tmp_path / "s.tar")
    assert len(index) == 1 and _reason(index, 0) == "shard_damaged"


def test_damaged_header_in_the_middle_of_a_shard_is_not_silent(tmp_path: Path) -> None:
    file = _tar(tmp_path / "s.tar", {name: data for key in "abc" for name, data in _sample(key).items()})
    data = bytearray(file.read_bytes())
    data[2048:2560] = b"\x55" * 512
    file.write_bytes(data)
    index = _open(file)
    assert index.read(0).id == "id-a" and [_reason(index, row) for row in range(1, len(index))] == ["shard_damaged"]


def test_member_with_a_size_beyond_all_bounds_is_damage(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.png")
    member.size = 1 << 70
    (tmp_path / "s.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    index = _open(tmp_path / "s.tar")
    assert [_reason(index, row) for row in range(len(index))] == ["shard_damaged"]
