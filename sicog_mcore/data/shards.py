"""WebDataset tar shards: one sample per group of members, read in place.

In: a .tar file   Out: ShardFile (a Source)   Next: rows.py
A group is a run of members with one key (the path up to the first dot of the file name): a .json member in LLaVA form,
or a .txt caption, and its images in order. Nothing is extracted. Further reasons: member_unsafe, shard_damaged.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sicog_mcore.data.rows import (
    MAX_ROW_BYTES,
    BuildSample,
    Row,
    RowHashes,
    RowIds,
    build_sample,
    decode_text,
    default_id,
    is_unsafe_path,
    parse_row,
    read_range,
)
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample
from sicog_mcore.errors import SampleError

READABLE, UNSAFE, DAMAGED = range(3)
FIELDS, CAPTION, IMAGE, OTHER = range(4)
TEXT_TYPES: Mapping[str, int] = {"json": FIELDS, "txt": CAPTION}
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
MAX_KEY_BYTES = 200  # of a key as shown in messages
TAR_DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError)


@dataclass(frozen=True)
class ShardFile:
    """One shard, as byte ranges.

    Attributes:
        path: real path of the shard.
        name: what default ids start with.
        keys: bytes [rows]: the key of each group, for messages.
        states: int64 [rows]: READABLE, UNSAFE or DAMAGED.
        borders: int64 [rows + 1]: the members of row i are borders[i] to borders[i + 1].
        members: int64 [members, 3]: kind, offset (bytes) and length (bytes).
        build: gives a row its meaning.
    """

    path: str
    name: str
    keys: NDArray[np.bytes_]
    states: NDArray[np.int64]
    borders: NDArray[np.int64]
    members: NDArray[np.int64]
    build: BuildSample

    def __len__(self) -> int:
        return len(self.states)

    def origin(self, row: int) -> str:
        return f"{self.path}:{self.keys[row].decode('utf-8', 'replace')}"

    def read(self, row: int) -> Sample:
        if self.states[row] == UNSAFE:
            detail = "a member is a link, a device, sparse, or has a path that leaves the shard; write plain files only"
            raise SampleError("member_unsafe", detail)
        if self.states[row] == DAMAGED:
            detail = "the shard is cut off or damaged here, and what follows is lost; write the shard again"
            raise SampleError("shard_damaged", detail)
        members = self.members[self.borders[row] : self.borders[row + 1]].tolist()
        images = [ImageRef(self.path, offset, length) for kind, offset, length in members if kind == IMAGE]
        return self.build(self._fields(members), images, default_id(self.name, row), self.origin(row))

    def _fields(self, members: list[list[int]]) -> Row:
        """The LLaVA fields of a group; a caption becomes the answer to a turn that only shows the image."""
        for kind, offset, length in sorted(members):
            if kind == FIELDS:
                return parse_row(read_range(self.path, offset, length))
            if kind == CAPTION:
                caption = decode_text(read_range(self.path, offset, length)).strip()
                question = {"from": "human", "value": IMAGE_PLACEHOLDER}
                return {"conversations": [question, {"from": "gpt", "value": caption}]}
        raise SampleError("field_missing", "the sample has neither a .json nor a .txt member")


class _Member(NamedTuple):
    kind: int
    offset: int
    length: int


@dataclass
class _Group:
    key: str
    state: int = READABLE
    members: dict[str, _Member] = field(default_factory=dict)

    @property
    def has_text(self) -> bool:
        return any(member.kind in (FIELDS, CAPTION) for member in self.members.values())


def index_shard(path: Path, name: str, build: BuildSample = build_sample) -> tuple[ShardFile, RowHashes]:
    """Finds the samples of a shard. Damage ends it with one row that says so; the samples before it stay.

    Args:
        path: the shard.
        name: what default ids start with.
        build: gives a row its meaning.
    """
    ids = RowIds(name)
    with open(path, "rb") as file:
        groups = _group(file)
        for group in groups:
            fields = next((member for member in group.members.values() if member.kind == FIELDS), None)
            text = _read(file, fields) if fields else b""
            ids.add_encoded(text)
            ids.add_content(_content(file, group, text))
    members = [member for group in groups for member in group.members.values()]
    shard = ShardFile(
        path=os.path.realpath(path),
        name=name,
        keys=np.array([os.fsencode(group.key)[:MAX_KEY_BYTES] for group in groups], dtype=np.bytes_),
        states=np.array([group.state for group in groups], dtype=np.int64),
        borders=np.cumsum([0, *(len(group.members) for group in groups)], dtype=np.int64),
        members=np.array(members, dtype=np.int64).reshape(-1, 3),
        build=build,
    )
    return shard, ids.hashes()


def _content(file: BinaryIO, group: _Group, text: bytes) -> bytes:
    """What a sample is recognised by: its text, and the names and sizes of its members, but not their pixels."""
    captions = [_read(file, member) for member in group.members.values() if member.kind == CAPTION] if not text else []
    members = [(name, member.kind, member.length) for name, member in group.members.items()]
    return b"\0".join([repr((group.key, group.state, members)).encode("utf-8", "surrogateescape"), text, *captions])


def _read(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.length) if member.length <= MAX_ROW_BYTES else b""


def _group(file: BinaryIO) -> list[_Group]:
    size = os.fstat(file.fileno()).st_size
    groups: list[_Group] = []
    try:
        for entry in _entries(file):
            folder, base = os.path.split(entry.name)
            stem, _, extension = base.partition(".")
            key = os.path.join(folder, stem)
            if not groups or groups[-1].key != key or extension in groups[-1].members:
                groups.append(_Group(key))
            if not entry.isreg() or entry.issparse() or is_unsafe_path(entry.name):
                groups[-1].state = UNSAFE
            elif entry.offset_data + entry.size > size:
                raise tarfile.ReadError(f"{entry.name} is cut off")
            else:
                groups[-1].members[extension] = _Member(_kind(extension), entry.offset_data, entry.size)
    except TAR_DAMAGE:
        # The sample that was being read is the damaged one, unless it is complete already.
        if not groups or groups[-1].has_text:
            groups.append(_Group("end"))
        groups[-1].state = DAMAGED
    return groups


def _kind(extension: str) -> int:
    """What a member is; "a.meta.json" is not the sample's text, but images may be numbered, as "a.0.jpg"."""
    last = extension.lower().rpartition(".")[2]
    return IMAGE if last in IMAGE_TYPES else TEXT_TYPES.get(extension.lower(), OTHER)


def _entries(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """All members but folders.

    Raises:
        tarfile.TarError: damage, also where tarfile takes it for the end of the archive.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every entry until it is closed
            if not entry.isdir():
                yield entry
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark at byte {archive.offset}")
