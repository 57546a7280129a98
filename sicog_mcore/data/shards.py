"""WebDataset tar shards: one sample per group of members, read in place.

In: a .tar file   Out: ShardFile (a Source)   Next: rows.py
A group is a run of members with one key (the path up to the first dot of the file name): a .json member in LLaVA form,
or a .txt caption, and its images. Their order is that of the field ``image`` if it names them, else by their numbers. A
.json without conversations beside a .txt describes the picture; the caption is used. Nothing is extracted.
Further reasons: member_unsafe, member_repeated, member_unsupported, image_order, image_missing, download_failed.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sicog_mcore.data.row_keys import shown
from sicog_mcore.data.row_survey import RowSurvey
from sicog_mcore.data.rows import (
    MAX_ROW_BYTES,
    BuildSample,
    JsonRow,
    RowIds,
    build_sample,
    decode_text,
    default_id,
    image_paths,
    is_unsafe_path,
    parse_row,
    read_range,
)
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample
from sicog_mcore.errors import SampleError

READABLE, UNSAFE, REPEATED = range(3)
FIELDS, CAPTION, IMAGE, FOREIGN, OTHER = range(5)
TEXT_TYPES: Mapping[str, int] = {"json": FIELDS, "txt": CAPTION}
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
# What a sample is about as much as its text, and what no model here can read: such a sample is refused.
FOREIGN_TYPES = frozenset("heic heif jp2 svg pdf mp4 avi mov mkv webm m4v wav mp3 flac ogg m4a aac".split())
ARRAY_TYPES = frozenset("npy npz pt pth pkl pickle pyd ten".split())  # beside an image they are known of it
# Files that archivers and file managers add on their own.
DEBRIS = re.compile(r"(?:^|/)(?:\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini|__MACOSX/.*|PaxHeaders?(?:\.[^/]*)?/.*)$")
NUMBER = re.compile(r"(?:image|img)?(?:[-_]?(\d{1,9}))?")  # of an image, before its type
COMPRESSED: Mapping[bytes, str] = {
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
NEEDS_PLAIN_TAR = "samples are read in place from a plain tar: unpack it"
DIALOGUE_KEYS = ("conversations", "messages", "conversation", "chosen", "rejected")
MAX_KEY_BYTES = 200  # of a key as shown in messages
MAX_TYPE_CHARS = 40  # of a member's type as shown in notes
CHUNK_BYTES = 1 << 20
TAR_DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError)


class ShardDamaged(Exception):
    """A shard of which a part cannot be read, as far as that is known; the text says where it begins."""


def quick_check(path: Path) -> str:
    """Names the problem of a shard that its first and last bytes show; empty if they look sound.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        if packed := compression(file.read(8)):
            return f"is compressed ({packed}), {NEEDS_PLAIN_TAR}"
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tarfile.BLOCKSIZE))
        if file.read() == bytes(tarfile.BLOCKSIZE):
            return ""
    return f"is cut off or no tar: its {size:,} bytes do not end with the mark that closes an archive"


class Member(NamedTuple):
    """One file of a sample: what it is, where its bytes are (offset and length), and the number of its type."""

    kind: int
    offset: int
    length: int
    type: int


