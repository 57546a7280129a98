"""Durable files have one room: renames, fsync, chunked hashes and the search for checkpoints each stand in one place."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.architecture.source import dotted, imports, python_files, read

OURS = ("sicog_mcore", "kernels", "launch", "tools", "examples")
ROOM = "sicog_mcore/files.py"
COMMIT, LOCATE = "sicog_mcore/checkpoint/commit.py", "sicog_mcore/checkpoint/locate.py"
RENAMES = ("os.replace", "os.rename", "os.renames", "shutil.move")
SYNCS = ("os.fsync", "os.fdatasync")
HASHERS = ("xxhash.xxh32", "xxhash.xxh64", "xxhash.xxh128", "xxhash.xxh3_64", "xxhash.xxh3_128")
NEWEST = "committed_steps"
CHECKPOINTS = "checkpoints"
INTERRUPTED = "EXIT_INTERRUPTED"

Sites = Iterator[int]  # line numbers


def _uses(tree: ast.AST, names: tuple[str, ...]) -> Sites:
    """Places that name one of the functions, however it was imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in names:
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and set(imports(node)) & set(names):
            yield node.lineno


def renames(tree: ast.AST) -> Sites:
    """Renames by os, shutil or pathlib. A method ``replace`` with one argument is that of a path: a text's takes two."""
    yield from _uses(tree, RENAMES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and dotted(node.func) not in RENAMES:
            takes_one = len(node.args) == 1 and not node.keywords
            if node.func.attr in ("replace", "rename") and takes_one:
                yield node.lineno


def syncs(tree: ast.AST) -> Sites:
    """Calls that wait for the disk."""
    yield from _uses(tree, SYNCS)


def chunked_hashers(tree: ast.AST) -> Sites:
    """Hashes that are fed piece by piece; hashes of what is in memory are calls of another name."""
    yield from _uses(tree, HASHERS)


def newest_searches(tree: ast.AST) -> Sites:
    """Looks at the list of committed steps."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] == NEWEST:
            yield node.lineno


def checkpoint_literals(tree: ast.AST) -> Sites:
    """Spells the folder of a run's checkpoints."""
    return (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value == CHECKPOINTS)


def interrupted_codes(tree: ast.AST) -> Sites:
    """Definitions of the exit code of an interrupted command."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and INTERRUPTED in [dotted(target) for target in node.targets]:
            yield node.lineno


def typed_decoders(tree: ast.AST) -> Sites:
    """Functions that make an instance of a type they were given, from named values."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not any(
            dotted(d) == "classmethod" for d in function.decorator_list
        ):
            parameters = {argument.arg for argument in function.args.args}
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            if any(dotted(call.func) in parameters and _is_unpacked(call) for call in calls):
                yield function.lineno


def _is_unpacked(call: ast.Call) -> bool:
    """Whether a call takes all its values from a mapping; with values by position too, it passes a call on."""
    return not call.args and any(keyword.arg is None for keyword in call.keywords)


# What is looked for, and the files that may have it.
RULES: Mapping[str, tuple[Callable[[ast.AST], Sites], tuple[str, ...]]] = {
    "renames": (renames, (ROOM,)),
    "syncs": (syncs, (ROOM,)),
    "chunked hashers": (chunked_hashers, (ROOM,)),
    "newest-checkpoint searches": (newest_searches, (COMMIT, LOCATE)),
    "names of the checkpoint folder": (checkpoint_literals, (LOCATE,)),
    "exit codes of an interrupt": (interrupted_codes, ("sicog_mcore/errors.py",)),
}


@cache
def trees() -> tuple[tuple[Path, ast.Module], ...]:
    """All files of the project, tests left out."""
    return tuple((file, read(file)) for file in python_files(*OURS))


def sites(find: Callable[[ast.AST], Sites]) -> list[str]:
    """Every place in these files."""
    return [f"{file}:{line}" for file, tree in trees() for line in find(tree)]


@pytest.mark.parametrize("name", RULES)
def test_each_stands_in_one_place(name: str) -> None:
    find, allowed = RULES[name]
    found = sites(find)
    assert found, "the check finds nothing, not even where it should"
    assert [place for place in found if place.rpartition(":")[0] not in allowed] == []


def test_one_decoder_reads_records_and_saved_configurations() -> None:
    # The other two make dataclasses of command lines: of a configuration with files below it, and of a verb's options.
    allowed = ("sicog_mcore/decoding.py", "sicog_mcore/cli.py", "sicog_mcore/commands/parser.py")
    assert [place for place in sites(typed_decoders) if not place.startswith(allowed)] == []


@pytest.mark.parametrize(
    ("find", "code"),
    [
        (renames, "import os\nos.replace(a, b)"),
        (renames, "from os import rename"),
        (renames, "import shutil\nshutil.move(a, b)"),
        (renames, "temporary.replace(path)"),
        (renames, "(folder / 'a').rename(folder / 'b')"),
        (syncs, "import os\nos.fsync(file.fileno())"),
        (syncs, "from os import fsync"),
        (chunked_hashers, "import xxhash\nstate = xxhash.xxh3_128()"),
        (newest_searches, "steps = commit.committed_steps(root)"),
        (checkpoint_literals, "root = Path(output) / 'checkpoints'"),
        (interrupted_codes, "EXIT_INTERRUPTED = 130"),
        (typed_decoders, "def build(kind, row):\n    return kind(**row)"),
    ],
)
def test_the_checks_see_a_violation(find: Callable[[ast.AST], Sites], code: str) -> None:
    assert len(list(find(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    ("find", "code"),
    [
        (renames, "text.replace('a', 'b')\nreplace(options, seed=1)\nnow.replace(microsecond=0)"),
        (chunked_hashers, "import xxhash\nxxhash.xxh3_64_intdigest(b'a')"),
        (typed_decoders, "def wrapped(call, *values, **names):\n    return call(*values, **names)"),
        (interrupted_codes, "from sicog_mcore.errors import EXIT_INTERRUPTED\ncode = EXIT_INTERRUPTED"),
        (
            typed_decoders,
            "def read(row):\n    return Stamp(**row)\nclass A:\n    @classmethod\n    def f(cls, row):\n        cls(**row)",
        ),
    ],
)
def test_the_checks_let_the_rest_pass(find: Callable[[ast.AST], Sites], code: str) -> None:
    assert list(find(ast.parse(code))) == []
