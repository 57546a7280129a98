from __future__ import annotations

import json
from pathlib import Path

import pytest

from sicog_mcore.data.quarantine import BadRows, Quarantine, Rejection


def rejection(number: int, reason: str = "image_truncated", epoch: int = 0) -> Rejection:
    return Rejection(f"s{number}", f"data.jsonl:{number}", reason, "97 bytes are missing", epoch)


def rejections(count: int) -> list[Rejection]:
    return [rejection(number) for number in range(1, count + 1)]


def first_stop(bad_rows: BadRows, num_rows: int, bad_in_window: list[int], window: int, epochs: int = 1) -> int | None:
    """Rows read when the verdict first says stop; None if it never does."""
    read = 0
    for epoch in range(epochs):
        for number, bad in enumerate(bad_in_window):
            bad_rows.enter(epoch, number, window, num_rows, rejections(bad))
            read += window
            if bad_rows.verdict():
                return read
            bad_rows.forget_before(epoch)
    return None


def test_every_line_has_id_origin_reason_detail_and_epoch(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "new" / "quarantine.jsonl", 0.5, 10)
    quarantine.record(rejection(1))
    quarantine.record(rejection(2, "too_long"))
    lines = [json.loads(line) for line in (tmp_path / "new" / "quarantine.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "id": "s1",
        "origin": "data.jsonl:1",
        "reason": "image_truncated",
        "detail": "97 bytes are missing",
        "epoch": 0,
    }
    assert dict(quarantine.reasons) == {"image_truncated": 1, "too_long": 1} and quarantine.num_bad == 2


@pytest.mark.parametrize(
    ("num_rows", "limit", "bad", "stops"),
    [
        (50, 0.01, 2, True),
        (50, 0.01, 1, True),  # 2 % of the set
        (60, 0.01, 59, True),
        (120, 0.01, 90, True),
        (60, 0.05, 3, False),
        (60, 0.05, 4, True),
        (100, 0.29, 29, False),  # 0.29 * 100 is less than 29 in floating point
        (100, 0.29, 30, True),
        (50, 0.0, 1, True),
        (50, 0.0, 0, False),
        (50, 1.0, 50, False),
        (1, 0.5, 1, True),
    ],
)
def test_a_small_set_is_judged_whole(num_rows: int, limit: float, bad: int, stops: bool) -> None:
    bad_rows = BadRows(limit, 10_000)
    assert (first_stop(bad_rows, num_rows, [bad], num_rows) is not None) == stops


def test_a_small_set_stops_as_soon_as_it_cannot_keep_the_limit() -> None:
    assert first_stop(BadRows(0.01, 10_000), 1_000, [4, 4, 4, 4, 4], 100) == 300  # 12 of at most 10


def test_the_same_bad_rows_in_every_pass_count_once_in_each() -> None:
    assert first_stop(BadRows(0.05, 10_000), 60, [1, 1, 0], 20, epochs=200) is None
    assert first_stop(BadRows(0.05, 10), 60, [1, 1, 0], 20, epochs=200) is None  # a large set, by its window
    assert first_stop(BadRows(0.01, 100), 1_000, [1] * 10, 100, epochs=200) is None  # exactly at the limit


@pytest.mark.parametrize("limit", [0.001, 0.01, 0.2, 0.5])
def test_a_stream_of_millions_that_is_all_bad_stops_early(limit: float) -> None:
    assert first_stop(BadRows(limit, 10_000), 10_000_000, [10] * 1_000, 10) in (10, 20, 30)


def test_a_large_set_stops_where_a_part_of_it_is_bad_though_the_whole_is_not_yet() -> None:
    good, bad = [1] * 100, [50] * 100  # of 512 each: 0.2 %, then 10 %
    stopped = first_stop(BadRows(0.01, 10_000), 10_000_000, good + bad, 512)
    assert stopped is not None and 100 * 512 < stopped < 106 * 512


def test_a_share_within_chance_of_the_limit_ends_no_run() -> None:
    assert first_stop(BadRows(0.01, 1_000), 1_000_000, [4, 6] * 1_000, 500) is None
    assert first_stop(BadRows(0.01, 1_000), 1_000_000, [9] + [0] * 99, 100) is None  # fewer than 10 prove nothing


def test_the_set_ends_the_run_at_the_end_of_the_pass_at_the_latest() -> None:
    stopped = first_stop(BadRows(0.01, 1_000), 10_000, [6] * 20, 500)  # 1.2 %
    assert stopped is not None and 8_000 < stopped < 9_000


def test_the_verdict_has_share_limit_window_reasons_and_first_places() -> None:
    bad_rows = BadRows(0.02, 100)
    bad_rows.enter(3, 0, 100, 1_000, [*rejections(15), *(rejection(90 + i, f"reason_{i}") for i in range(4))])
    first, *reasons = bad_rows.verdict().splitlines()
    assert first == (
        "19 of the last 100 rows are bad, a share of 0.19, in epoch 3; limit 0.02 (data.max_bad_rate), "
        "in a window of 100 rows (data.bad_window): chance explains 9"
    )
    assert reasons == [
        "  - 15 x image_truncated, first met at data.jsonl:1: 97 bytes are missing",
        "  - 1 x reason_0, first met at data.jsonl:90: 97 bytes are missing",
        "  - 1 x reason_1, first met at data.jsonl:91: 97 bytes are missing",
        "  - 1 x reason_2, 1 x reason_3",
    ]


def test_what_decoding_finds_counts_in_its_own_pass() -> None:
    bad_rows = BadRows(0.05, 10_000)
    for epoch in range(3):  # a step may reach over several passes of a small set
        bad_rows.enter(epoch, 0, 20, 20, [rejection(1)])
    assert bad_rows.verdict() == ""
    bad_rows.add(1, 0, rejection(2))
    assert bad_rows.verdict().startswith("2 of 20 rows are bad, a share of 0.1, in epoch 1")
    bad_rows.forget_before(2)
    assert bad_rows.verdict() == "" and [one["epoch"] for one in bad_rows.state()] == [2]


def test_a_restart_goes_on_counting_and_counts_nothing_twice() -> None:
    straight = restarted = BadRows(0.01, 1_000)
    for window in range(40):
        straight.enter(0, window, 500, 100_000, rejections(window % 3))
        restarted = BadRows(0.01, 1_000, json.loads(json.dumps(restarted.state())))  # after every window
        if window:
            restarted.enter(0, window, 500, 100_000, rejections(window % 3))
    assert restarted.state() == straight.state()
    assert (straight.state()[0]["seen"], straight.state()[0]["bad"]) == (20_000, 39)


def test_truncated_samples_are_counted_but_not_bad(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.0, 10)
    quarantine.count_truncated(3)
    assert (quarantine.num_truncated, quarantine.num_bad) == (3, 0)
    assert not (tmp_path / "quarantine.jsonl").exists()
