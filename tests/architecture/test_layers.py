"""Imports go down only: one table says what each package may use, and the syntax trees are held against it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.architecture.source import dotted, imports, python_files, read


class Rule(NamedTuple):
    """Modules that the files of a package may import: of ours, and of others (the standard library is always allowed)."""

    ours: tuple[str, ...]
    others: tuple[str, ...]


VERSION = "sicog_mcore.__version__"
CONTRACTS = ("sicog_mcore.config", "sicog_mcore.errors", "sicog_mcore.files", "sicog_mcore.decoding")
BATCH = (*CONTRACTS, "sicog_mcore.data.batch", "sicog_mcore.sizes", "sicog_kernels")
BELOW_CHECKPOINT = (*BATCH, "sicog_mcore.cli", "sicog_mcore.data", "sicog_mcore.model", "sicog_mcore.parallel")
STARTING = ("sicog_mcore.ranks", "sicog_mcore.lock")
BELOW_BUILD = (*BELOW_CHECKPOINT, "sicog_mcore.checkpoint", "sicog_mcore.memory", "sicog_mcore.presets")
BELOW_TRAIN = (*BELOW_BUILD, "sicog_mcore.build", "sicog_mcore.rollout")
TRAINING = ("torch", "megatron.core", "numpy")
COGNITION = (
    *("xxhash", "rich", "PIL", "pyarrow", "yaml"),
    *("httpx", "tenacity"),  # annotate
    *("sklearn", "sentence_transformers", "transformers", "tokenizers"),  # score
    *("jinja2", "markupsafe"),  # report
)
# What verbs use beside these: parsers, checkpoints of others, and what tells of the machine.
COMMANDS = ("docstring_parser", "safetensors", "gguf", "psutil", "sentencepiece")

# The first row that matches a path counts; names stand for themselves and everything below them.
RULES: tuple[tuple[str, Rule], ...] = (
    ("sicog_mcore/__init__.py", Rule((), ())),
    ("sicog_mcore/config.py", Rule((), ())),
    ("sicog_mcore/errors.py", Rule((), ())),
    ("sicog_mcore/files.py", Rule(("sicog_mcore.errors",), ("xxhash",))),
    ("sicog_mcore/decoding.py", Rule(("sicog_mcore.errors",), ())),
    ("sicog_mcore/ranks.py", Rule(CONTRACTS, ())),
    ("sicog_mcore/lock.py", Rule(CONTRACTS, ())),
    ("sicog_mcore/sizes.py", Rule(CONTRACTS, ())),
    ("sicog_mcore/memory.py", Rule((*CONTRACTS, "sicog_mcore.sizes"), ())),
    ("sicog_mcore/presets.py", Rule(CONTRACTS, ())),
    ("sicog_mcore/stages.py", Rule((), ())),
    ("sicog_mcore/validation.py", Rule((*CONTRACTS, "sicog_mcore.sizes"), ())),
    (
        "sicog_mcore/cli.py",
        Rule(
            (*CONTRACTS, "sicog_mcore.presets", "sicog_mcore.recipes", "sicog_mcore.validation"),
            ("jsonargparse", "docstring_parser", "yaml"),
        ),
    ),
    (
        "sicog_mcore/data/index/",
        Rule((*CONTRACTS, "sicog_mcore.data", "sicog_mcore.files"), ("numpy", "xxhash", "pyarrow")),
    ),
    (
        "sicog_mcore/data/",
        Rule(
            (*CONTRACTS, "sicog_mcore.data", "sicog_mcore.files"),
            ("torch", "numpy", "PIL", "tokenizers", "sentencepiece", "xxhash"),
        ),
    ),
    ("sicog_mcore/hf/", Rule((), ("torch", "transformers", "numpy", "PIL"))),
    (
        "sicog_mcore/model/",
        Rule((*BATCH, "sicog_mcore.model"), (*TRAINING, "transformer_engine", "flash_attn", "safetensors", "xxhash")),
    ),
    (
        "sicog_mcore/parallel/",
        Rule((*BATCH, "sicog_mcore.data.wire", "sicog_mcore.parallel", "sicog_mcore.ranks"), TRAINING),
    ),
    (
        "sicog_mcore/checkpoint/",
        Rule((*BELOW_CHECKPOINT, "sicog_mcore.checkpoint"), (*TRAINING, "safetensors", "xxhash")),
    ),
    ("sicog_mcore/build.py", Rule(BELOW_BUILD, TRAINING)),
    ("sicog_mcore/rollout/", Rule(BELOW_TRAIN, (*TRAINING, "xxhash"))),
    ("sicog_mcore/train/", Rule((*BELOW_TRAIN, "sicog_mcore.train"), (*TRAINING, "rich", "tensorboard"))),
    (
        "sicog_mcore/cognition/",
        Rule(
            (*BELOW_TRAIN, "sicog_mcore.stages", "sicog_mcore.train", "sicog_mcore.cognition", "sicog_mcore.flags"),
            (*TRAINING, *COGNITION),
        ),
    ),
    (
        "sicog_mcore/launcher.py",
        Rule(
            (
                *(*BELOW_TRAIN, *STARTING, "sicog_mcore.train", "sicog_mcore.stages"),
                "sicog_mcore.cognition.evaluation",  # judges what a model in training answers
            ),
            (),
        ),
    ),
    ("sicog_mcore/flags.py", Rule((), ())),
    ("sicog_mcore/recipes/", Rule((), ())),
    ("sicog_mcore/commands/", Rule(("sicog_mcore",), (*TRAINING, *COGNITION, *COMMANDS))),
    ("sicog_mcore/__main__.py", Rule(("sicog_mcore.commands",), ())),
    ("kernels/sicog_kernels/triton/", Rule(("sicog_kernels",), ("torch", "triton"))),
    ("kernels/sicog_kernels/", Rule(("sicog_kernels",), ("torch",))),
    # An experiment on top of everything, like a tool, but of several files.
    (
        "examples/micro_loop/",
        Rule(
            (*BELOW_TRAIN, "sicog_mcore.train", "sicog_mcore.cognition", "sicog_mcore.commands"),
            ("examples.micro_loop", "torch", "numpy", "scipy", "sklearn", "PIL", "tokenizers", "rich"),
        ),
    ),
    ("examples/", Rule((*CONTRACTS, "sicog_mcore.presets"), ())),
)
STANDS_ALONE = "sicog_mcore/hf/"  # copied into exported models, where absolute imports of our own find nothing
LAYERED = ("sicog_mcore", "kernels", "examples")

COMMUNICATION = ("torch.distributed", "megatron.core.parallel_state", "megatron.core.mpu")
BANNED_EVERYWHERE = ("megatron.training", "torchvision", "hydra")


def below(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the packages, or stands in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer_violations(file: Path, tree: ast.AST) -> list[str]:
    """Lists the imports of a file that the table forbids."""
    rule = next((rule for prefix, rule in RULES if file.as_posix().startswith(prefix)), None)
    if rule is None:
        return [f"{file} belongs to no layer: add a row to RULES"]
    found = []
    for name in imports(tree):
        top = name.partition(".")[0]
        if top == "" and file.as_posix().startswith(STANDS_ALONE) and name.count(".") == 2:
            continue
        if top == "":
            found.append(f"{file}: relative import {name}")
        elif top in ("sicog_mcore", "sicog_kernels"):
            if name != VERSION and not below(name, rule.ours):
                found.append(f"{file}: {name} is not below it")
        elif top not in sys.stdlib_module_names and not below(name, rule.others):
            found.append(f"{file}: {name} is not allowed here")
    return found


def communication_violations(file: Path, tree: ast.AST) -> list[str]:
    """Uses of process groups, as imports or as attributes, outside of the package for them."""
    if file.as_posix().startswith(("sicog_mcore/parallel/", "tests/")):
        return []
    used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(imports(tree))
    return [f"{file}: {name}" for name in sorted(used) if below(name, COMMUNICATION)]


def banned(file: Path, tree: ast.AST) -> list[str]:
    """Imports that no file may have."""
    return [f"{file}: {name}" for name in imports(tree) if below(name, BANNED_EVERYWHERE)]


@pytest.mark.parametrize("file", python_files(*LAYERED), ids=str)
def test_a_file_imports_only_from_below(file: Path) -> None:
    assert layer_violations(file, read(file)) == []


@pytest.mark.parametrize("file", python_files(), ids=str)
def test_only_parallel_talks_to_process_groups(file: Path) -> None:
    assert communication_violations(file, read(file)) == []


@pytest.mark.parametrize("file", python_files(), ids=str)
def test_nothing_imports_a_banned_package(file: Path) -> None:
    assert banned(file, read(file)) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("sicog_mcore/config.py", "import torch"),
        ("sicog_mcore/validation.py", "def f():\n    import jsonargparse"),
        ("sicog_mcore/data/slicing.py", "from megatron.core import tensor_parallel"),
        ("sicog_mcore/data/slicing.py", "from sicog_mcore.model.tower import Tower"),
        ("sicog_mcore/model/tower.py", "from sicog_mcore.data.loader import Loader"),
        ("sicog_mcore/model/tower.py", "from sicog_mcore.parallel.topology import Topology"),
        ("sicog_mcore/model/tower.py", "from .layers import x"),
        ("sicog_mcore/parallel/ddp.py", "import sicog_mcore.checkpoint.store"),
        ("sicog_mcore/checkpoint/store.py", "from sicog_mcore.train import loop"),
        ("sicog_mcore/hf/modeling_sicog.py", "from sicog_mcore.model.positions import interpolate_positions"),
        ("sicog_mcore/hf/modeling_sicog.py", "from ..config import DecoderConfig"),
        ("kernels/sicog_kernels/gather.py", "import triton"),
        ("sicog_mcore/new.py", "import os"),
    ],
)
def test_the_layer_check_sees_a_violation(file: str, code: str) -> None:
    assert len(layer_violations(Path(file), ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "import torch\ndef f():\n    torch.distributed.barrier()",
        "from megatron.core import parallel_state",
        "from megatron.core import mpu",
    ],
)
def test_the_communication_check_sees_a_violation(code: str) -> None:
    assert communication_violations(Path("sicog_mcore/train/loop.py"), ast.parse(code))
    assert communication_violations(Path("sicog_mcore/parallel/ddp.py"), ast.parse(code)) == []


def test_the_check_of_banned_packages_sees_a_violation() -> None:
    assert banned(Path("tools/x.py"), ast.parse("from megatron.training import pretrain"))
