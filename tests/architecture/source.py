"""Our files, and what stands in them: read with ast, never imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOP = ("sicog_mcore", "kernels", "launch", "tools", "examples", "tests")


def python_files(*folders: str) -> list[Path]:
    """Every Python file below the folders, as paths relative to the project."""
    return sorted(file.relative_to(ROOT) for folder in folders or TOP for file in (ROOT / folder).rglob("*.py"))


def read(file: Path) -> ast.Module:
    """Syntax tree of one of our files."""
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=str(file))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported, inside functions too; "from a import b" gives "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def dotted(node: ast.expr) -> str:
    """The name that an attribute chain spells, e.g. "a.b.c", else empty."""
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if isinstance(node, ast.Attribute) and base else ""
