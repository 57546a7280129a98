"""One name means one thing: no public class and no file name occurs twice, and every file that a docstring names exists."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.architecture.source import ROOT, TOP, python_files, read

PACKAGES = ("sicog_mcore", "kernels")
FILE = re.compile(r"(?<![\w.*{/-])((?:[\w.-]+/)*[\w-]+\.py)\b")


def public_types(tree: ast.Module) -> Iterator[str]:
    """Classes and type aliases (names in capitals and small letters that are assigned at the top of a module)."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        else:
            continue
        if name[0].isupper() and not name.isupper() and name != "T":
            yield name


def repeated(places: Iterable[tuple[str, Path]]) -> Mapping[str, list[str]]:
    """Names that occur in more than one file, with the files."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, file in places:
        found[name].append(str(file))
    return {name: files for name, files in found.items() if len(files) > 1}


def missing_files(file: Path, tree: ast.Module, known: Iterable[Path]) -> list[str]:
    """Python files that docstrings name and that are nowhere: a name counts as the end of a path."""
    ends = {"/".join(path.parts[-length:]) for path in known for length in range(1, len(path.parts) + 1)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [f"{file}: {name}" for text in texts for name in FILE.findall(text) if name not in ends]


def test_no_public_type_has_the_name_of_another() -> None:
    places = [(name, file) for file in python_files(*PACKAGES) for name in public_types(read(file))]
    assert repeated(places) == {}


def test_no_file_has_the_name_of_another() -> None:
    files = [file for file in python_files(*PACKAGES) if file.name != "__init__.py"]
    assert repeated((file.name, file) for file in files) == {}


@pytest.mark.parametrize("file", python_files(), ids=str)
def test_every_file_that_a_docstring_names_exists(file: Path) -> None:
    known = [*python_files(*TOP), *(path.relative_to(ROOT) for path in ROOT.glob("*.py"))]
    assert missing_files(file, read(file), known) == []


def test_the_check_of_types_sees_a_violation() -> None:
    code = "class Item:\n    pass\nRow = int | str\nT = 1\nLIMIT = 2\nclass _Hidden:\n    pass"
    assert list(public_types(ast.parse(code))) == ["Item", "Row"]
    assert repeated([("Item", Path("a.py")), ("Row", Path("a.py")), ("Item", Path("b.py"))]) == {
        "Item": ["a.py", "b.py"]
    }


def test_the_check_of_named_files_sees_a_violation() -> None:
    tree = ast.parse(
        '"""Next: loop.py, data/rows.py, here.py, `*.py`, a/{b,c}.py"""\ndef f():\n    """See gone/rows.py."""'
    )
    known = [Path("sicog_mcore/data/rows.py"), Path("here.py")]
    assert missing_files(Path("x.py"), tree, known) == ["x.py: loop.py", "x.py: gone/rows.py"]
