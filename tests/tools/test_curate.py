"""The command: its table and its one line, its exit codes, and options that reach curation as they are meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sicog_mcore.cognition.curation.filters import PerPrompt
from sicog_mcore.cognition.curation.selection import CandidateSource, ScoreFile
from sicog_mcore.cognition.step_options import CurateOptions
from sicog_mcore.commands.curate import curation_of
from sicog_mcore.commands.parser import read_options
from sicog_mcore.errors import ConfigError
from tests.curation import Said, item, write_round
from tools.curate import main


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    scores = {"a": 0.95, "b": 0.9, "c": 0.7}
    made = [
        item(tmp_path, name, [Said("cod", "A red cup.", score), Said("cod", "A dog.", 0.2)], image)
        for image, (name, score) in enumerate(scores.items())
    ]
    return ["--round", str(write_round(tmp_path, made)), "--images", str(tmp_path / "images")]


def test_the_funnel_is_shown_and_one_line_says_what_was_written(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--tau", "0.5", "cod=0.8", "--forms", "chain", "turns"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    cells = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in shown.out.splitlines()]
    assert ["in", "", "3", "0", "3", "3"] in cells
    assert ["score", "below_threshold", "-1", "", "-1", "2"] in cells
    assert ["kept", "66.7% agreed", "2", "0", "2"] in cells
    line = shown.out.splitlines()[-1]
    assert line == f"{tmp_path / 'round' / 'curated'}: 4 rows (2 chain, 2 turns); pairs: 2 written"
    assert json.loads((tmp_path / "round/funnel.json").read_text())["settings"]["forms"] == ["chain", "turns"]


def test_a_starving_funnel_shows_its_table_and_ends_with_17(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--tau", "0.99"]) == 17
    shown = capsys.readouterr()
    assert "below_threshold" in shown.out
    assert shown.err.startswith("curate: 0 rows are left, at least 1 expected; nothing was written")
    assert sorted(path.name for path in (tmp_path / "round").iterdir()) == ["generations.jsonl", "scores.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "neither is given"),
        (["--tau", "0.8", "--source", "g.jsonl", "s.jsonl", "0.8"], "both are given"),
        (["--source", "g.jsonl"], "has no scores"),
        (["--source", "g.jsonl", "s.jsonl"], "--source"),
        (["--tau", "high"], "--tau"),
        (["--tau", "0.8", "poem=0.9"], "'poem'"),
        (["--tau", "0.8", "--mix", "poem=1"], "--mix"),
        (["--tau", "0.8", "--mix", "caption"], "--mix"),
        (["--tau", "0.8", "--min-share", "2"], "--min-share"),
        (["--tau", "0.8", "--text", "nowhere.jsonl"], "does not exist"),
        (["--tau", "0.8", "--evaluation", "nowhere"], "--evaluation"),
        (["--source", "gone.jsonl", "s.jsonl", "0.8"], "gone.jsonl"),
    ],
)
def test_wrong_options_are_one_message_and_exit_code_2(
    options: list[str], message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("curate: ") and message in shown.err and shown.out == ""
    assert not (tmp_path / "round/funnel.json").exists()


def test_a_source_may_have_several_scorers_with_thresholds_of_their_own(arguments: list[str]) -> None:
    values = ["a.jsonl", "s.jsonl", "0.85", "cod=0.9", "votes.jsonl", "0.6"]
    options = read_options(
        CurateOptions, [*arguments, "--source", *values, "--source", "b.jsonl", "t.jsonl", "0.7", "--mix", "text=0.5"]
    )
    curation = curation_of(options)
    first = (
        ScoreFile(Path("s.jsonl"), PerPrompt(0.85, (("cod", 0.9),))),
        ScoreFile(Path("votes.jsonl"), PerPrompt(0.6)),
    )
    second = (ScoreFile(Path("t.jsonl"), PerPrompt(0.7)),)
    assert curation.sources == (CandidateSource(Path("a.jsonl"), first), CandidateSource(Path("b.jsonl"), second))
    assert curation.mix == (("text", 0.5),)
    with pytest.raises(ConfigError):
        curation_of(read_options(CurateOptions, [*arguments, "--source", "a.jsonl", "s.jsonl", "cod=0.9"]))


def test_what_is_not_given_is_as_curation_has_it(arguments: list[str], tmp_path: Path) -> None:
    from sicog_mcore.cognition.curation.selection import Curation

    given = curation_of(read_options(CurateOptions, [*arguments, "--tau", "0.8"]))
    assert given == Curation(sources=given.sources, images=tmp_path / "images")
