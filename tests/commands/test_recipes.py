"""Recipes: the package's are those of examples/, a name finds each, and a copy spares what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sicog_mcore.cli import load_experiment
from sicog_mcore.commands.recipes import VERB, list_recipes
from sicog_mcore.recipes import find_recipe, recipe_names, resolve

ROOT = Path(__file__).parents[2]


def test_the_package_holds_every_example_as_it_is() -> None:
    examples = {path.stem: path.read_bytes() for path in (ROOT / "examples").glob("*.yaml")}
    packaged = {path.stem: path.read_bytes() for path in (ROOT / "sicog_mcore/recipes").glob("*.yaml")}
    assert packaged == examples and len(examples) >= 12
    assert recipe_names() == tuple(sorted(examples))


def test_a_name_is_a_configuration_where_no_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_experiment(["--config", "demo"], 2).train.steps == 60
    assert resolve("demo.yaml") == resolve("demo") == str(find_recipe("demo"))
    (tmp_path / "demo").mkdir()
    assert resolve("demo") == str(find_recipe("demo"))  # a folder is no configuration
    (tmp_path / "demo").rmdir()
    Path("demo").write_text("preset: tiny\ntrain: {steps: 3}\n")
    assert load_experiment(["--config", "demo"], 1).train.steps == 3
    assert resolve("none") == "none"


def test_recipes_are_listed_with_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert VERB.start(["list"], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipe_names())
    assert all(len(text) > 20 for text in list_recipes().values())


def test_a_recipe_is_shown_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = (ROOT / "examples/demo.yaml").read_text()
    assert VERB.start(["show", "demo"], {}) == 0
    assert capsys.readouterr().out == example
    assert VERB.start(["copy", "demo"], {}) == 0
    assert Path("demo.yaml").read_text() == example and not Path("demo.yaml").is_symlink()
    assert VERB.start(["copy", "demo"], {}) == 2
    assert "exists; give another --out" in capsys.readouterr().err
    assert VERB.start(["show", "dmeo"], {}) == 2
    assert "is no recipe; use one of demo, dpo_" in capsys.readouterr().err


def test_a_folder_hides_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert resolve("demo").endswith("recipes/demo.yaml")
