"""The folder of an index: a file per block, and a note of which blocks a file of rows consists of.

In: Experiment   Out: where the index of a block is, what is known of a file   Next: build_index.py, indexed_files.py
``<data.index>/<settings>/blocks/<hash of a block's bytes>.arrow`` is found by content, so it is right wherever the block
stands. ``files/<hash of path and stamp>.json`` tells the blocks of a file that had this path, size, inode and these times,
and ends with a hash of what it tells: as long as the file has them, it is taken to be unchanged, and is not read.
Everything here may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sicog_mcore.config import Experiment
from sicog_mcore.data.index.block_table import BlockTable, BlockUnreadable
from sicog_mcore.data.index.index_settings import IndexSettings, index_folder
from sicog_mcore.data.index.row_blocks import BlockSpan
from sicog_mcore.data.sources import DataFile
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.files import hash_json, write_json

SETTINGS, EXPERIMENT = "settings.json", "experiment.yaml"
# A file that was written so shortly before it was looked at can be written again without another time: disks count in
# steps of up to two seconds. It is read again until it has rested.
RESTED_NS = 2_000_000_000
DIGEST_DIGITS = 16


class FileStamp(NamedTuple):
    """The stamp of a file tells without reading that it was not written to: an edit changes its times, even at one size.

    The time of change cannot be set back by programs, unlike that of modification.
    """

    size: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Raises OSError if there is no such file."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def has_rested(self, now_ns: int) -> bool:
        return now_ns - max(self.modified_ns, self.changed_ns) > RESTED_NS


@dataclass(frozen=True)
class FileBlocks:
    """The blocks of a file and their part of the index, in order."""

    spans: tuple[BlockSpan, ...]
    tables: tuple[BlockTable, ...]


class IndexStore:
    """The index of one experiment's data sets.

    Args:
        experiment: its settings choose the folder; nothing is written yet.

    Attributes:
        folder: of the index with these settings.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._settings = IndexSettings.of(experiment)
        self._experiment = experiment
        self.folder = index_folder(experiment) / self._settings.digest[:DIGEST_DIGITS]

    def prepare(self) -> Path:
        """Makes the folder, with the settings that it stands for; returns a file that holds the experiment.

        Raises:
            ConfigError: it cannot be written to.
        """
        try:
            write_json(self.folder / SETTINGS, self._settings.values, shared=True)
            write_json(self.folder / EXPERIMENT, self._experiment.to_dict(), shared=True)  # JSON is YAML
        except OSError as error:
            fix = "name a folder in data.index that can be written to"
            problem = ConfigProblem(
                "data.index", str(index_folder(self._experiment)), f"cannot be written: {error}", fix
            )
            raise ConfigError([problem]) from error
        return self.folder / EXPERIMENT

    def block(self, file: DataFile, span: BlockSpan) -> Path:
        """The file of a block's index. Images are found below the source's folder, so that counts as well."""
        images = "" if file.kind == "shard" else os.path.realpath(file.images)
        return self.folder / "blocks" / f"{hash_json([file.kind, images, span.digest])}.arrow"

    def missing(self, file: DataFile, spans: tuple[BlockSpan, ...]) -> list[BlockSpan]:
        """The blocks without an index that can be read."""
        return [span for span in spans if self.table(file, span) is None]

    def table(self, file: DataFile, span: BlockSpan) -> BlockTable | None:
        """The index of a block; None if there is none, or a damaged one."""
        table = BlockTable(str(self.block(file, span)))
        try:
            return table if len(table) == span.rows and table.header.rows == span.rows else None
        except BlockUnreadable:
            return None

    def known(self, file: DataFile) -> FileBlocks | None:
        """The blocks of a file that was not changed since they were noted; None if that is not sure, or one is missing.

        Raises:
            OSError: the file is not there.
        """
        stamp = FileStamp.of(file.path)
        try:
            noted, seal = json.loads(self._note(file, stamp).read_bytes())
            # A digit that a disk has changed would move rows without a word: such a note counts as none.
            if seal != hash_json(noted) or not stamp.has_rested(noted["looked_at_ns"]):
                return None
            spans = tuple(BlockSpan(*span) for span in noted["blocks"])
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return self.opened(file, spans)

    def opened(self, file: DataFile, spans: tuple[BlockSpan, ...]) -> FileBlocks | None:
        """Gives the tables of a file that was just cut into these blocks; None while one is missing."""
        tables = tuple(table for span in spans if (table := self.table(file, span)) is not None)
        return FileBlocks(spans, tables) if len(tables) == len(spans) else None

    def note(self, file: DataFile, stamp: FileStamp, looked_at_ns: int, spans: tuple[BlockSpan, ...]) -> None:
        """Notes the blocks of a file, unless it was changed meanwhile.

        Args:
            stamp: of the file before it was read.
            looked_at_ns: when that was, since the epoch.

        Raises:
            MachineError: the disk is full or broken.
        """
        if FileStamp.of(file.path) == stamp:
            value = {"path": str(file.path), "looked_at_ns": looked_at_ns, "blocks": spans}
            write_json(self._note(file, stamp), [value, hash_json(value)], shared=True)

    def _note(self, file: DataFile, stamp: FileStamp) -> Path:
        parts = [os.path.abspath(file.path), file.kind, os.path.realpath(file.images), *stamp]
        return self.folder / "files" / f"{hash_json(parts)}.json"


def look_at(path: Path) -> tuple[FileStamp, int]:
    """The stamp of a file, and when it was taken (nanoseconds since the epoch).

    Raises:
        OSError: the file is not there.
    """
    now_ns = time.time_ns()
    return FileStamp.of(path), now_ns
