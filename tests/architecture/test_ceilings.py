"""Ceilings and habits: short files, short functions, few parameters, no hidden state."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source import ROOT, dotted, imports, python_files, read

FILE_LINES = 500
FUNCTION_LINES = 80
PARAMETERS = 8
DRAWER_NAMES = ("utils.py", "common.py", "helpers.py", "misc.py")
NO_PACKAGES = ("kernels", "tools", "launch", "examples", "tests")
MAY_READ_ENVIRONMENT = ("launch/", "sicog_mcore/commands/verb.py", "sicog_mcore/parallel/topology.py", "tests/")
MAY_PRINT = ("launch/", "tools/", "sicog_mcore/commands/")
MAY_HOLD_TABLES = ("tests/",)  # parameter lists of tests
MAY_PROBE = ("sicog_mcore/model/capability.py", "tools/doctor.py")  # ask other packages what they have
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = ("list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict")
READ_ONLY_TYPES = ("Mapping", "Sequence", "tuple", "frozenset", "Collection", "Set", "Final")


def starts(file: Path, prefixes: tuple[str, ...]) -> bool:
    """Whether a path stands in one of the folders or is one of the files."""
    return file.as_posix().startswith(prefixes)


def size_violations(file: Path, tree: ast.AST) -> Iterator[str]:
    """Functions that are too long or take too much."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > FUNCTION_LINES:
            yield f"{file}:{node.lineno} {node.name} has {lines} lines"
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in named if argument.arg not in ("self", "cls")])
        if count > PARAMETERS and not starts(file, ("kernels/",)):
            yield f"{file}:{node.lineno} {node.name} has {count} parameters"


def state_violations(file: Path, tree: ast.Module) -> Iterator[str]:
    """Names at module level that could change, and functions that change them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{file}:{node.lineno} global {', '.join(node.names)}"
    if starts(file, MAY_HOLD_TABLES):
        return
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and _is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [dotted(target) for target in targets]
            if names != ["__all__"] and not (all(name.isupper() for name in names) and _read_only(node)):
                yield f"{file}:{node.lineno} a mutable value at module level"


def _is_mutable(value: ast.expr | None) -> bool:
    called = isinstance(value, ast.Call) and dotted(value.func).rpartition(".")[2] in MUTABLE_CALLS
    return called or isinstance(value, MUTABLE)


def _read_only(node: ast.Assign | ast.AnnAssign) -> bool:
    """Whether the annotation promises, and mypy checks, that nobody changes the value."""
    if isinstance(node, ast.Assign):
        return False
    annotation = node.annotation.value if isinstance(node.annotation, ast.Subscript) else node.annotation
    return dotted(annotation).rpartition(".")[2] in READ_ONLY_TYPES


def habit_violations(file: Path, tree: ast.AST) -> Iterator[str]:
    """Environment, print, guessing getattr, star imports, swallowed exceptions."""
    if not starts(file, MAY_READ_ENVIRONMENT):
        names = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(imports(tree))
        yield from (
            f"{file}: {name}" for name in sorted(names & {"os.environ", "os.getenv", "os.environb", "os.putenv"})
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called == "print" and not starts(file, MAY_PRINT):
                yield f"{file}:{node.lineno} print"
            guesses = called == "getattr" and len(node.args) == 3 and isinstance(node.args[1], ast.Constant)
            if guesses and not starts(file, MAY_PROBE):
                yield f"{file}:{node.lineno} getattr with a default"
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            yield f"{file}:{node.lineno} import *"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{file}:{node.lineno} bare except"


@pytest.mark.parametrize("file", python_files(), ids=str)
def test_a_file_keeps_the_ceilings_and_habits(file: Path) -> None:
    tree = read(file)
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    assert [*size_violations(file, tree), *state_violations(file, tree), *habit_violations(file, tree)] == []


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [file for file in python_files() if file.name in DRAWER_NAMES] == []


def test_folders_that_must_not_become_global_packages_have_no_init() -> None:
    assert [
        file for file in python_files(*NO_PACKAGES) if file.name == "__init__.py" and "sicog_kernels" not in file.parts
    ] == []


LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES


@pytest.mark.parametrize(
    "code",
    [
        LONG,
        "def f(a, b, c, d, e, f, g, h, i): ...",
        "def f(a, b, c, d, *, e, f, g, h, i): ...",
        "x = 1\ndef f():\n    global x\n    x = 2",
        "cache = {}",
        "CACHE = {}",
        "CACHE: dict[str, int] = {}",
        "cache: Mapping[str, int] = {}",
        "SEEN = set()",
        "import os\nhome = os.environ['HOME']",
        "from os import environ",
        "def f():\n    print(1)",
        "def f(x):\n    return getattr(x, 'name', None)",
        "from os import *",
        "try:\n    pass\nexcept:\n    pass",
    ],
)
def test_the_checks_see_a_violation(code: str) -> None:
    file, tree = Path("sicog_mcore/train/loop.py"), ast.parse(code)
    assert [*size_violations(file, tree), *state_violations(file, tree), *habit_violations(file, tree)]


@pytest.mark.parametrize(
    "code",
    [
        "SIZES: Mapping[str, int] = {'a': 1}",
        "NAMES = ('a', 'b')",
        "def f(x, name):\n    return getattr(x, name)",
        "a = f()",
    ],
)
def test_the_checks_let_the_rest_pass(code: str) -> None:
    file, tree = Path("sicog_mcore/train/loop.py"), ast.parse(code)
    assert [*size_violations(file, tree), *state_violations(file, tree), *habit_violations(file, tree)] == []
