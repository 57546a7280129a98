"""A command that makes nothing of its input says so, and does not end like one that did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sicog_mcore.cognition.records import write_records
from tests.builders import write_image
from tests.curation import failed, write_round
from tools import evaluate, join_records, make_pairs, report, score


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Items of which none was answered, and rows of which none can be used."""
    write_round(tmp_path, [failed("a"), failed("b", "no_image")])
    write_records(tmp_path / "none.jsonl", [])
    write_image(tmp_path / "images" / "a.png", 8, 8, seed=0)
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"id": n, "question": "q", "answer": "a"}) + "\n" for n in "ab")
    )
    row = {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "rejected.jsonl").write_text('{"id": "other", "answer": "b"}\n')
    return tmp_path


def ended(main: object, words: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of a command."""
    code = main([str(word) for word in words])  # type: ignore[operator]
    return code, capsys.readouterr().err


def test_scoring_items_without_an_answer(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--generations", work / "round" / "generations.jsonl", "--out", work / "s.jsonl", "--scorer", "vote"]
    code, message = ended(score.main, words, capsys)
    assert code == 17 and message.startswith(f"score: {work}/s.jsonl: 0 of 2 items were scored; ")
    assert len((work / "s.jsonl").read_text().splitlines()) == 2  # each with its reason
    assert ended(score.main, [*words[:1], work / "none.jsonl", *words[2:]], capsys)[0] == 17


def test_joining_no_items(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--generations", work / "none.jsonl", "--scores", work / "none.jsonl", "--out", work / "out"]
    assert ended(join_records.main, words, capsys) == (17, "join_records: the files hold no items; generate first\n")
    assert not (work / "out").exists()


@pytest.mark.parametrize("command", ["corrupt", "join"])
def test_pairs_of_which_none_can_be_made(command: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [command, "--rows", work / "rows.jsonl", "--images", work / "images", "--out", work / "out"]
    more = ["--rejected", work / "rejected.jsonl"] if command == "join" else []
    code, message = ended(make_pairs.main, [*words, *more], capsys)
    assert code == 17 and message == "make_pairs: no row could be made; correct what they were left out for\n"


def test_judging_answers_that_are_not_there(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generations = work / "round" / "generations.jsonl"
    asked = [
        json.loads(line) | {"prompts": [{"id": "direct", "version": 1, "count": 1}], "task": "answer"}
        for line in generations.open()
    ]
    generations.write_text("".join(json.dumps(record) + "\n" for record in asked))
    words = ["score", "--benchmark", work / "asked.jsonl", "--generations", generations, "--out", work / "out"]
    code, message = ended(evaluate.main, words, capsys)
    assert code == 17 and "0 of 2 items have an answer to judge (1 x image_missing, 1 x no_image)" in message
    assert json.loads((work / "out" / "results.json").read_text())["failures"] == {"image_missing": 1, "no_image": 1}


def test_a_report_of_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = ended(
        report.main, ["--round", work / "round", "--images", work / "images", "--preset", "tiny"], capsys
    )
    assert code == 2 and "decisions.jsonl does not exist" in message
