"""The order in which an epoch takes its rows: shuffled in two levels, so that files are read in long runs.

In: RowSizes.shards, seed   Out: the rows of each buffer, of each window   Next: plan.py
Shards are cut into runs of neighbouring rows and the runs are shuffled; as many as fill a buffer are gathered, and the rows
of a buffer are shuffled. Memory grows with the runs of an epoch and the rows of one buffer: no permutation of all rows is
ever drawn. All is a function of the shards, the seed and the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sicog_mcore.data.row_sizes import Integers

# What numbers are drawn for: the third part of their key, never 0, because trailing zeros of a key do not count.
RUNS, ROWS, PACKS = 1, 2, 3
RUNS_IN_BUFFER = 16  # at least: a file that is sorted by topic must not fill a buffer alone


def random_numbers(seed: int, *key: int) -> np.random.Generator:
    """Numbers that are a function of seed and key alone."""
    return np.random.Generator(np.random.PCG64([seed, *key]))


@dataclass(frozen=True)
class WindowSpan:
    """Where a window stands in an epoch.

    Attributes:
        start: number of rows before it.
        stop: number of rows before the next one.
    """

    start: int
    stop: int


class RowOrder:
    """The rows of one epoch in the order that they are taken in, window by window.

    Without ``step_rows`` a window is a buffer; with it, the next ``step_rows`` rows, which never span two buffers.

    Args:
        shards: int64 [shards + 1]; borders, see RowSizes.
        buffer_rows: rows that are shuffled together; the last buffer has between half and one and a half of these.
        step_rows: rows of a window; 0 for a whole buffer.
        seed: of the run.
        epoch: pass over the data.
    """

    def __init__(self, shards: Integers, buffer_rows: int, step_rows: int, seed: int, epoch: int) -> None:
        self.num_rows = int(shards[-1]) if len(shards) else 0
        if step_rows:
            buffer_rows = max(1, buffer_rows // step_rows) * step_rows
        self._key = (seed, epoch)
        self._buffer_rows = buffer_rows
        self._step_rows = step_rows
        # A short rest joins the buffer before it: few rows are hard to pack.
        self._num_buffers = max(1, (self.num_rows + buffer_rows // 2) // buffer_rows) if self.num_rows else 0
        starts, lengths = _cut_runs(shards, max(1, buffer_rows // RUNS_IN_BUFFER))
        order = random_numbers(*self._key, RUNS).permutation(len(starts))
        self._starts = starts[order]
        self._borders = np.append(0, np.cumsum(lengths[order]))  # rows before each run, in the order they are taken in
        self._gathered: tuple[int, Integers] = (-1, np.empty(0, np.int64))

    @property
    def num_windows(self) -> int:
        """Windows of the epoch."""
        return -(-self.num_rows // self._step_rows) if self._step_rows else self._num_buffers

    def span(self, window: int) -> WindowSpan:
        """Where a window stands."""
        if self._step_rows:
            start = window * self._step_rows
            return WindowSpan(start, min(start + self._step_rows, self.num_rows))
        return self._buffer_span(window)

    def rows(self, window: int) -> Integers:
        """int64 [rows of the window]: its rows, in the order that they are taken in."""
        if not self._step_rows:
            return self._gather(window)
        span = self.span(window)
        buffer = min(span.start // self._buffer_rows, self._num_buffers - 1)
        if self._gathered[0] != buffer:
            self._gathered = (buffer, self._gather(buffer))
        first = self._buffer_span(buffer).start
        return self._gathered[1][span.start - first : span.stop - first]

    def _buffer_span(self, buffer: int) -> WindowSpan:
        is_last = buffer == self._num_buffers - 1
        start = buffer * self._buffer_rows
        return WindowSpan(start, self.num_rows if is_last else start + self._buffer_rows)

    def _gather(self, buffer: int) -> Integers:
        """The rows of a buffer, shuffled."""
        span = self._buffer_span(buffer)
        first = int(np.searchsorted(self._borders, span.start, side="right")) - 1
        last = int(np.searchsorted(self._borders, span.stop, side="left"))
        # The first and the last run may belong to two buffers: each takes its part.
        begins = np.maximum(self._borders[first:last], span.start)
        ends = np.minimum(self._borders[first + 1 : last + 1], span.stop)
        shift = self._starts[first:last] - self._borders[first:last]
        rows = np.arange(span.start, span.stop) + np.repeat(shift, ends - begins)
        return random_numbers(*self._key, ROWS, buffer).permutation(rows)


def _cut_runs(shards: Integers, longest: int) -> tuple[Integers, Integers]:
    """Cuts every shard into runs of ``longest`` rows and a shorter rest.

    Returns:
        int64 [runs] each: first rows and numbers of rows.
    """
    lengths = np.diff(shards)
    pieces = -(-lengths // longest)
    within = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(shards[:-1], pieces) + within * longest
    return starts, np.minimum(np.repeat(shards[1:], pieces) - starts, longest)
