"""The README names what exists, and everything public says what it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source import ROOT, TOP, python_files, read

README = ROOT / "README.md"
FILES_AT_THE_TOP = ("Makefile", "LICENSE", "setup.py", "pyproject.toml", "constraints.txt")
# A path below one of our folders, up to what cannot belong to it; `a/{b,c}.py` and globs are left to the reader.
PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join((*TOP, '.ci'))})/[\w./-]*\w/?)(?![\w{{*<])")
TRIVIAL_STATEMENTS = 2  # a function this short says everything with its name


def missing_paths(text: str) -> list[str]:
    """Paths that a document names and that do not exist."""
    return sorted({path for path in PATH.findall(text) if not (ROOT / path).exists()})


def undocumented(file: Path, tree: ast.Module) -> Iterator[str]:
    """Public modules, classes and functions without a docstring."""
    if not ast.get_docstring(tree):
        yield f"{file} has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        trivial = isinstance(node, ast.FunctionDef) and len(node.body) <= TRIVIAL_STATEMENTS
        if not ast.get_docstring(node) and not trivial:
            yield f"{file}:{node.lineno} {node.name} has no docstring"


def test_every_path_in_the_readme_exists() -> None:
    assert missing_paths(README.read_text(encoding="utf-8")) == []


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"`(?:PYTHON=\S+ )?make ([a-z-]+)`", README.read_text(encoding="utf-8")))
    assert named <= targets


@pytest.mark.parametrize("file", python_files("sicog_mcore", "kernels"), ids=str)
def test_everything_public_has_a_docstring(file: Path) -> None:
    if (ROOT / file).stat().st_size == 0:
        pytest.skip("an empty file, which only marks a package")
    assert list(undocumented(file, read(file))) == []


def test_the_path_check_sees_a_missing_file() -> None:
    text = (
        "`sicog_mcore/config.py`, sicog_mcore/nowhere.py; [x](tools/none.py), examples/, kernels/*/x.py, shared/tools/x"
    )
    assert missing_paths(text) == ["sicog_mcore/nowhere.py", "tools/none.py"]


@pytest.mark.parametrize(
    "code", ["'''Doc.'''\nclass A:\n    x = 1", "x = 1", "'''D.'''\ndef f():\n    a = 1\n    b = 2\n    return a"]
)
def test_the_docstring_check_sees_a_violation(code: str) -> None:
    assert list(undocumented(Path("x.py"), ast.parse(code)))
