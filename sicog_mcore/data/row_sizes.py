"""Row sizes are the few numbers that planning knows of every row, so that no row is read to plan.

In: the index of the data sets   Out: RowSizes   Next: plan.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

USABLE = 0

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class RowSizes:
    """One entry per row of all data sets, in their order; the arrays may be memory-mapped.

    Attributes:
        num_tokens: int32 [rows]; length of the sample's token stream, visual tokens and all its answers included.
        num_slices: int32 [rows]; image slices that the vision tower encodes.
        attention: int64 [rows]; sum of the squared lengths of the sample's segments, which attention's cost grows with.
        reason: uint8 [rows]; USABLE, or the position in ``reasons`` of why the row cannot be used. The other numbers of
            such a row are 0.
        is_truncated: bool [rows]; whether the end of the answer is cut off.
        shards: int64 [shards + 1]; the rows of shard i are ``shards[i]`` to ``shards[i + 1] - 1``. A shard is a tar file,
            or a block of consecutive rows of a large file: what is read in one go. The order of an epoch depends on
            them, so they are a function of the files alone, whenever and in whatever parts these were indexed.
        reasons: reason codes; the first one, of usable rows, is empty.
    """

    num_tokens: NDArray[np.int32]
    num_slices: NDArray[np.int32]
    attention: NDArray[np.int64]
    reason: NDArray[np.uint8]
    is_truncated: NDArray[np.bool_]
    shards: NDArray[np.int64]
    reasons: tuple[str, ...] = ("",)

    def __len__(self) -> int:
        return len(self.num_tokens)

    def first(self, rows: int) -> RowSizes:
        """Gives the sizes of the first rows alone; a shard that they end in is cut."""
        borders = self.shards[self.shards < rows]
        return RowSizes(
            num_tokens=self.num_tokens[:rows],
            num_slices=self.num_slices[:rows],
            attention=self.attention[:rows],
            reason=self.reason[:rows],
            is_truncated=self.is_truncated[:rows],
            shards=np.append(borders, rows).astype(np.int64),
            reasons=self.reasons,
        )