@dataclass(frozen=True)
class ShardFile:
    """One shard, as byte ranges.

    Attributes:
        path: real path of the shard.
        name: what default ids start with.
        keys: bytes [rows]: the key of each group, for messages.
        states: int64 [rows]: READABLE, UNSAFE or REPEATED.
        borders: int64 [rows + 1]: the members of row i are borders[i] to borders[i + 1].
        members: int64 [members, 4]: fields of Member.
        types: what follows the key and a dot in the members' names, each once.
        build: gives a row its meaning.
    """

    path: str
    name: str
    keys: NDArray[np.bytes_]
    states: NDArray[np.int64]
    borders: NDArray[np.int64]
    members: NDArray[np.int64]
    types: tuple[str, ...]
    build: BuildSample

    def __len__(self) -> int:
        return len(self.states)

    def origin(self, row: int) -> str:
        return f"{self.path}:{self.keys[row].decode('utf-8', 'replace')}"

    def read(self, row: int) -> Sample:
        if self.states[row] == UNSAFE:
            detail = "a member is a link, a device, sparse, or has a path that leaves the shard; write plain files only"
            raise SampleError("member_unsafe", detail)
        if self.states[row] == REPEATED:
            detail = "its key stands in several places of the shard, or has two members of one type"
            raise SampleError("member_repeated", f"{detail}; write each sample once, its members side by side")
        found = [Member(*member) for member in self.members[self.borders[row] : self.borders[row + 1]].tolist()]
        members = {self.types[member.type]: member for member in found}
        if foreign := _foreign(members):
            detail = f"the member {shown('.' + foreign)} cannot be read; remove the sample, or convert the member"
            raise SampleError("member_unsupported", detail)
        fields = self._fields(members)
        images = [
            ImageRef(self.path, members[name].offset, members[name].length) for name in _pictures(fields, members)
        ]
        return self.build(fields, images, default_id(self.name, row), self.origin(row))

    def _fields(self, members: Mapping[str, Member]) -> JsonRow:
        """The LLaVA fields of a group; a caption becomes the answer to a turn that only shows the image."""
        texts = {member.kind: member for member in members.values() if member.kind in (FIELDS, CAPTION)}
        fields = parse_row(self._read(texts[FIELDS])) if FIELDS in texts else {}
        if FIELDS in texts and (CAPTION not in texts or not describes_picture(fields)):
            return fields
        if CAPTION not in texts:
            found = f"found {shown(sorted(members))}"
            raise SampleError("field_missing", f"the sample has neither a .json nor a .txt member: {found}")
        if fields.get("status", "success") != "success":
            detail = (
                f"the .json says that its status is {shown(fields['status'])}, expected 'success'; remove the sample"
            )
            raise SampleError("download_failed", detail)
        if not any(member.kind == IMAGE for member in members.values()):
            raise SampleError("image_missing", "the caption has no picture beside it; pack it under the same key")
        caption = decode_text(self._read(texts[CAPTION])).strip()
        question = {"from": "human", "value": IMAGE_PLACEHOLDER}
        return {"id": fields.get("id"), "conversations": [question, {"from": "gpt", "value": caption}]}

    def _read(self, member: Member) -> bytes:
        return read_range(self.path, member.offset, member.length)


def describes_picture(fields: Mapping[str, object]) -> bool:
    """Whether a .json holds no conversation in any form, but what is known of a picture (its URL, its size)."""
    return all(fields.get(key) is None for key in DIALOGUE_KEYS)


def compression(start: bytes) -> str:
    """How a file is compressed that begins with these bytes; empty if it is not."""
    return next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), "")


def _foreign(members: Mapping[str, Member]) -> str:
    """The type of the first member that the text may be about and that cannot be read; empty if there is none."""
    has_image = any(member.kind == IMAGE for member in members.values())
    foreign = (name for name, member in members.items() if member.kind == FOREIGN)
    return next((name for name in foreign if not (has_image and _last(name) in ARRAY_TYPES)), "")


def _pictures(fields: JsonRow, members: Mapping[str, Member]) -> list[str]:
    """The types of a sample's images, in the order of their placeholders.

    Raises:
        SampleError: image_order: nothing says which images come in which order; image_count_mismatch: one that the
            field ``image`` names is not there; field_type.
    """
    found = [name for name, member in members.items() if member.kind == IMAGE]
    named = [_type_in(path, found) for path in image_paths(fields)]
    if lost := [name for name in named if name not in members]:
        if len(found) == len(named) == 1:
            return found  # the field has the path of the time before the picture was packed
        detail = f"the field image names {shown('.' + lost[0])}, which is not among the sample's images"
        raise SampleError("image_count_mismatch", f"{detail} ({shown(sorted(found))}); pack it beside the text")
    numbers = {name: int(match[1] or -1) for name in found if (match := NUMBER.fullmatch(name.rpartition(".")[0]))}
    order = named or sorted(numbers, key=lambda name: numbers[name])
    if found and not named and (not order or len(set(numbers.values())) < len(order)):
        detail = f"nothing says which of {shown(sorted(found))} are the sample's images, and in which order"
        raise SampleError(
            "image_order", f"{detail}; number them (key.0.png, key.1.png), or list them in the field image"
        )
    if forgotten := sorted(numbers.keys() - set(order)):
        detail = f"{shown(forgotten)} are not listed in the field image"
        raise SampleError("image_order", f"{detail}; list all images of the sample in the order of their placeholders")
    return order


