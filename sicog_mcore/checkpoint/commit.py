"""A checkpoint folder either exists whole or not at all, and says so itself.

Written aside as ``step_N.tmp``; every file is hashed into ``manifest.json`` and synced to disk; then one rename makes it
visible. No file format underneath notices a flipped bit, so the manifest is checked before anything is read.
Next: store.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import xxhash
from safetensors.torch import save_file
from torch import Tensor

from sicog_mcore.errors import CheckpointError

MANIFEST = "manifest.json"
COMMITTED = re.compile(r"^step_(\d{8})$")
UNFINISHED = re.compile(r"^step_\d{8}(\.tmp)?$")
CHUNK_BYTES = 1 << 22
# Differ from run to run although all weights are equal: a random name of the save, and generators that nobody seeded.
NOT_IN_WEIGHTS = (".metadata", "rng/")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def aside(folder: Path) -> Path:
    """Where a checkpoint is written before it is committed."""
    return folder.with_suffix(".tmp")


def committed_steps(root: Path) -> list[int]:
    """Steps with a committed checkpoint, oldest first. Folders that were never committed do not count."""
    if not root.is_dir():
        return []
    matches = (COMMITTED.match(entry.name) for entry in root.iterdir() if (entry / MANIFEST).is_file())
    return sorted(int(match.group(1)) for match in matches if match)


def unfinished_folders(root: Path) -> list[Path]:
    """Leftovers of saves and of removals that were interrupted."""
    if not root.is_dir():
        return []
    entries = sorted(entry for entry in root.iterdir() if entry.is_dir() and UNFINISHED.match(entry.name))
    return [entry for entry in entries if entry.suffix or not (entry / MANIFEST).is_file()]


def commit(folder: Path) -> int:
    """Makes the checkpoint written aside visible under its final name. Returns its size in bytes."""
    temporary = aside(folder)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(temporary)): _fingerprint(path) for path in files}
    text = json.dumps({"files": manifest}, indent=1, sort_keys=True)
    (temporary / MANIFEST).write_text(text, encoding="utf-8")
    for path in [*files, temporary / MANIFEST]:
        _sync(path)
    for path in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        _sync(path)
    os.rename(temporary, folder)
    _sync(folder.parent)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def verify(folder: Path) -> None:
    """Checks every file against the manifest.

    Raises:
        CheckpointError: names the first file that is missing, has another size, or other contents.
    """
    remedy = f"remove {folder} to go on from the checkpoint before it"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read ({error}); {remedy}") from error
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {remedy}")
        size = path.stat().st_size
        found = _fingerprint(path) if size == expected.get("bytes") else {"bytes": size}
        if found != expected:
            raise CheckpointError(f"{path} is damaged: found {found}, expected {expected}; {remedy}")


def fingerprint(folder: Path) -> str:
    """Hash of all that a committed checkpoint says; two equal runs write checkpoints with the same one.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        content = [[name, files[name]] for name in sorted(files) if not name.startswith(NOT_IN_WEIGHTS)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read ({error!r}); name another checkpoint") from error
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


def keep_last(root: Path, count: int) -> list[int]:
    """Removes all but the newest ``count`` committed checkpoints. Returns the steps that were removed."""
    removed = committed_steps(root)[:-count]
    for step in removed:
        folder = step_folder(root, step)
        # Un-commit first: a folder that is half removed must not look like a checkpoint.
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)
    return removed


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file that whoever may enter the folder may read; the library leaves it to the owner alone."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
