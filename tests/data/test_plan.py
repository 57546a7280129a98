"""A plan is made of numbers alone: which rows, in which packs, and nothing is read for it."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_mcore.config import DataConfig
from sicog_mcore.data.plan import PackPlan, WindowPlanner
from sicog_mcore.data.quarantine import Rejection
from sicog_mcore.data.resume import EpochRows, LoaderState, open_rows
from sicog_mcore.data.stream_bench import SizedRows, draw_sizes
from tests.builders import tiny_experiment, write_dataset

DATA = DataConfig(token_budget=8192, slice_budget=64, window_samples=512)
BAD_EVERY = 7
MIB = 1 << 20


class RowsWithFaults(SizedRows):
    """Every seventh row is bad."""

    def rejection(self, row: int, epoch: int) -> Rejection:
        assert row % BAD_EVERY == 0
        return Rejection(f"s{row}", f"file:{row}", "too_long", "x", epoch)


def planner_of(rows: int, data: DataConfig = DATA, step_rows: int = 0, mix: str = "sft") -> WindowPlanner:
    sizes = draw_sizes(mix, rows, seed=3)
    sizes.reason[::BAD_EVERY] = 1
    rows_of = EpochRows(RowsWithFaults(rows), all_sizes=replace(sizes, reasons=("", "too_long")))
    return WindowPlanner(rows_of, data, 42, step_rows)


def stream(planner: WindowPlanner, state: LoaderState, epochs: int) -> list[PackPlan]:
    """All packs from a position to the end of an epoch."""
    packs = []
    while state.epoch < epochs:
        window = planner.plan(state.epoch, state.window)
        packs += window.packs[state.pack :]
        state = LoaderState(*planner.next_window(state.epoch, state.window))
    return packs


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3000), st.sampled_from((64, 512, 5000)), st.sampled_from((0, 48)), st.sampled_from((4096, 8192)))
def test_every_usable_row_once_an_epoch_and_no_budget_exceeded(
    rows: int, buffer: int, step_rows: int, budget: int
) -> None:
    data = replace(DATA, window_samples=buffer, token_budget=budget)
    planner = planner_of(rows, data, step_rows, mix="recap")
    sizes = draw_sizes("recap", rows, seed=3)
    for epoch in (0, 1):
        plans = [planner.plan(epoch, window) for window in range(planner.num_windows(epoch))]
        members = [row for plan in plans for pack in plan.packs for row in pack.members]
        rejected = [row for plan in plans for row in plan.rejected]
        assert sorted(members) == [row for row in range(rows) if row % BAD_EVERY]
        assert sorted(rejected) == list(range(0, rows, BAD_EVERY))
        assert sum(plan.num_rows for plan in plans) == rows and plans[-1].rows_after == 0
        for pack in (pack for plan in plans for pack in plan.packs):
            chosen = list(pack.members)
            assert pack.num_tokens == sizes.num_tokens[chosen].sum() <= budget
            assert pack.num_slices == sizes.num_slices[chosen].sum() <= data.slice_budget
            assert pack.attention == sizes.attention[chosen].sum()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 400), st.sampled_from((0, 50)))
def test_any_position_gives_the_same_rest(number: int, step_rows: int) -> None:
    whole = stream(planner_of(1500, step_rows=step_rows), LoaderState(), epochs=2)
    at = number % len(whole)
    planner = planner_of(1500, step_rows=step_rows)
    num_packs = len(planner.plan(whole[at].epoch, whole[at].window).packs)
    rest = stream(planner, planner.after(whole[at], num_packs), epochs=2)
    assert rest == whole[at + 1 :]


def test_rejections_say_what_and_where() -> None:
    rejected = planner_of(20).plan(3, 0).rejected
    assert set(rejected) == {0, 7, 14}
    assert (rejected[7].id, rejected[7].origin, rejected[7].reason, rejected[7].epoch) == (
        "s7",
        "file:7",
        "too_long",
        3,
    )


def test_planning_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, 30)
    experiment = tiny_experiment(tmp_path, data={"window_samples": 8})
    planner = WindowPlanner(open_rows(experiment).rows, experiment.data, 42)

    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"{args[0]} was opened")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("os.open", refuse)
    ids = [row for window in range(4) for pack in planner.plan(0, window).packs for row in pack.members]
    assert sorted(ids) == list(range(30))


def test_a_window_of_a_million_rows_takes_no_memory_of_that_size() -> None:
    rows = 1 << 20
    planner = planner_of(rows, replace(DATA, window_samples=8192), mix="recap")
    planner.num_windows(0)
    tracemalloc.start()
    started = time.thread_time()
    for window in (0, 100):
        planner.plan(0, window)
    seconds = time.thread_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * MIB  # mostly 1200 rejections and tables of offers; a permutation alone would be 8 MiB more
    assert seconds < 2.0


def test_the_packs_of_a_window_stand_in_random_order() -> None:
    planner = planner_of(4000, replace(DATA, window_samples=4000))
    packs = planner.plan(0, 0).packs
    assert [pack.pack for pack in packs] == list(range(len(packs)))
    slices = np.array([pack.num_slices for pack in packs], float)
    assert abs(np.corrcoef(slices[:-1], slices[1:])[0, 1]) < 0.2
    assert planner.plan(1, 0).packs[0].members != packs[0].members
