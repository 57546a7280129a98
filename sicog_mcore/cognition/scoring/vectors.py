"""Keeps the vectors of all distinct texts of a run in files, each made once.

In: texts in the order of the items   Out: part files of BLOCK vectors   Next: similarity.py
A part holds the next BLOCK texts that did not occur before, and its name is a hash of these texts and of the embedder. So
any process makes equal parts, finished ones are found again, and stale ones are never taken. In memory are one block, a few
mapped parts, and 16 bytes per distinct text to know it by.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from sicog_mcore.cognition.scoring.embed import Embedder
from sicog_mcore.errors import RecordError
from sicog_mcore.files import hash_chunks, whole_file

BLOCK = 1024
OPEN_PARTS = 64


@dataclass(frozen=True)
class Shard:
    """The number of this process among ``count``."""

    index: int
    count: int


WHOLE = Shard(0, 1)


class VectorBlock(NamedTuple):
    """A block of distinct texts and the file of their vectors."""

    number: int
    path: Path
    texts: list[str]


class VectorStore:
    """Vectors in files.

    Attributes:
        embedded: texts that this process embedded.
    """

    def __init__(self, folder: Path, embedder: Embedder, block: int = BLOCK):
        self._folder = folder
        self._embedder = embedder
        self._block = block
        # Hash of a text -> its number in the order of first occurrence, which gives part and row.
        self._places: dict[bytes, int] = {}
        self._paths: list[Path] = []
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self.embedded = 0

    @property
    def name(self) -> str:
        """Name of the embedder."""
        return self._embedder.name

    def __len__(self) -> int:
        """Number of distinct texts."""
        return len(self._places)

    def fill(self, texts: Iterable[str], shard: Shard = WHOLE) -> Iterator[int]:
        """Makes the parts of a shard that do not exist; call it once, with all texts, and exhaust it.

        Yields:
            Number of texts embedded so far, after each part.
        """
        for part in self._parts(texts):
            # Every process walks through all texts, so that all number the parts alike, and embeds only its own.
            if part.number % shard.count != shard.index or part.path.exists():
                continue
            vectors = self._embedder.embed(part.texts)
            content = io.BytesIO()
            np.save(content, vectors)  # into a file, numpy would not tell why it cannot write
            with whole_file(part.path, shared=True) as temporary:
                temporary.write_bytes(content.getbuffer())
            self.embedded += len(part.texts)
            yield self.embedded

    def check(self, texts: Iterable[str]) -> None:
        """Makes nothing; call it once, with all texts, instead of ``fill``.

        Raises:
            RecordError: parts are missing.
        """
        parts = ((part.number, part.path) for part in self._parts(texts))
        missing = [f"{number} ({path.name})" for number, path in parts if not path.is_file()]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise RecordError(
                f"{self._folder}: {len(missing)} of {len(self._paths)} parts are missing: {shown}; part p is made by shard "
                "p modulo the number of shards, from the same files and with the same scorer: run that shard again"
            )

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors as float32 [n, d] of texts that were among those of ``fill`` or ``check``."""
        places = [divmod(self._places[_key(text)], self._block) for text in texts]
        return np.stack([self._part(part)[row] for part, row in places])

    def _parts(self, texts: Iterable[str]) -> Iterator[VectorBlock]:
        block: list[str] = []
        for text in distinct(texts, self._places):
            block.append(text)
            if len(block) == self._block:
                yield self._new_part(block)
                block = []
        if block:
            yield self._new_part(block)

    def _new_part(self, texts: list[str]) -> VectorBlock:
        # Names by content: another scorer, or one text more in front, gives other names, and no old vector is ever
        # mistaken.
        content = hash_chunks([self.name.encode(), *(b"\0" + _key(text) for text in texts)])
        path = self._folder / f"{content}.npy"
        self._paths.append(path)
        return VectorBlock(len(self._paths) - 1, path, texts)

    def _part(self, number: int) -> np.ndarray:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self._paths[number]
        # Every part is full but the last.
        expected = min(self._block, len(self) - number * self._block)
        try:
            vectors: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise RecordError(f"{path} cannot be read ({error}); delete it and run again") from error
        if vectors.ndim != 2 or len(vectors) != expected:
            raise RecordError(
                f"{path}: found shape {vectors.shape}, expected {expected} vectors; delete it and run again"
            )
        # The parts used last stay mapped; the texts of an item mostly lie in one.
        self._open[number] = vectors
        if len(self._open) > OPEN_PARTS:
            self._open.popitem(last=False)
        return vectors


def distinct(texts: Iterable[str], places: dict[bytes, int]) -> Iterator[str]:
    """The texts that did not occur before.

    Args:
        places: what occurred before, each with its number; the new ones are added.
    """
    for text in texts:
        key = _key(text)
        if key not in places:
            places[key] = len(places)
            yield text


def _key(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
