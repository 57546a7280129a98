"""A wheel holds every package of the tree, every file that is read at run time, and the one command."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
DATA = (".json", ".yaml", ".j2", ".css", ".js", ".jpg", ".md", ".typed")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns the arguments that setup.py hands over."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **words: found.update(words))
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_every_package_is_listed(settings: dict[str, Any]) -> None:
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "sicog_mcore").rglob("__init__.py")]
    assert sorted(".".join(folder.parts) for folder in folders) == sorted(
        name for name in settings["packages"] if name != "sicog_kernels"
    )


def test_every_file_that_is_read_at_run_time_is_listed(settings: dict[str, Any]) -> None:
    listed = {
        path
        for package, patterns in settings["package_data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", os.sep)).glob(pattern)
    }
    assert {path for path in (ROOT / "sicog_mcore").rglob("*") if path.suffix in DATA} == listed


def test_the_command_is_installed(settings: dict[str, Any]) -> None:
    assert settings["entry_points"] == {"console_scripts": ["sicog = sicog_mcore.commands.front:main"]}
