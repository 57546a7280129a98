"""The configurations of examples/ as data of the package, so that each is found by its name wherever the package is.

In: a name, such as ``demo``   Out: the path of demo.yaml   Next: cli.py, cognition/loop/loop_config.py
The files are links to examples/ in a checkout, and copies in a wheel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".yaml"


def recipe_names() -> tuple[str, ...]:
    """Returns the names of all recipes, in alphabetical order."""
    return tuple(sorted(path.stem for path in _files()))


def find_recipe(name: str) -> Path | None:
    """Returns the file of a recipe; None where none has that name."""
    return next((path for path in _files() if name in (path.stem, path.name)), None)


def resolve(file: str) -> str:
    """Returns the path of a configuration: the file itself, or where there is none the recipe of that name."""
    found = None if Path(file).exists() and not Path(file).is_dir() else find_recipe(file)
    return str(found) if found else file


def _files() -> Iterator[Path]:
    return Path(__file__).parent.glob(f"*{SUFFIX}")
