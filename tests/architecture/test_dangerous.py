"""Nothing that comes from a file or a name is run: no open pickles, no eval, no shell, no code of other people's models."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source import dotted, imports, python_files, read

OURS = ("sicog_mcore", "kernels", "launch", "tools", "examples")  # tests may: they prove what others would do
OPENS_PICKLES = "sicog_mcore/parallel/shard_files.py"  # by a list of names
OPENS_CHECKPOINTS = "sicog_mcore/checkpoint/trusted_files.py"  # through the file above
PICKLERS = ("marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle")
PICKLE_READERS = ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads")
RUNS_TEXT = ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec")
RUNS_COMMANDS = ("os.system", "os.popen", "os.execl", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn")
UNSAFE_YAML = ("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all")
SAFE_LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader", "CSafeLoader")
# Keyword arguments that open a door, in whatever call.
DOORS = ("shell", "allow_pickle", "trust_remote_code")
CHECKPOINT_READERS = (
    *("dist_checkpointing.load", "dist_checkpointing.load_common_state_dict", "dist_checkpointing.load_plain_tensors"),
    *("dist_checkpointing.load_tensors_metadata", "dist_checkpointing.load_sharded_metadata"),
    *("dist_checkpointing.load_content_metadata", "torch.distributed.checkpoint.load"),
)


def dangers(file: Path, tree: ast.AST) -> Iterator[str]:
    """Every place where a file could run what it reads."""
    place = file.as_posix()
    names = {dotted(node): node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {name: 0 for name in imports(tree)}
    for name, line in names.items():
        top, _, last = name.rpartition(".")
        if name.partition(".")[0] in PICKLERS or (top in ("pickle", "_pickle") and last in PICKLE_READERS):
            if place != OPENS_PICKLES:
                yield f"{file}:{line} {name}"
        if name in RUNS_COMMANDS or name in UNSAFE_YAML:
            yield f"{file}:{line} {name}"
        if name.removeprefix("megatron.core.") in CHECKPOINT_READERS and place != OPENS_CHECKPOINTS:
            yield f"{file}:{line} {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (f"{file}:{node.lineno} {problem}" for problem in _dangers_of_call(node))


def _dangers_of_call(call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in RUNS_TEXT:
        yield name
    if name in ("torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"):
        if name != "torch.load" or not _is_true(given.get("weights_only")):
            yield f"{name} without weights_only=True"
    if name in ("yaml.load", "yaml.load_all"):
        loader = given.get("Loader", call.args[1] if len(call.args) > 1 else None)
        if loader is None or dotted(loader) not in SAFE_LOADERS:
            yield f"{name} without a safe loader"
    for door in DOORS:
        if door in given and not _is_false(given[door]):
            yield f"{door} is not False"


def _is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("file", python_files(*OURS), ids=str)
def test_a_file_runs_nothing_that_it_reads(file: Path) -> None:
    assert list(dangers(file, read(file))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.load(f)",
        "import pickle\npickle.loads(b)",
        "from pickle import loads",
        "import pickle\nclass R(pickle.Unpickler): pass",
        "import dill",
        "import cloudpickle as c",
        "eval('1')",
        "exec(text)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=trusted)",
        "import torch\ntorch.jit.load(path)",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "import subprocess\nsubprocess.Popen(line, shell=yes)",
        "import os\nos.system(line)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "from megatron.core import dist_checkpointing\ndist_checkpointing.load(state, path)",
        "from megatron.core.dist_checkpointing import load_common_state_dict",
    ],
)
def test_the_check_sees_a_danger(code: str) -> None:
    assert list(dangers(Path("tools/x.py"), ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\ntry: f()\nexcept pickle.UnpicklingError: pass",
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.safe_load(text)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import re\nre.compile('x')\nmodel.eval()",
        "import json\njson.loads(text)",
    ],
)
def test_the_check_lets_pass_what_is_safe(code: str) -> None:
    assert list(dangers(Path("tools/x.py"), ast.parse(code))) == []