def _type_in(path: str, found: Sequence[str]) -> str:
    """The member's type that a path of the field ``image`` means: "0.png" of "shard/key.0.png", or of "0.png"."""
    base = path.rpartition("/")[2]
    return base if base in found else base.partition(".")[2]


@dataclass
class _Group:
    key: str
    state: int = READABLE
    members: dict[str, Member] = field(default_factory=dict)

    def member(self, kind: int) -> Member | None:
        return next((member for member in self.members.values() if member.kind == kind), None)


def index_shard(
    path: Path, name: str, survey: RowSurvey, build: BuildSample = build_sample, said_as: str | None = None
) -> tuple[ShardFile, RowIds]:
    """Finds the samples of a shard.

    Args:
        path: the shard.
        name: what default ids start with.
        survey: counts the keys of the samples, and members that are not used.
        build: gives a row its meaning.
        said_as: path of the shard in the survey, if another one.

    Raises:
        ShardDamaged: it is cut off, compressed, or no tar; what would be lost with it is unknown.
    """
    place = str(path) if said_as is None else said_as
    ids = RowIds(name, place, survey)
    types: dict[str, int] = {}
    with open(path, "rb") as file:
        groups = _group(file, types, place, survey)
        for group in groups:
            _count(file, group, ids, place, survey)
            ids.add_content(_content(file, group))
    members = [member for group in groups for member in group.members.values()]
    shard = ShardFile(
        path=os.path.realpath(path),
        name=name,
        keys=np.array([os.fsencode(group.key)[:MAX_KEY_BYTES] for group in groups], dtype=np.bytes_),
        states=np.array([group.state for group in groups], dtype=np.int64),
        borders=np.cumsum([0, *(len(group.members) for group in groups)], dtype=np.int64),
        members=np.array(members, dtype=np.int64).reshape(-1, len(Member._fields)),
        types=tuple(types),
        build=build,
    )
    if not groups:
        survey.remark("a shard holds no sample", place, "end", "shard")
    return shard, ids


def _count(file: BinaryIO, group: _Group, ids: RowIds, path: str, survey: RowSurvey) -> None:
    """Counts a sample: its id, its keys, and which of its members are not used."""
    fields, has_caption = group.member(FIELDS), group.member(CAPTION) is not None
    row = _parse(file, fields) if fields else None
    if has_caption and isinstance(row, dict) and describes_picture(row):
        ids.add_id(row.get("id"))
        survey.remark(
            "the .txt is the answer, the .json beside it describes the picture and is not used", path, group.key
        )
    else:
        if has_caption and row is not None:
            survey.remark("the .json holds the conversation, the .txt beside it is not used", path, group.key)
        ids.add(row, group.key, sum(member.kind == IMAGE for member in group.members.values()))
    if foreign := _foreign(group.members):
        survey.remark(f"refused: members {'.' + foreign[-MAX_TYPE_CHARS:]!r} cannot be read", path, group.key)
        return
    try:
        used = _pictures(row if isinstance(row, dict) else {}, group.members)
    except SampleError:
        return  # said when it is read
    for name, member in group.members.items():
        if member.kind in (OTHER, FOREIGN) or (member.kind == IMAGE and name not in used):
            survey.remark(f"members {'.' + name[-MAX_TYPE_CHARS:]!r} are not used", path, group.key)


