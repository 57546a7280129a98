"""The loop as a verb: its recipe plans itself in an empty folder, and its steps run this very package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sicog_mcore.cognition.loop.steps import WorkflowStep
from sicog_mcore.cognition.step_options import TrainingOptions
from sicog_mcore.commands.loop import VERB, step_environment, step_words

ROOT = Path(__file__).parents[2]


def test_the_recipe_is_planned_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert VERB.start(["--config", "loop_demo", "--plan", "--nproc", "2"], {}) == 0
    shown = capsys.readouterr()
    assert "20 steps: 20 will run" in shown.out and shown.err.startswith("data/loop_demo: ")
    commands = [line for line in shown.out.splitlines() if line.startswith(sys.executable)]
    assert len(commands) == 20
    assert (
        sum("-m torch.distributed.run --standalone --nproc-per-node 2 -m sicog_mcore" in line for line in commands)
        == 11
    )
    assert "-u -m sicog_mcore score --generations" in "".join(commands)
    assert VERB.start(["--config", "loop_demo", "--plan"], {}) == 0
    assert capsys.readouterr().err == ""  # the data is there


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--config", "gone.yaml"], "gone.yaml"), (["--config", "x", "--nproc", "0"], "--nproc 0: expected 1 or more")],
)
def test_mistakes_end_with_two(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = VERB.start(words, {})
    except SystemExit as end:
        code = end.code
    assert code == 2 and message in capsys.readouterr().err


def test_steps_are_words_of_the_one_command() -> None:
    options = TrainingOptions(config=("a.yaml", "b.yaml"), values={"train.steps": 3, "output": "runs/x", "on": True})
    step = WorkflowStep(name="x", verb=("warmup", "perception"), options=options, outputs=())
    files = ["--config", "a.yaml", "--config", "b.yaml"]
    start = ["-m", "sicog_mcore", "warmup", "perception"]
    assert step_words(step) == [*start, *files, "train.steps=3", "output=runs/x", "on=true"]


def test_steps_run_this_package_and_import_nothing_of_the_current_folder() -> None:
    found = step_environment({"RANK": "3", "PYTHONPATH": "/x", "A": "b"})
    assert found == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "A": "b",
        "PYTHONPATH": os.pathsep.join([str(ROOT), "/x"]),
        "PYTHONSAFEPATH": "1",
    }
