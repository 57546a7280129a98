"""The files of a round are joined row by row, and files that do not belong together are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.cognition.records import write_records
from sicog_mcore.cognition.reporting.rounds import RoundSource, read_round
from sicog_mcore.errors import RecordError
from tests.rounds import make_item, write_round

ITEMS = [make_item("a", ["x y", "x z"]), make_item("b", []), make_item("c", ["u", "v"], reason="agreement")]


def test_items_come_back_in_their_order(tmp_path: Path) -> None:
    assert list(read_round(write_round(tmp_path, ITEMS))) == ITEMS


def test_parquet_files_are_found_too(tmp_path: Path) -> None:
    write_round(tmp_path, ITEMS)
    (tmp_path / "generations.jsonl").unlink()
    write_records(tmp_path / "generations.parquet", [item.generation for item in ITEMS])
    assert list(read_round(tmp_path)) == ITEMS


def test_sources_stand_one_after_the_other(tmp_path: Path) -> None:
    first, second = write_round(tmp_path / "1", ITEMS[:2]), write_round(tmp_path / "2", ITEMS[2:])
    both = write_round(tmp_path / "both", ITEMS)
    sources = [RoundSource(folder / "generations.jsonl", folder / "scores.jsonl") for folder in (first, second)]
    assert list(read_round(both, sources)) == ITEMS


def test_a_missing_row_is_found(tmp_path: Path) -> None:
    write_round(tmp_path, ITEMS)
    write_records(tmp_path / "scores.jsonl", [item.scores for item in ITEMS[:2]])
    with pytest.raises(RecordError, match="row 3"):
        list(read_round(tmp_path))


def test_other_ids_are_found(tmp_path: Path) -> None:
    write_round(tmp_path, ITEMS)
    write_records(tmp_path / "decisions.jsonl", [item.decision for item in reversed(ITEMS)])
    with pytest.raises(RecordError, match="row 1 is of 'a', 'a', 'c'"):
        list(read_round(tmp_path))


@pytest.mark.parametrize(("field", "index"), [("chosen", 2), ("rejected", -2)])
def test_a_decision_for_no_candidate_is_found(field: str, index: int, tmp_path: Path) -> None:
    write_round(tmp_path, [replace(ITEMS[0], decision=replace(ITEMS[0].decision, **{field: index}))])
    with pytest.raises(RecordError, match=f"candidate {index} of 2"):
        list(read_round(tmp_path))


def test_scores_of_another_number_of_candidates_are_found(tmp_path: Path) -> None:
    write_round(tmp_path, [replace(ITEMS[0], scores=replace(ITEMS[0].scores, clauses=("x y",)))])
    with pytest.raises(RecordError, match="2 candidates but scores"):
        list(read_round(tmp_path))


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"generations\.jsonl does not exist"):
        list(read_round(tmp_path))
