"""The documents name what exists, and everything public says what it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sicog_mcore.commands.registry import find_verb
from sicog_mcore.commands.verb import VerbFamily
from tests.architecture.source import ROOT, TOP, python_files, read

README = ROOT / "README.md"
README_LINES = 120
HISTORY = "CHANGELOG.md"  # it also names what is gone
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").glob("*.md"))
)
AUTOMATION = (".github/workflows/ci.yml", ".ci/run", ".pre-commit-config.yaml")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A command in backticks, at the start of a line, of a list's item or of a table's cell.
MAKE = re.compile(r"(?:^[-\s]*(?:run: |entry: )?|`)(?:[A-Z]+=\S+ )?make ([a-z][a-z-]*)", flags=re.MULTILINE)
# The one command likewise, or behind -m; the word after the verb counts where the verb is a family.
VERB = re.compile(r"(?:^[-\s]*|`|-m )sicog(?:_mcore)? ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", flags=re.MULTILINE)
# A path below one of our folders, up to what cannot belong to it; `a/{b,c}.py` and globs are left to the reader.
PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join((*TOP, '.ci'))})/[\w./-]*\w/?)(?!/?[\w{{*<])")
TRIVIAL_STATEMENTS = 2  # a function this short says everything with its name


def missing_paths(text: str) -> list[str]:
    """Paths that a document names and that do not exist."""
    return sorted({path for path in PATH.findall(text) if not (ROOT / path).exists()})


def missing_links(document: Path, text: str) -> list[str]:
    """Links of a document, relative to its folder, that lead to no file of ours."""
    targets = {link.partition("#")[0] for link in LINK.findall(text) if "://" not in link}
    return sorted(target for target in targets if target and not (ROOT / document.parent / target).exists())


def missing_targets(text: str) -> list[str]:
    """Targets of make that a text names and that the Makefile lacks."""
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    return sorted(set(MAKE.findall(text)) - known)


def missing_verbs(text: str) -> list[str]:
    """Verbs of the one command that a text names and that the registry lacks, with the word below where that is wrong."""
    found = set()
    for name, word in VERB.findall(text):
        entry = find_verb(name)
        if entry is None:
            found.add(name)
        elif word and isinstance(family := entry.load(), VerbFamily) and word not in family.verbs:
            found.add(f"{name} {word}")
    return sorted(found)


def repeated_terms(text: str) -> list[str]:
    """Words that stand more than once in the first column of a document's tables."""
    terms = [term for row in re.findall(r"^\| (?!word |---)([^|]+) \|", text, flags=re.M) for term in row.split(", ")]
    return sorted({term for term in terms if terms.count(term) > 1})


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_path_in_a_document_exists(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert missing_links(document, text) == []
    assert document.name == HISTORY or missing_paths(text) == []


@pytest.mark.parametrize("document", [*DOCUMENTS, *map(Path, AUTOMATION)], ids=str)
def test_every_make_target_in_a_document_exists(document: Path) -> None:
    assert missing_targets((ROOT / document).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", [*DOCUMENTS, *map(Path, AUTOMATION)], ids=str)
def test_every_verb_in_a_document_exists(document: Path) -> None:
    assert document.name == HISTORY or missing_verbs((ROOT / document).read_text(encoding="utf-8")) == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_readme_leads_to_every_document() -> None:
    """Within two links, so that nothing is written for nobody."""
    seen, ahead = {Path("README.md")}, [Path("README.md")]
    for document in ahead:
        for link in LINK.findall((ROOT / document).read_text(encoding="utf-8")):
            target = (ROOT / document.parent / link.partition("#")[0]).resolve()
            inside = sorted(target.glob("*.md")) if target.is_dir() else [target]
            found = {path.relative_to(ROOT) for path in inside if path.is_relative_to(ROOT) and path.suffix == ".md"}
            ahead += sorted(found - seen)
            seen |= found
    assert set(DOCUMENTS) - seen == set()


def test_decisions_are_numbered_without_a_gap() -> None:
    names = sorted(path.name for path in (ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [name[:5] for name in names] == [f"{number:04}-" for number in range(1, len(names) + 1)]


def test_the_glossary_explains_a_word_once() -> None:
    assert repeated_terms((ROOT / "docs/glossary.md").read_text(encoding="utf-8")) == []


def test_automation_runs_what_a_change_must_pass() -> None:
    """The forge's workflow and our own script call the same targets."""
    ours, forge = (set(MAKE.findall((ROOT / name).read_text(encoding="utf-8"))) for name in (".ci/run", AUTOMATION[0]))
    assert {"lint", "test", "test-loop"} <= ours == forge


@pytest.mark.parametrize("package", ["sicog_mcore", "kernels/sicog_kernels"])
def test_a_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    metadata = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert re.search(rf'"{Path(package).name}": \[[^\]]*"py.typed"', metadata)


@pytest.mark.parametrize("file", python_files("sicog_mcore", "kernels"), ids=str)
def test_everything_public_has_a_docstring(file: Path) -> None:
    if (ROOT / file).stat().st_size == 0:
        pytest.skip("an empty file, which only marks a package")
    assert list(undocumented(file, read(file))) == []


def test_the_path_check_sees_a_missing_file() -> None:
    text = "`sicog_mcore/config.py`, sicog_mcore/nowhere.py; [x](tools/none.py), kernels/*/x.py, kernels/bench/<op>.py"
    assert missing_paths(text) == ["sicog_mcore/nowhere.py", "tools/none.py"]


@pytest.mark.parametrize(
    "code", ["'''Doc.'''\nclass A:\n    x = 1", "x = 1", "'''D.'''\ndef f():\n    a = 1\n    b = 2\n    return a"]
)
def test_the_docstring_check_sees_a_violation(code: str) -> None:
    assert list(undocumented(Path("x.py"), ast.parse(code)))


def test_the_checks_of_documents_see_a_violation() -> None:
    text = "[a](proven.md#x) [b](../README.md) [c](nowhere.md) [d](https://example.org/none.md)"
    assert missing_links(Path("docs/limits.md"), text) == ["nowhere.md"]
    text = "`make test`, `PYTHON=python3.12 make none`\nmake gone  # x\n      - run: make lost\nto make peace"
    assert missing_targets(text) == ["gone", "lost", "none"]
    text = "`sicog demo`, `sicog lost x`\nsicog gone  # x\n`sicog recipes list`, `sicog bench none`, `sicog VERB`"
    assert missing_verbs(f"{text}\ntorchrun -m sicog_mcore wrong") == ["bench none", "gone", "lost", "wrong"]
    assert repeated_terms("| word | meaning |\n|---|---|\n| pack, row | x |\n| row | y |") == ["row"]
