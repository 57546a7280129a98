"""Maps foreign weights to our parameters: each kind of mapping says once which rows go where.

A mapping lists pieces: runs of rows that stand both in a source tensor and in one tensor-parallel shard of our parameter.
Import copies them one way, export the other, so a mapping is its own inverse.
In: names of tables.py, parameters of the model   Out: Transfer, one bound mapping   Next: weights.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sicog_mcore.errors import CheckpointError

Shape = tuple[int, ...]
# Rows ``start`` to ``start + length`` of a source tensor, along an axis.
ReadRows = Callable[[str, int, int, int], Tensor]


@dataclass(frozen=True)
class Target:
    """One parameter of the whole model.

    Attributes:
        shape: of the whole parameter.
        axis: dimension along which tensor parallelism shards it; 0 where it does not.
        owners: the rank that holds each shard, in order; one rank where it is not sharded.
    """

    name: str
    shape: Shape
    axis: int
    owners: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shards(self) -> int:
        return len(self.owners)

    @property
    def shard_shape(self) -> Shape:
        return tuple(n // self.shards if d == self.axis else n for d, n in enumerate(self.shape))


@dataclass(frozen=True)
class RowRun:
    """Rows along the target's axis that one source and one shard of the target have in common."""

    source: int  # index of the source
    source_start: int
    target_start: int
    length: int


@dataclass(frozen=True)
class OneToOne:
    """One tensor, the same on both sides; ``*`` stands for the number of a layer."""

    target: str
    source: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        """Returns the shapes of the sources."""
        return (target.shape,)

    def pieces(self, target: Target, shard: int) -> Iterator[RowRun]:
        """Lists the pieces of one shard of the target, from its first row on."""
        length = target.shard_shape[target.axis]
        yield RowRun(0, shard * length, 0, length)


@dataclass(frozen=True)
class Fused(OneToOne):
    """A convolution whose stride is its kernel: the source is [c, channels, side, side], ours [c, channels * side**2]."""

    channels: int = 3

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        """Returns the shapes of the sources."""
        # A convolution that steps by its own width is a matrix product over flattened patches, (c, y, x) in both: only
        # the shape of the kernel differs, no value moves.
        side = round((target.shape[1] / self.channels) ** 0.5)
        return ((target.shape[0], self.channels, side, side),)


