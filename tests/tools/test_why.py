"""From a row back to everything it was made from; what is printed is data, never markup or a command to the terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.cognition.curation.curated_round import curate
from sicog_mcore.commands.why import CONSUMED, consumed_steps
from sicog_mcore.train.feed import CONSUMED as WRITTEN
from tests.curation import Said, curation, failed, item, write_round
from tools.why import main

SAID = (
    Said("cod", "A red cup.", 0.9),
    Said("cod", "A [bold]dog[/bold]\x1b[31m.", 0.2),
    Said("caption", "A cup.", 0.85),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = [item(tmp_path, "shelf/7", SAID), item(tmp_path, "low", [Said("caption", "A cup.", 0.3)], 1), failed("gone")]
    folder = write_round(tmp_path, made)
    curate(curation(tmp_path, [folder], forms=("chain", "plain")), folder)
    return folder


def steps(run: Path, rank: int, *entries: tuple[int, list[str]]) -> None:
    run.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "ids": ids}) for step, ids in entries]
    (run / f"consumed-{rank}.jsonl").write_text("\n".join(lines) + "\n")


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Joins the printed text into one line."""
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.mark.parametrize("wanted", ["shelf/7#chain", "shelf/7#plain", "shelf/7#pair", "shelf/7"])
def test_a_row_leads_back_to_image_prompts_candidates_scores_and_decision(
    wanted: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([wanted, "--round", str(folder), "--images", str(tmp_path / "images")]) == 0
    shown = told(capsys)
    for part in (
        "shelf/7 (caption)",
        "i0.png, hash ",
        ", unchanged",
        "native-1, checkpoint c0ffee",
        "temperature 0.7, top_p 0.9, top_k 0, max_new_tokens 1200, seed 3",
        "prompt cod@1, 2 candidates",
        "Look closely and describe this image in five numbered steps",
        "0 CHOSEN | cod #0, seed 0 | 20 tokens, stop | log-prob -10.00 (-0.500 per token) | score 0.9000 by hand",
        "1 REJECTED | cod #1, seed 7",
        "2 | caption #2, seed 14",
        "similarity by hand",
        "0 * │ 0.900",
        "decision kept: score 0.9000 by hand",
        "rows shelf/7#chain, shelf/7#plain, shelf/7#pair",
    ):
        assert part in shown, part


def test_texts_are_shown_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shelf/7", "--round", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "A [bold]dog[/bold]\\x1b[31m." in shown and "\x1b" not in shown
    assert "(give --images to compare)" in shown


@pytest.mark.parametrize(("wanted", "reason"), [("low", "below_threshold: 0.3000"), ("gone", "image_missing: no file")])
def test_a_dropped_item_says_why(wanted: str, reason: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([wanted, "--round", str(folder)]) == 0
    shown = told(capsys)
    assert f"decision {reason}" in shown and "rows none" in shown


def test_a_changed_or_missing_image_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["shelf/7", "--round", str(folder), "--images", str(tmp_path / "images")]
    (tmp_path / "images/i0.png").write_bytes(b"other")
    assert main(arguments) == 0
    assert "CHANGED, now " in told(capsys)
    (tmp_path / "images/i0.png").unlink()
    assert main(arguments) == 0
    assert "cannot be read: No such file" in told(capsys)


def test_the_steps_that_consumed_a_row_come_from_all_ranks_and_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    steps(one, 0, (1, ["x", "shelf/7#chain"]), (9, ["shelf/7#plain"]))
    steps(one, 1, (2, ["shelf/7"]), (5, ["shelf/7#chain", "shelf/7#chain"]))
    with (one / "consumed-1.jsonl").open("a") as file:
        file.write('{"step": 6, "ids": ["shelf/7#ch')  # the run was killed here
    steps(two, 0, (3, ["y"]))
    assert consumed_steps(one, ["shelf/7#chain", "shelf/7#plain"]) == {"shelf/7#chain": [1, 5], "shelf/7#plain": [9]}
    assert main(["shelf/7", "--round", str(folder), "--run", str(one), str(two)]) == 0
    shown = told(capsys)
    assert "shelf/7#chain │ 1, 5" in shown and "shelf/7#plain │ 9" in shown and "shelf/7#pair │ never" in shown
    assert f"consumed by {two}" in shown
    assert CONSUMED == WRITTEN.format("*")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shelf/8#chain", "--round", "{round}"], "the nearest are 'shelf/7#chain', "),
        (["t1#text", "--round", "{round}"], "was not generated"),
        (["low", "--round", "{images}"], "decisions.jsonl does not exist"),
        (["low", "--round", "{round}", "--run", "{images}"], "has no consumed-*.jsonl"),
        (["low", "--round", "{round}", "--generations", "{other}"], "name its file with --generations"),
    ],
)
def test_what_is_not_known_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_round(tmp_path, [item(tmp_path, "z", SAID)], "other") / "generations.jsonl"
    names = {"round": folder, "images": tmp_path / "images", "other": other}
    assert main([argument.format(**names) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("why: ") and message in shown.err and shown.out == ""


def test_a_prompt_of_another_version_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = item(tmp_path, "shelf/7", SAID)
    uses = tuple(replace(use, version=9) for use in made.generation.prompts)
    old = write_round(tmp_path, [replace(made, generation=replace(made.generation, prompts=uses))], "old")
    assert main(["shelf/7", "--round", str(folder), "--generations", str(old / "generations.jsonl")]) == 0
    assert "its wording is not known here: this program has version 1" in told(capsys)
