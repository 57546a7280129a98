"""Records survive a file bit for bit, and a damaged file is named by its line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.cognition.records import (
    Candidate,
    Decision,
    Generation,
    PromptUse,
    Scores,
    from_json,
    read_by_id,
    read_records,
    to_json,
    write_records,
)
from sicog_mcore.errors import RecordError
from sicog_mcore.rollout.requests import Sampling

GENERATION = Generation(
    *("a/1", "caption", "images/ä.png", "00ff", "What?\nNow.", (PromptUse("cod", 1, 2),), "native-1", "c0ffee"),
    *(Sampling(), 7, (31,), (Candidate("cod", 0, 5, "Step 1: \u2028 red", 9, -3.25, "stop"),)),
)
SCORES = Scores("a/1", "tfidf", ("red", None), ((1.0, 0.5), (0.5, 1.0)), (0.75, 0.75), 0, 0.75)
DECISION = Decision("a/1", True, "kept", chosen=0, rejected=1, rows=("a/1#caption",))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("record", [GENERATION, SCORES, DECISION], ids=lambda record: type(record).__name__)
def test_a_record_comes_back_equal(record: Generation | Scores | Decision, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    assert write_records(file, [record, replace(record, id="b")]) == 2
    assert list(read_records(file, type(record))) == [record, replace(record, id="b")]
    assert read_by_id(file, type(record))["a/1"] == record


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 0}, "found format 0, expected 1"),
        ({"seed": "7"}, "seed: found '7'"),
        ({"seed": True}, "seed: found True"),
        ({"task": "poem"}, "task: found 'poem'"),
        ({"candidates": [{}]}, "candidates[0].prompt: found None (is missing)"),
        ({"more": 1}, "more: found 1 (no such field)"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(change: dict[str, object], named: str) -> None:
    line = json.dumps(json.loads(to_json(GENERATION)) | change)
    with pytest.raises(RecordError) as error:
        from_json(line, Generation, "g.jsonl:3")
    assert str(error.value).startswith("g.jsonl:3: ") and named in str(error.value)


def test_a_cut_line_a_missing_file_and_a_double_id_are_told(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(RecordError, match="does not exist; run the step"):
        list(read_records(file, Scores))
    file.write_text(to_json(SCORES) + "\n" + to_json(SCORES)[:30])
    with pytest.raises(RecordError, match=r"rows\.jsonl:2: not JSON"):
        list(read_records(file, Scores))
    write_records(file, [SCORES, SCORES])
    with pytest.raises(RecordError, match=r"rows\.jsonl:2: 'a/1' occurs twice"):
        read_by_id(file, Scores)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_records(file, [SCORES])
    with pytest.raises(ValueError):
        write_records(file, [replace(SCORES, agreement=float("nan"))])
    assert list(read_records(file, Scores)) == [SCORES]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"agreement":0.75', '"agreement":NaN', "found NaN, expected a finite number"),
        ('"agreement":0.75', '"agreement":-Infinity', "found -Infinity"),
        ('"agreement":0.75', '"agreement":0.75,"agreement":0.9', "'agreement' occurs twice"),
    ],
)
def test_a_number_that_is_none_or_a_name_that_occurs_twice_is_refused(old: str, new: str, named: str) -> None:
    line = to_json(SCORES)
    assert old in line and from_json(line, Scores, "s.jsonl:1") == SCORES
    with pytest.raises(RecordError, match="s.jsonl:1: not JSON") as caught:
        from_json(line.replace(old, new), Scores, "s.jsonl:1")
    assert named in str(caught.value)
