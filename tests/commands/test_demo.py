"""The demonstration from this package alone: its data is made once, and two processes train the recipe on it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.commands import demo
from sicog_mcore.commands.demo import VERB, available_pictures, make_loop_data
from sicog_mcore.commands.demo_data import DemoDataOptions, prepare_demo_data
from sicog_mcore.errors import ConfigError


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, in an environment without the packages that bring pictures."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "easy_vqa" else find_spec(name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_data_of_the_package_alone(alone: Path) -> None:
    assert available_pictures() == "own"
    made = prepare_demo_data(DemoDataOptions(out=alone / "demo", vqa_images=12, pictures="own"))
    assert made.contents.startswith("57 rows: 33 on 11 photographs, 12 on shapes, 12 without an image")
    assert prepare_demo_data(DemoDataOptions(out=alone / "demo", vqa_images=12, pictures="own")).contents == ""


def test_the_demo_trains_its_recipe_on_two_processes(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def run(words: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[Any]:
        started.append((words, env))
        return subprocess.CompletedProcess(words, -15)

    monkeypatch.setattr(demo.subprocess, "run", run)
    assert VERB.start(["--steps", "3"], {"RANK": "7", "A": "b"}) == 128 + 15
    ((words, environment),) = started
    assert words[:2] == [sys.executable, "-m"] and words[4:6] == ["--nproc-per-node", "2"]
    assert words[6:] == ["-m", "sicog_mcore", "pretrain", "--config", "demo", "train.steps=3"]
    assert environment["A"] == "b" and "RANK" not in environment and environment["PYTHONSAFEPATH"] == "1"
    assert (alone / "data/demo/train.jsonl").is_file()


def test_the_data_of_the_loop_is_made_once_and_spares_what_is_not_its_own(alone: Path) -> None:
    assert make_loop_data().startswith("data/loop_demo: 995 rows")
    assert make_loop_data() == ""
    (alone / "data/loop_demo/tokenizer.json").unlink()
    (alone / "data/loop_demo/README.md").unlink()
    with pytest.raises(ConfigError, match="is not this data"):
        make_loop_data()
