"""A committed checkpoint is read in one order: the manifest, the files that it lists, then their content.

In: a folder ``step_N`` or what ``save_weights`` wrote   Out: its state, its tensors   Next: store.py, part_reader.py
Nothing in a checkpoint is run: parallel/shard_files.py opens the pickles that torch's format consists of by a short list of
names, so a checkpoint from elsewhere can be looked at, whatever it holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from safetensors import SafetensorError, safe_open

from sicog_mcore.checkpoint import commit
from sicog_mcore.checkpoint.commit import Manifest
from sicog_mcore.errors import CheckpointError, SicogError
from sicog_mcore.model.layers import EXTRA_STATE
from sicog_mcore.parallel.gather import on_all
from sicog_mcore.parallel.shard_files import METADATA, UNREADABLE, guarded, read_metadata, require_tensors_only
from sicog_mcore.parallel.topology import Topology, WritersFailed

STATE = "state.json"
FORMAT = 1
COMMON = "common.pt"  # what is no tensor; megatron-core 0.19 keeps it among the tensors
KIND = "metadata.json"
KINDS: Mapping[str, object] = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
RANDOM_STATES = "rng/"


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json``: format, and the configuration as a dictionary.

    Raises:
        CheckpointError: it cannot be read, or another version wrote it.
    """
    path = folder / STATE
    content = _read_json(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {content.get('format')}, this version reads {FORMAT}; use the version that wrote it"
        )
    if not isinstance(content.get("experiment"), dict):
        raise CheckpointError(f"{path} holds no configuration (experiment); name another checkpoint")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(commit.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); name another checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds {type(content).__name__}, expected an object with names; name another checkpoint"
        )
    return content


def examine(manifest: Manifest) -> None:
    """Looks into every file of a verified checkpoint, without running or building anything.

    Raises:
        CheckpointError: names the file that holds what it must not, or that is not listed.
    """
    _require_kind(manifest)
    described = read_metadata(manifest.folder / METADATA)
    _require_listed(manifest, described)
    if COMMON in manifest.files:
        require_tensors_only(manifest.folder / COMMON)
    for place in described.storage_data.values():
        require_tensors_only(manifest.folder / place.relative_path, place.offset, place.length)
    for name in manifest.files:
        if name.startswith(RANDOM_STATES):
            _require_safetensors(manifest.folder / name)


def has_shards(manifest: Manifest) -> bool:
    """Whether anything is described that could be loaded."""
    return METADATA in manifest.files


def _require_kind(manifest: Manifest) -> None:
    if KIND not in manifest.files:
        raise CheckpointError(f"{manifest.folder / KIND} is not listed in {commit.MANIFEST}; {manifest.remedy}")
    content = _read_json(manifest.folder / KIND)
    if odd := {name: value for name, value in content.items() if name not in KINDS or KINDS[name] != value}:
        raise CheckpointError(
            f"{manifest.folder / KIND} says {str(odd)[:200]}, expected {dict(KINDS)}; another program wrote this checkpoint"
        )


def _require_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} holds no random states ({error}); use another checkpoint") from error


def _require_listed(manifest: Manifest, described: Any) -> None:
    """Every piece lies in a file that the manifest lists."""
    for index, place in described.storage_data.items():
        name = place.relative_path
        if name not in manifest.files:
            raise CheckpointError(
                f"{manifest.folder / METADATA} places {index.fqn[:80]!r} in {name[:200]!r}, which {commit.MANIFEST} does "
                f"not list; {manifest.remedy}"
            )
        if place.offset + place.length > manifest.size(name):
            raise CheckpointError(
                f"{manifest.folder / METADATA} places {index.fqn[:80]!r} behind the end of {name[:200]!r}; {manifest.remedy}"
            )


def _open(folder: Path) -> Any:
    """Torch's description of a checkpoint whose manifest is right."""
    manifest = commit.read_manifest(folder)
    manifest.check(METADATA)
    if (folder / COMMON).exists():
        require_tensors_only(manifest.check(COMMON))
    manifest.check(KIND)
    _require_kind(manifest)
    described = read_metadata(folder / METADATA)
    _require_listed(manifest, described)
    return described


def stored_tensors(folder: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every tensor; reads no tensor.

    Raises:
        CheckpointError: it cannot be read.
    """
    entries = _open(folder).state_dict_metadata.items()
    return [
        (name, tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for name, entry in entries
        if vars(entry)  # bytes have neither
    ]


def load_shards(state: dict[str, Any], folder: Path, topology: Topology, strict: StrictHandling) -> Any:
    """Megatron's load of a sharded state, under any layout. Collective.

    Args:
        state: what is asked for, as ``sharded_state_dict`` describes it.
        strict: what may be left out, and so what is returned (see ``dist_checkpointing.load``).

    Raises:
        CheckpointError: on every rank, where a file cannot be used, or does not hold what is asked for.
    """
    described = on_all(topology, partial(_open, folder))
    try:
        with guarded(described):
            loaded = dist_checkpointing.load(state, str(folder), strict=strict)
    except SicogError:
        raise
    except CheckpointingException as error:
        raise CheckpointError(f"{folder} does not hold this model: {error}") from error
    except (WritersFailed, *UNREADABLE) as error:
        raise CheckpointError(f"{folder} cannot be read: {first_line(error)}; use another checkpoint") from error
    _require_no_extra_state(loaded[0] if isinstance(loaded, tuple) else loaded, folder)
    return loaded


def _require_no_extra_state(loaded: Mapping[str, Any], folder: Path) -> None:
    """Transformer Engine opens what it kept for fp8 as a pickle; there is none of it in what this project writes."""
    chunks = [chunk for name, chunk in loaded.items() if name.startswith("model") and isinstance(chunk, dict)]
    for chunk in chunks:
        for name, value in chunk.items():
            is_empty = value is None or (isinstance(value, torch.Tensor) and value.numel() == 0)
            if name.endswith(EXTRA_STATE) and not is_empty:
                raise CheckpointError(
                    f"{folder} keeps a state of fp8 in {name}, which would be opened as a pickle; use a checkpoint that was "
                    "trained in bf16 or fp32"
                )


def first_line(error: BaseException) -> str:
    """Extracts the first line of an error, where torch reports a traceback per rank."""
    if isinstance(error, WritersFailed):
        found = "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())
        return found or "another rank failed"  # only one rank is told the details
    return str(error) or type(error).__name__
