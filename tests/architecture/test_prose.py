"""Docstrings that say something by themselves, and a share of comments that may grow but not fall.

The first line of a docstring is read alone, in a list or a tooltip: it may lean on no line before it.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.architecture.source import ROOT, python_files, read

PACKAGES = ("sicog_mcore", "kernels")
FEWEST_WORDS = 3
# First words that point at another docstring, or at none.
LEANS_ON_ANOTHER = re.compile(r"(?:The same|Such|Those|These|Its|Whose)\b")
# A clause in place of a noun: "What a job came to."
NAMES_NO_NOUN = re.compile(r"What\b")
# Nothing but an owner: "The embedder's."
ONLY_AN_OWNER = re.compile(r"(?:\S+ ){0,3}\S+'s\.")
# Comments that stand in lines of their own, as a share of all lines of the package, as measured; raise it as it grows.
OWN_LINE_SHARE = 0.018


def first_lines(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, name and first line of the docstring of everything that has one; the module's name is empty."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                is_module = isinstance(node, ast.Module)
                yield (1, "", text.split("\n")[0]) if is_module else (node.lineno, node.name, text.split("\n")[0])


def prose_violations(file: Path, tree: ast.Module) -> list[str]:
    """Docstrings that lean on another one, name only an owner, or, of public things, have hardly a word."""
    found = []
    for line, name, text in first_lines(tree):
        where = f"{file}:{line} {name or 'module'}"
        if LEANS_ON_ANOTHER.match(text):
            found.append(f"{where} begins with words that point elsewhere: {text}")
        if ONLY_AN_OWNER.fullmatch(text):
            found.append(f"{where} names only an owner: {text}")
        if len(text.split()) < FEWEST_WORDS and not name.startswith("_"):
            found.append(f"{where} has fewer than {FEWEST_WORDS} words: {text}")
    return found


def clause_violations(file: Path, tree: ast.Module) -> list[str]:
    """Docstrings that begin with a clause where the field's noun or a verb belongs."""
    return [
        f"{file}:{line} {name or 'module'} begins with a clause, not with a noun or a verb: {text}"
        for line, name, text in first_lines(tree)
        if NAMES_NO_NOUN.match(text)
    ]


def own_line_comments(text: str) -> int:
    """Comments with nothing but blanks before them in their line; a "#" inside a string is none."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(
        token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip() and is_prose(token.string)
        for token in tokens
    )


def is_prose(comment: str) -> bool:
    """Whether a comment speaks to people: it holds two words, and is no sign to a tool."""
    return re.search(r"[A-Za-z]\w* \S", comment) is not None and re.match(r"# ?(?:noqa|type:|fmt:)", comment) is None


def comment_share(texts: Iterable[str]) -> float:
    """Own-line comments over lines, of all files together."""
    counts = [(own_line_comments(text), len(text.splitlines())) for text in texts]
    return sum(comments for comments, _ in counts) / sum(lines for _, lines in counts)


@pytest.mark.parametrize("file", python_files(*PACKAGES), ids=str)
def test_docstrings_stand_by_themselves(file: Path) -> None:
    assert prose_violations(file, read(file)) == []


@pytest.mark.parametrize("file", python_files(), ids=str)
def test_docstrings_begin_with_a_noun_or_a_verb(file: Path) -> None:
    assert clause_violations(file, read(file)) == []


def test_the_share_of_comments_has_not_fallen() -> None:
    share = comment_share((ROOT / file).read_text(encoding="utf-8") for file in python_files(*PACKAGES))
    assert share >= OWN_LINE_SHARE, f"own-line comments are {share:.2%} of lines: say why where a body is hard"


def test_the_check_of_docstrings_sees_a_violation() -> None:
    code = '''"""The same for rows."""
class Cosine:
    """The embedder's."""
    def matrix(self):
        """Zeros."""
    def _rows(self):
        """Rows."""
    async def others(self):
        """Such rows of the matrix."""
    def right(self):
        """Thoseness is a word, and the rows are the user's."""
'''
    assert prose_violations(Path("x.py"), ast.parse(code)) == [
        "x.py:1 module begins with words that point elsewhere: The same for rows.",
        "x.py:2 Cosine names only an owner: The embedder's.",
        "x.py:2 Cosine has fewer than 3 words: The embedder's.",
        "x.py:4 matrix has fewer than 3 words: Zeros.",
        "x.py:8 others begins with words that point elsewhere: Such rows of the matrix.",
    ]


def test_the_check_of_beginnings_sees_a_violation() -> None:
    code = '"""Whatever a row holds is read."""\ndef came(rows):\n    """What the rows came to."""\n'
    assert clause_violations(Path("x.py"), ast.parse(code)) == [
        "x.py:2 came begins with a clause, not with a noun or a verb: What the rows came to."
    ]


def test_the_count_of_comments_sees_only_those_in_lines_of_their_own() -> None:
    code = '''# Rows are counted first.
x = 1  # not in a line of its own
TEXT = """
# inside a text
"""
if x:
    # noqa: E501
    # --------
    #
    # Columns come second.
    x = 2
'''
    assert own_line_comments(code) == 2
    assert comment_share([code, "y = 1\n" * 10]) == 2 / 21
