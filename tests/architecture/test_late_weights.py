"""Weights of a live model are read through ``TrainableModel.chunks`` alone, which waits for what is still on its way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.architecture.source import python_files, read

OWNER = Path("sicog_mcore/parallel/ddp.py")
SCHEDULES = ("run_schedule", "score_answers")  # run the wrapped forward, whose hooks wait


def violations(file: Path, tree: ast.AST) -> list[str]:
    """Uses of a model's wrapped chunks other than running them, and of what stands behind ``chunks``."""
    if file == OWNER:
        return []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    run = {id(c.args[0]) for c in calls if isinstance(c.func, ast.Name) and c.func.id in SCHEDULES and c.args}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if node.attr == "wrapped" and id(node) not in run:
                found.append(f"{file}:{node.lineno}: .wrapped outside {' and '.join(SCHEDULES)}; read .chunks")
            if node.attr == "module" or (node.attr == "_chunks" and not is_own):
                found.append(f"{file}:{node.lineno}: .{node.attr} may be a step old; read .chunks")
    return found


@pytest.mark.parametrize("file", python_files("sicog_mcore", "launch", "tools"), ids=str)
def test_nobody_reads_weights_behind_the_model(file: Path) -> None:
    assert violations(file, read(file)) == []


@pytest.mark.parametrize(
    "code",
    [
        "state = model.wrapped[0].module.state_dict()",
        "for chunk in model.wrapped: export(chunk)",
        "save(model._chunks)",
        "scores = score_answers(other, model.wrapped)",
        "weights = list(wrapper.module.parameters())",
    ],
)
def test_a_reader_that_bypasses_the_model_is_found(code: str) -> None:
    assert violations(Path("sicog_mcore/train/new.py"), ast.parse(code))


def test_running_the_wrapped_chunks_is_allowed() -> None:
    code = "run_schedule(model.wrapped, model.config)\nsave(model.chunks)\nself._chunks"
    assert violations(Path("sicog_mcore/train/new.py"), ast.parse(code)) == []
