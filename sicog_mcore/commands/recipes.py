"""The recipes that come with the package: lists them, shows one, or copies one to be changed.

In: name of a recipe   Out: its YAML text, or a file   Next: train_stage.py (--config NAME takes one as it is)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sicog_mcore.commands.verb import Verb, VerbCall, VerbFamily, reporting
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.files import whole_file
from sicog_mcore.flags import flag
from sicog_mcore.recipes import find_recipe, recipe_names


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Options of ``recipes list``: it takes none."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Options that ``recipes show`` takes.

    Attributes:
        name: of the recipe, such as demo.
    """

    name: str = flag(is_positional=True)


@dataclass(frozen=True, kw_only=True)
class CopyOptions:
    """Options that ``recipes copy`` takes.

    Attributes:
        name: of the recipe, such as demo.
        out: file to write; NAME.yaml in the current folder without it.
    """

    name: str = flag(is_positional=True)
    out: Path | None = None


def list_recipes() -> dict[str, str]:
    """Returns what each recipe is for, by name: the first words of its file."""
    return {name: read_recipe(name).splitlines()[0].lstrip("# ") for name in recipe_names()}


def read_recipe(name: str) -> str:
    """Returns the YAML text of a recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    path = find_recipe(name)
    if path is None:
        raise ConfigError([ConfigProblem("recipe", name, "is no recipe", f"use one of {', '.join(recipe_names())}")])
    return path.read_text(encoding="utf-8")


def copy_recipe(options: CopyOptions) -> Path:
    """Writes a recipe to a file of the user's and returns its path.

    Raises:
        ConfigError: there is none of that name, or the file exists.
    """
    text = read_recipe(options.name)
    path = options.out or Path(f"{options.name.removesuffix('.yaml')}.yaml")
    if path.exists():
        raise ConfigError([ConfigProblem("out", str(path), "exists", "give another --out, or remove it")])
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def show_all(options: ListOptions, call: VerbCall) -> int:
    """Prints a line for each recipe; returns the exit code."""
    width = max(map(len, recipe_names()))
    return reporting("recipes", lambda: "\n".join(f"{name:<{width}}  {text}" for name, text in list_recipes().items()))


def show(options: ShowOptions, call: VerbCall) -> int:
    """Prints a recipe; returns the exit code."""
    return reporting("recipes", lambda: read_recipe(options.name).rstrip("\n"))


def copy(options: CopyOptions, call: VerbCall) -> int:
    """Copies a recipe and prints where to; returns the exit code."""
    return reporting("recipes", lambda: f"{copy_recipe(options)}: a copy of the recipe {options.name}")


VERB = VerbFamily(
    (__doc__ or "").splitlines()[0],
    {
        "list": Verb("name all recipes", ListOptions, show_all),
        "show": Verb("print one", ShowOptions, show),
        "copy": Verb("write one to a file", CopyOptions, copy),
    },
)
