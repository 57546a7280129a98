"""No operator without a test: each public function of sicog_kernels is called by a test of its own module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.architecture.source import ROOT, python_files, read

KERNEL_TESTS = Path("tests/kernels")


def operators(tree: ast.Module) -> list[str]:
    """Public functions and classes of a module."""
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node.name for node in definitions if not node.name.startswith("_")]


def untested(names: list[str], tests: list[ast.AST]) -> list[str]:
    """Names that no test calls or refers to in code (a comment or a string is no use)."""
    used = {node.id for tree in tests for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for tree in tests for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return [name for name in names if name not in used]


@pytest.mark.parametrize("file", python_files("kernels"), ids=str)
def test_every_operator_is_used_by_a_test(file: Path) -> None:
    tests: list[ast.AST] = [read(test) for test in python_files(str(KERNEL_TESTS))]
    assert untested(operators(read(file)), tests) == []


def test_kernels_is_a_folder_and_not_a_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()  # it would hide the PyPI package of that name


def test_the_check_sees_an_operator_without_a_test() -> None:
    module = ast.parse("def gather(): ...\ndef scatter(): ...\ndef _inner(): ...")
    assert untested(operators(module), [ast.parse("'scatter'\ngather()")]) == ["scatter"]
