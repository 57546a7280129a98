"""Pairs as library steps: rows written, rows left out, and what is said of their keys."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sicog_mcore.commands.make_pairs import MadeRows, PairOptions, SpoilOptions, join_pairs, spoil
from tests.builders import write_dataset


def test_what_is_made_is_returned(tmp_path: Path) -> None:
    write_dataset(tmp_path, 5)  # the third has no image
    rows, images, said = tmp_path / "data.jsonl", tmp_path / "images", list[str]()
    spoiled = spoil(SpoilOptions(rows=rows, images=images, out=tmp_path / "s", kinds=("mask",)), said.append)
    assert spoiled == MadeRows(tmp_path / "s", 4, Counter(no_image=1))
    made = [json.loads(line) for line in (tmp_path / "s" / "rows.jsonl").read_text().splitlines()]
    assert [row["corruption"] for row in made] == [["mask"]] * 4
    rejected = tmp_path / "rejected.jsonl"
    rejected.write_text('{"id": "s1", "answer": "Wrong."}\n')
    options = PairOptions(rows=rows, images=images, rejected=rejected, out=tmp_path / "pairs.jsonl")
    assert join_pairs(options, said.append) == MadeRows(tmp_path / "pairs.jsonl", 1, Counter(no_answer=4))
    assert said == []


def test_keys_that_are_not_used_are_told(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"id": "a", "colour": 1, "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    rows.write_text(json.dumps(row) + "\n")
    said = list[str]()
    found = spoil(SpoilOptions(rows=rows, images=tmp_path, out=tmp_path / "s"), said.append)
    assert (found.rows, found.refused) == (0, Counter(no_image=1))
    assert said == [f"key 'colour' is not used: 1 row, first at {rows}:1"]


def test_a_file_of_another_kind_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"rows\.csv is no \.json or \.jsonl file"):
        spoil(SpoilOptions(rows=tmp_path / "rows.csv", images=tmp_path, out=tmp_path / "s"), print)
    assert not (tmp_path / "s" / "images").exists()