@dataclass(frozen=True)
class PaddedVocabulary(OneToOne):
    """A table with one row per token; our last rows, padding that no token uses, have no source and are zero."""

    rows: int = 0

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        """Returns the shapes of the sources."""
        return ((self.rows, *target.shape[1:]),)

    def pieces(self, target: Target, shard: int) -> Iterator[RowRun]:
        """Lists the pieces of one shard of the target, from its first row on."""
        # The vocabulary is padded to a multiple that all layouts share, so the last shards hold fewer source rows, or none.
        length = target.shard_shape[0]
        start = shard * length
        if start < self.rows:
            yield RowRun(0, start, 0, min(length, self.rows - start))


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections, weights or biases. Ours puts each key/value head behind its query heads.

    Args:
        groups: key/value heads.
        queries: query heads per key/value head.
    """

    target: str
    sources: tuple[str, str, str]
    groups: int
    queries: int

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        """Returns the shapes of the sources."""
        rows = self._rows(target)
        return tuple((n * self.groups, *target.shape[1:]) for n in rows)

    def pieces(self, target: Target, shard: int) -> Iterator[RowRun]:
        """Lists the pieces of one shard of the target, from its first row on."""
        # Ours is [groups * (queries + 2) * d, ...]: the query heads of a group, its key head, its value head, then the next
        # group. A shard is a run of whole groups, so no head is split and each rank attends on its own; the sources keep
        # all queries, all keys and all values apart, so a shard takes one run of each source for every group.
        rows, groups = self._rows(target), self.groups // target.shards
        target_start = 0
        for group in range(shard * groups, (shard + 1) * groups):
            for source, length in enumerate(rows):
                yield RowRun(source, group * length, target_start, length)
                target_start += length

    def _rows(self, target: Target) -> tuple[int, int, int]:
        """Returns the rows of query, key and value in one group."""
        head_dim = target.shape[0] // (self.groups * (self.queries + 2))
        return self.queries * head_dim, head_dim, head_dim


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projection. Every shard of ours holds its part of the gate, then its part of the up projection."""

    target: str
    sources: tuple[str, str]

    def shapes(self, target: Target) -> tuple[Shape, ...]:
        """Returns the shapes of the sources."""
        return ((target.shape[0] // 2, *target.shape[1:]),) * 2

    def pieces(self, target: Target, shard: int) -> Iterator[RowRun]:
        """Lists the pieces of one shard of the target, from its first row on."""
        # SwiGLU multiplies gate and up row by row on one rank. Were the stacked matrix sharded by runs of rows, the first
        # ranks would hold the gate alone and the last ones the up projection alone.
        length = target.shard_shape[0] // 2
        for source in range(2):
            yield RowRun(source, shard * length, source * length, length)


@dataclass(frozen=True)
class Tied:
    """A source that repeats another one. It may be missing, must be equal, and is not written by an export."""

    source: str
    of: str


@dataclass(frozen=True)
class Ignored:
    """Sources that our model does not use; they may be there or not. ``**`` stands for any rest of a name."""

    source: str
    why: str


Mapping = OneToOne | Fused | PaddedVocabulary | QKV | GatedMLP
MappingRow = Mapping | Tied | Ignored
MappingTable = tuple[MappingRow, ...]


@dataclass(frozen=True)
class Transfer:
    """A mapping bound to one parameter: full names and shapes on both sides."""

    mapping: Mapping
    target: Target
    sources: tuple[str, ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return self.mapping.shapes(self.target)

    def fill(self, parameter: Tensor, shard: int, read: ReadRows) -> None:
        """Fills one shard of the parameter, in place and in its own dtype; rows that no source has become zero."""
        axis, filled = self.target.axis, 0
        for piece in self.mapping.pieces(self.target, shard):
            rows = read(self.sources[piece.source], axis, piece.source_start, piece.length)
            here = parameter.narrow(axis, piece.target_start, piece.length)
            # A copy into a view converts the dtype without a second tensor; the shapes differ where a kernel is flattened.
            here.copy_(rows.reshape(here.shape))
            filled += piece.length
        # Pieces follow each other from the first row on, so what is left is padding at the end.
        parameter.narrow(axis, filled, parameter.shape[axis] - filled).zero_()

    def assemble(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns the source tensors, by name, from all shards of the parameter."""
        axis = self.target.axis
        # Empty is enough: shards are disjoint, and their pieces cover every source row once.
        wholes = [torch.empty(shape, dtype=shards[0].dtype) for shape in self.shapes]
        for shard, tensor in enumerate(shards):
            for piece in self.mapping.pieces(self.target, shard):
                there = wholes[piece.source].narrow(axis, piece.source_start, piece.length)
                there.copy_(tensor.narrow(axis, piece.target_start, piece.length).reshape(there.shape))
        return dict(zip(self.sources, wholes, strict=True))


def matches(pattern: str, name: str) -> re.Match[str] | None:
    """Matches a name against a pattern: ``*`` is the number of a layer, ``**`` any rest of a name."""
    # All else is escaped, since names are full of dots. ``**`` is split off before ``*``, which it begins with.
    wild = {"**": ".+", "*": r"(\d+)"}
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.fullmatch("".join(wild.get(part) or re.escape(part) for part in parts), name)


def bind(table: MappingTable, targets: Sequence[Target], prefix: str) -> tuple[Transfer, ...]:
    """Binds each target to the one row of the table that names it, in the order of the targets.

    Args:
        table: rows without the prefix.
        prefix: stands in front of every source name.

    Raises:
        CheckpointError: a parameter has no row in the table, or several.
    """
    transfers, orphans = [], []
    for target in targets:
        # Tied and Ignored rows are no Mapping: no parameter of ours is filled from them.
        found = [
            (row, match) for row in table if isinstance(row, Mapping) and (match := matches(row.target, target.name))
        ]
        if len(found) != 1:
            orphans.append(f"{target.name} ({len(found)} rows)")
            continue
        # A row stands for all layers: the number that ``*`` met in our name goes into the names of the sources.
        row, match = found[0]
        layer = match.group(1) if match.groups() else ""
        transfers.append(Transfer(row, target, tuple(prefix + source.replace("*", layer) for source in row.sources)))
    if orphans:
        raise CheckpointError(
            f"parameters without exactly one row in checkpoint/tables.py: {', '.join(orphans)}; "
            "add a row, or remove the option in model.decoder.mcore that makes them"
        )
    return tuple(transfers)
