from __future__ import annotations

import json
from pathlib import Path

import pytest

from sicog_mcore.data.quarantine import Quarantine, Rejection
from sicog_mcore.errors import EXIT_GIVE_UP, DataError


def rejection(number: int, reason: str = "image_truncated") -> Rejection:
    return Rejection(f"s{number}", f"data.jsonl:{number}", reason, "97 bytes are missing", 0)


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


def test_run_stops_when_the_window_holds_too_many(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.02, 100)
    quarantine.accept(50)
    quarantine.record(rejection(1))
    quarantine.record(rejection(2, "too_long"))
    with pytest.raises(DataError) as caught:
        quarantine.record(rejection(3))
    message = str(caught.value)
    assert message.startswith("3 of the last 53 samples are bad, at most 2 of 100 are allowed")
    assert "2 x image_truncated, for example data.jsonl:3" in message and "1 x too_long" in message
    assert str(tmp_path / "quarantine.jsonl") in message and "data.max_bad_rate" in message
    assert caught.value.exit_code == EXIT_GIVE_UP
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3


def test_old_bad_samples_leave_the_window(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.1, 10)
    for number in range(5):
        quarantine.record(rejection(number))
        quarantine.accept(9)
    assert quarantine.num_bad == 5


def test_truncated_samples_are_counted_but_not_bad(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.0, 10)
    quarantine.count_truncated(3)
    assert (quarantine.num_truncated, quarantine.num_bad) == (3, 0)
    assert not (tmp_path / "quarantine.jsonl").exists()
