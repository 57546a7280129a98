"""Runs joined to a round: all records in order, and nothing that does not belong together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.cognition.records import Generation, Scores, read_records, write_records
from sicog_mcore.rollout.requests import Sampling
from tools.join_records import main

RECORD = Generation("", "caption", "", "", "", (), "engine", "checkpoint", Sampling(), 0)


def write_run(folder: Path, name: str, ids: str, scored: str = "") -> list[Path]:
    paths = [folder / f"{name}.jsonl", folder / f"{name}_scores.jsonl"]
    write_records(paths[0], [replace(RECORD, id=i) for i in ids])
    write_records(paths[1], [Scores(i, name) for i in scored or ids])
    return paths


def join(folder: Path, *runs: list[Path]) -> int:
    generations, scores = zip(*runs, strict=True)
    words = ["--generations", *generations, "--scores", *scores, "--out", folder / "round"]
    return main(list(map(str, words)))


def test_runs_stand_behind_each_other(tmp_path: Path) -> None:
    assert join(tmp_path, write_run(tmp_path, "x", "ab"), write_run(tmp_path, "y", "cd")) == 0
    assert [record.id for record in read_records(tmp_path / "round/generations.jsonl", Generation)] == list("abcd")
    found = [(record.id, record.scorer) for record in read_records(tmp_path / "round/scores.jsonl", Scores)]
    assert found == [("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")]


def test_one_run_is_a_round_too(tmp_path: Path) -> None:
    paths = write_run(tmp_path, "x", "ab")
    assert join(tmp_path, paths) == 0
    assert (tmp_path / "round/generations.jsonl").read_bytes() == paths[0].read_bytes()


def test_an_id_in_two_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert join(tmp_path, write_run(tmp_path, "x", "ab"), write_run(tmp_path, "y", "ca")) == 2
    assert "'a' twice" in capsys.readouterr().err
    assert not (tmp_path / "round/generations.jsonl").exists()


@pytest.mark.parametrize("scored", ["a", "ba", "abc"])
def test_scores_of_other_items_are_refused(tmp_path: Path, scored: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert join(tmp_path, write_run(tmp_path, "x", "ab", scored)) == 2
    assert "has other items than" in capsys.readouterr().err


def test_a_run_without_scores_is_a_mistake(tmp_path: Path) -> None:
    generations, scores = write_run(tmp_path, "x", "ab")
    words = ["--generations", generations, generations, "--scores", scores, "--out", tmp_path / "round"]
    with pytest.raises(SystemExit, match="2"):
        main(list(map(str, words)))