def _content(file: BinaryIO, group: _Group) -> bytes:
    """Gives the bytes that identify a sample: its texts, and the names and sizes of its members, but not their pixels."""
    texts = [_read(file, member) for member in group.members.values() if member.kind in (FIELDS, CAPTION)]
    members = [(name, member.kind, member.length) for name, member in group.members.items()]
    return b"\0".join([repr((group.key, group.state, members)).encode("utf-8", "surrogateescape"), *texts])


def _read(file: BinaryIO, member: Member) -> bytes:
    """The text of a member; nothing of one that is too long to be a row."""
    file.seek(member.offset)
    return file.read(member.length) if member.length <= MAX_ROW_BYTES else b""


def _parse(file: BinaryIO, member: Member) -> object:
    """The fields of a sample; None if they are broken, which is said when they are read."""
    file.seek(member.offset)
    try:
        return parse_row(file.read(member.length)) if member.length <= MAX_ROW_BYTES else None
    except SampleError:
        return None


def _group(file: BinaryIO, types: dict[str, int], path: str, survey: RowSurvey) -> list[_Group]:
    """The samples of a shard; ``types`` takes the types of their members."""
    size = os.fstat(file.fileno()).st_size
    groups: list[_Group] = []
    try:
        for entry in _entries(file):
            if DEBRIS.search(entry.name):
                survey.remark("skipped: members that an archiver or file manager added", path, entry.name, "member")
                continue
            folder, base = os.path.split(entry.name)
            stem, _, extension = base.partition(".")
            key, kind = os.path.join(folder, stem), _kind(extension)
            if not groups or groups[-1].key != key:
                groups.append(_Group(key))
            if not entry.isreg() or entry.issparse() or is_unsafe_path(entry.name):
                groups[-1].state = UNSAFE
            elif entry.offset_data + entry.size > size:
                raise tarfile.ReadError(f"{entry.name!r} is cut off")
            elif extension in groups[-1].members or (kind in TEXT_TYPES.values() and groups[-1].member(kind)):
                groups[-1].state = REPEATED
            else:
                number = types.setdefault(extension, len(types))
                groups[-1].members[extension] = Member(kind, entry.offset_data, entry.size, number)
    except TAR_DAMAGE as error:
        raise ShardDamaged(_describe_damage(file, size, groups, error)) from error
    places = Counter(group.key for group in groups)
    for group in groups:
        if places[group.key] > 1 and group.state == READABLE:
            group.state = REPEATED
    return groups


def _describe_damage(file: BinaryIO, size: int, groups: Sequence[_Group], error: Exception) -> str:
    file.seek(0)
    if packed := compression(file.read(8)):
        return f"is compressed ({packed}), {NEEDS_PLAIN_TAR}"
    if not groups:
        return f"is no tar archive ({size:,} bytes: {error})"
    ends = [member.offset + member.length for group in groups for member in group.members.values()]
    place = f"behind byte {max(ends, default=0):,} of {size:,} ({error})"
    return f"is cut off or damaged {place}; samples up to there: {len(groups):,}, what follows is lost"


def _kind(extension: str) -> int:
    """Classifies a member; "a.meta.json" is not the sample's text, but images may be numbered, as "a.0.jpg"."""
    last = _last(extension)
    if last in IMAGE_TYPES:
        return IMAGE
    return FOREIGN if last in FOREIGN_TYPES or last in ARRAY_TYPES else TEXT_TYPES.get(extension.lower(), OTHER)


def _last(extension: str) -> str:
    return extension.lower().rpartition(".")[2]


def _entries(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """All members but folders.

    Raises:
        tarfile.TarError: damage, also where tarfile takes it for the end of the archive, and data behind that end.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every entry until it is closed
            if not entry.isdir():
                yield entry
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark at byte {archive.offset}")
        while rest := file.read(CHUNK_BYTES):
            if rest.strip(b"\0"):
                found = f"more data behind the end mark at byte {archive.offset}"
                raise tarfile.ReadError(f"{found}, as where archives were joined with cat; write one archive")
