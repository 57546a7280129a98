"""Shards are read in place, sample by sample; what is unsafe or damaged becomes a row with a reason."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.decode import decode_image, read_bytes
from sicog_mcore.data.sample import Sample, Turn
from sicog_mcore.data.shards import quick_check
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.errors import ConfigError, SampleError

DATA = DataConfig()
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]


def _png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(stream, "PNG")
    return stream.getvalue()


def _open(path: Path) -> SampleIndex:
    return open_sources([SourceConfig(path=str(path))], DATA)


def _tar(path: Path, members: Mapping[str, bytes]) -> Path:
    return _tar_list(path, list(members.items()))


def _tar_list(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
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


def _damage(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        _open(path)
    [problem] = raised.value.problems
    assert problem.path == "data.sources[0].path" and problem.value == str(path)
    assert problem.fix.startswith("write the shard again")
    return problem.problem


def test_shard_that_is_cut_off_anywhere_stops_the_start_with_its_place(tmp_path: Path) -> None:
    members = {name: data for key in "abcd" for name, data in _sample(key).items()}
    whole = _tar(tmp_path / "s.tar", members).read_bytes()
    blocks = len(members) * 2 * 512
    for size in range(256, blocks + 512, 256):  # a sample takes 2048 bytes
        (tmp_path / "s.tar").write_bytes(whole[:size])
        found = _damage(tmp_path / "s.tar")
        if size > 512:
            place = re.match(
                r"is cut off or damaged behind byte ([\d,]+) of ([\d,]+) \(.*; samples up to there: (\d)", found
            )
            assert place, found
            offset, total, samples = (int(number.replace(",", "")) for number in place.groups())
            assert total == size and size - 2048 <= offset <= size and size // 2048 <= samples <= size // 2048 + 1


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, b"\x1f\x8b" + b"x" * 2000])
def test_file_that_is_no_tar_stops_the_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    assert _damage(tmp_path / "s.tar").startswith(f"is no tar archive ({len(content):,} bytes: ")


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_shard_is_called_so(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    file = _tar(tmp_path / "s.tar", _sample("a"))
    file.write_bytes(pack(file.read_bytes()))
    assert _damage(file) == f"is compressed ({name}), samples are read in place from a plain tar: unpack it"
    assert quick_check(file) == _damage(file)


def test_damaged_header_in_the_middle_of_a_shard_stops_the_start(tmp_path: Path) -> None:
    file = _tar(tmp_path / "s.tar", {name: data for key in "abc" for name, data in _sample(key).items()})
    data = bytearray(file.read_bytes())
    data[2048:2560] = b"\x55" * 512
    file.write_bytes(data)
    assert re.match(r"is cut off or damaged behind byte 1,\d+ of 10,240", _damage(file))


def test_member_with_a_size_beyond_all_bounds_is_damage(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.png")
    member.size = 1 << 70
    (tmp_path / "s.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert "'a.png' is cut off" in _damage(tmp_path / "s.tar")


def test_archives_joined_with_cat_lose_nothing_silently(tmp_path: Path) -> None:
    first, second = (_tar(tmp_path / f"{key}.tar", _sample(key)).read_bytes() for key in "ab")
    (tmp_path / "s.tar").write_bytes(first + second)
    assert "more data behind the end mark at byte 2048" in _damage(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes(first + bytes(3 << 20))
    assert len(_open(tmp_path / "s.tar")) == 1


def test_a_glance_sees_what_the_ends_of_a_shard_tell(tmp_path: Path) -> None:
    file = _tar(tmp_path / "s.tar", _sample("a"))
    whole = file.read_bytes()
    assert quick_check(file) == ""
    for content in (b"", whole[:1500], whole[: len(whole) // 2 + 1] + b"x", b"<html>"):
        file.write_bytes(content)
        assert quick_check(file).startswith(f"is cut off or no tar: its {len(content):,} bytes")


@pytest.mark.parametrize(
    "debris",
    ["._a.png", "x/._a.json", "__MACOSX/._a.png", "__MACOSX/a.json", ".DS_Store", "x/.DS_Store", "PaxHeader/a.png"]
    + ["x/PaxHeaders.12/a.json", "Thumbs.db", "desktop.ini"],
)
def test_what_archivers_add_is_skipped_and_counted(tmp_path: Path, debris: str) -> None:
    good = _sample("a")
    members = {"a.png": good["a.png"], debris: b"Mac OS X", "a.json": good["a.json"]}
    index = _open(_tar(tmp_path / "s.tar", members))
    assert [index.read(row).id for row in range(len(index))] == ["id-a"]
    assert index.notes == (
        f"skipped: members that an archiver or file manager added: 1 member, first at {tmp_path}/s.tar:{debris}",
    )


def _colours(sample: Sample) -> list[list[int]]:
    return [decode_image(read_bytes(image), DATA)[0, 0].tolist() for image in sample.images]


def _fields(count: int, **fields: object) -> bytes:
    turns = [{"from": "human", "value": "<image>" * count}, TURNS[1]]
    return json.dumps({"conversations": turns, **fields}).encode()


RED, BLUE = [255, 0, 0], [0, 0, 255]


@pytest.mark.parametrize(
    ("members", "listed", "colours"),
    [
        (("a.10.png", "a.9.png"), None, [BLUE, RED]),
        (("a.image10.png", "a.image9.png"), None, [BLUE, RED]),
        (("a.img_02.jpg", "a.jpg"), None, [BLUE, RED]),
        (("a.0.png", "a.1.png"), ["a.1.png", "a.0.png"], [BLUE, RED]),
        (("x/a.0.png", "x/a.1.png"), ["x/a.1.png", "x/a.0.png"], [BLUE, RED]),
        (("a.0.png", "a.1.png"), ["1.png", "0.png"], [BLUE, RED]),
        (("a.left.png", "a.right.png"), ["a.right.png", "a.left.png"], [BLUE, RED]),
        (("a.png", "a.jpg"), ["a.jpg", "a.png"], [BLUE, RED]),
        (("a.png", "a.mask.png"), None, [RED]),
        (("a.png", "a.depth.jpg"), "a.png", [RED]),
        (("a.png",), "coco/train/000001.jpg", [RED]),
        (("a.bmp",), None, [RED]),
        (("a.image.tiff",), None, [RED]),
    ],
)
def test_images_come_in_the_order_of_the_list_or_of_their_numbers(
    tmp_path: Path, members: tuple[str, ...], listed: object, colours: list[list[int]]
) -> None:
    pictures = dict(zip(members, (_png("red"), _png("blue")), strict=False))
    fields = {} if listed is None else {"image": listed}
    key = members[0].partition(".")[0]
    file = _tar(tmp_path / "s.tar", {**pictures, f"{key}.json": _fields(len(colours), **fields)})
    assert _colours(_open(file).read(0)) == colours


@pytest.mark.parametrize(
    ("members", "fields", "reason"),
    [
        (("a.left.png", "a.right.png"), {}, "image_order"),
        (("a.png", "a.jpg"), {}, "image_order"),
        (("a.mask.png",), {}, "image_order"),
        (("a.0.png", "a.1.png"), {"image": ["a.0.png"]}, "image_order"),
        (("a.0.png", "a.1.png"), {"image": ["a.0.png", "b.7.png"]}, "image_count_mismatch"),
        (("a.0.png", "a.1.png"), {"images": ["a.1.png", "a.0.png"]}, "key_unsupported"),
        (("a.png", "a.mp4"), {}, "member_unsupported"),
        (("a.png", "a.WAV"), {}, "member_unsupported"),
        (("a.png", "a.0.heic"), {}, "member_unsupported"),
        (("a.npy",), {}, "member_unsupported"),
        (("a.png", "a.JSON"), {}, "member_repeated"),
        (("a.png", "a.png"), {}, "member_repeated"),
    ],
)
def test_sample_whose_pictures_are_not_clear_is_refused(
    tmp_path: Path, members: tuple[str, ...], fields: dict[str, object], reason: str
) -> None:
    index = _open(
        _tar_list(tmp_path / "s.tar", [*((name, _png()) for name in members), ("a.json", _fields(1, **fields))])
    )
    assert len(index) == 1 and _reason(index, 0) == reason


def test_members_of_a_sample_stand_side_by_side(tmp_path: Path) -> None:
    texts = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, TURNS[1]]}).encode()
    members = [("a.png", _png()), ("b.png", _png()), ("a.json", texts), ("b.json", texts), ("c.json", texts)]
    index = _open(_tar_list(tmp_path / "s.tar", members))
    assert [_reason(index, row) for row in range(4)] == ["member_repeated"] * 4
    assert index.read(4).turns[0].text == "Hi"


def test_equal_names_in_several_folders_are_several_samples(tmp_path: Path) -> None:
    index = _open(_tar(tmp_path / "s.tar", {**_sample("x/1"), **_sample("y/1"), **_sample("y/z/1")}))
    assert [index.read(row).id for row in range(len(index))] == ["id-x/1", "id-y/1", "id-y/z/1"]


def _metadata(**fields: object) -> bytes:
    return json.dumps({"url": "http://h/1.jpg", "status": "success", "key": "1", "caption": "x", **fields}).encode()


def test_metadata_beside_a_caption_is_said_and_not_read(tmp_path: Path) -> None:
    members = {"1.png": _png(), "1.txt": b"A square.", "1.json": _metadata(), "2.png": _png(), "2.json": _metadata()}
    members |= {"3.png": _png(), "3.txt": b"x", "3.json": _metadata(status="failed_to_download")}
    members |= {"4.png": _png(), "4.txt": b"x", "4.json": _fields(1), "5.txt": b"x"}
    members |= {
        "6.png": _png(),
        "6.txt": b"x",
        "6.json": _metadata(messages=[]),
        "7.png": _png(),
        "7.txt": b"x",
        "7.json": b"{",
    }
    index = _open(_tar(tmp_path / "s.tar", members))
    assert index.read(0).turns == (Turn("user", "<image>"), Turn("assistant", "A square."))
    assert index.read(3).turns[-1].text == "A square."  # of the conversation
    reasons = ["field_missing", "download_failed", "image_missing", "field_missing", "json_invalid"]
    assert [_reason(index, row) for row in (1, 2, 4, 5, 6)] == reasons
    file = f"{tmp_path}/s.tar"
    assert [note for note in index.notes if note.startswith("the ")] == [
        f"the .txt is the answer, the .json beside it describes the picture and is not used: 2 samples, first at {file}:1",
        f"the .json holds the conversation, the .txt beside it is not used: 2 samples, first at {file}:4",
    ]
    assert "refused: no key 'conversations'; rename 'messages' to 'conversations': 1 row" in "".join(index.notes)


def test_members_that_are_not_used_are_counted_by_their_type(tmp_path: Path) -> None:
    members = {f"{key}.{kind}": _png() for key in "abc" for kind in ("png", "mask.png", "npy", "\x1b[2J.cls")}
    members = {
        name: data for key in "abc" for name, data in [*members.items(), (f"{key}.json", _fields(1))] if name[0] == key
    }
    index = _open(_tar(tmp_path / "s.tar", members))
    assert len(index.read(0).images) == 1
    assert [note.split(" are not used: ")[0] for note in index.notes] == [
        "members '.mask.png'",
        "members '.npy'",
        "members '.\\x1b[2J.cls'",
    ]
    assert all(note.endswith(f"3 samples, first at {tmp_path}/s.tar:a") for note in index.notes)


def test_what_stands_beside_the_shards_of_a_folder_is_said(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", _sample("a"))
    for name in ("b.tar.gz", "c.tar.gz", "a_stats.json", ".hidden", "part0"):
        (tmp_path / name).mkdir() if name == "part0" else (tmp_path / name).touch()
    index = _open(tmp_path)
    assert len(index) == 1 and set(index.notes) == {
        f"files '.tar.gz' beside the shards are not read: 2 entries, first at {tmp_path}:b.tar.gz",
        f"files '.json' beside the shards are not read: 1 entry, first at {tmp_path}:a_stats.json",
        f"folders beside the shards are not read: 1 entry, first at {tmp_path}:part0",
    }
