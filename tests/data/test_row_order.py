"""Every row of an epoch stands in one window, in long runs of neighbours, and little memory says in which."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.data.row_order import RUNS_IN_BUFFER, RowOrder

MIB = 1 << 20

lengths = st.lists(st.integers(0, 40), max_size=12)


def borders(shard_rows: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.cumsum([0, *shard_rows], dtype=np.int64)


def windows(order: RowOrder) -> list[list[int]]:
    return [order.rows(window).tolist() for window in range(order.num_windows)]


@settings(deadline=None)
@given(lengths, st.integers(1, 60), st.integers(0, 20), st.integers(0, 3))
def test_every_row_stands_in_one_window(shard_rows: list[int], buffer_rows: int, step_rows: int, epoch: int) -> None:
    order = RowOrder(borders(shard_rows), buffer_rows, step_rows, 42, epoch)
    found = windows(order)
    assert sorted(row for window in found for row in window) == list(range(sum(shard_rows)))
    spans = [order.span(window) for window in range(order.num_windows)]
    assert [span.stop - span.start for span in spans] == [len(window) for window in found]
    assert [span.start for span in spans] == [0, *(span.stop for span in spans)][:-1]
    if step_rows:
        assert all(len(window) == step_rows for window in found[:-1])
    else:
        assert all(len(window) == buffer_rows for window in found[:-1])
        assert not found or len(found[-1]) <= max(1.5 * buffer_rows, buffer_rows + 1)


@settings(deadline=None)
@given(lengths, st.integers(1, 60), st.integers(1, 20))
def test_a_window_can_be_asked_for_alone_and_again(shard_rows: list[int], buffer_rows: int, step_rows: int) -> None:
    order = RowOrder(borders(shard_rows), buffer_rows, step_rows, 42, 1)
    found = windows(order)
    for window in reversed(range(order.num_windows)):
        assert order.rows(window).tolist() == found[window]
        assert RowOrder(borders(shard_rows), buffer_rows, step_rows, 42, 1).rows(window).tolist() == found[window]


def test_steps_cut_the_order_of_the_buffers() -> None:
    whole = windows(RowOrder(borders([50, 50]), 24, 0, 42, 0))
    steps = windows(RowOrder(borders([50, 50]), 25, 6, 42, 0))  # the buffer becomes 24, a multiple of 6
    assert [row for step in steps for row in step] == [row for window in whole for row in window]


def test_a_buffer_reads_whole_runs_of_neighbours() -> None:
    order = RowOrder(borders([10_000] * 20), 1600, 0, 42, 0)
    for window in range(order.num_windows):
        rows = np.sort(order.rows(window))
        runs = 1 + int((np.diff(rows) != 1).sum())
        assert runs <= RUNS_IN_BUFFER + 2  # two of them may be shared with the neighbours
        assert len(set((rows // 10_000).tolist())) >= 6  # from many shards, too


def test_short_shards_stay_whole() -> None:
    order = RowOrder(borders([5] * 64), 160, 0, 42, 0)
    rows = order.rows(0)
    assert len(rows) == 160 and np.array_equal(np.bincount(rows // 5, minlength=64) % 5, np.zeros(64))
    assert not np.array_equal(np.sort(rows), rows)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [RowOrder(borders([100] * 5), 64, 0, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    first = [order.rows(0).tolist() for order in orders]
    assert first[0] != first[1] != first[2] != first[0]


def test_no_window_draws_an_array_of_all_rows() -> None:
    shards = borders([4096] * 256)  # 1,048,576 rows; int64 of them are 8 MiB
    tracemalloc.start()
    order = RowOrder(shards, 8192, 0, 42, 0)
    made = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for window in (0, 1, 77, order.num_windows - 1):
        assert len(order.rows(window)) == 8192
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made < MIB / 4 and peak < MIB
