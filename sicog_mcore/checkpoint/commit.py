"""Commits checkpoint folders: a folder exists whole or not at all, and a manifest in it proves so.

It is written under a temporary name, ``step_N.tmp``; every file is hashed into ``manifest.json`` and synced to disk; then
one rename makes it visible. No file format underneath notices a flipped bit, so the manifest, which has a checksum of its
own, is checked before anything is read. A file that it does not list is never opened.
Next: trusted_files.py (what the files hold), store.py
"""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sicog_mcore.errors import CheckpointError
from sicog_mcore.files import commit_folder, hash_bytes, hash_file, hash_json

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
COMMITTED = re.compile(r"^step_(\d{8})$")
UNFINISHED = re.compile(r"^step_\d{8}(\.tmp)?$")
LARGEST_JSON = 1 << 26  # manifests and states are far below it; a file that is not could fill the memory
HASH = re.compile(r"[0-9a-f]{32}")
# Differ from run to run although all weights are equal: a random name of the save, and generators that nobody seeded.
NOT_IN_WEIGHTS = (".metadata", "rng/")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def temporary_folder(folder: Path) -> Path:
    """Returns the temporary folder in which a checkpoint is written before it is committed."""
    return folder.with_suffix(".tmp")


def committed_steps(root: Path) -> list[int]:
    """Lists steps with a committed checkpoint, oldest first. Folders that were never committed do not count."""
    if not root.is_dir():
        return []
    # A folder of the right name without a manifest was left by a removal that was interrupted.
    matches = (COMMITTED.match(entry.name) for entry in root.iterdir() if (entry / MANIFEST).is_file())
    return sorted(int(match.group(1)) for match in matches if match)


def unfinished_folders(root: Path) -> list[Path]:
    """Lists leftovers of saves and of removals that were interrupted."""
    if not root.is_dir():
        return []
    entries = sorted(entry for entry in root.iterdir() if entry.is_dir() and UNFINISHED.match(entry.name))
    return [entry for entry in entries if entry.suffix or not (entry / MANIFEST).is_file()]


def commit(folder: Path) -> int:
    """Gives the temporary folder of a checkpoint its final name. Returns its size in bytes."""
    temporary = temporary_folder(folder)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(temporary)): _fingerprint(path) for path in files}
    (temporary / MANIFEST).write_text(_render(manifest), encoding="utf-8")
    commit_folder(temporary, folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Manifest:
    """The list of the files of a committed folder.

    Attributes:
        files: size and hash of each, by its path in the folder.
        has_checksum: False where an earlier version wrote it; then a damaged manifest may go unnoticed.
    """

    folder: Path
    files: Mapping[str, Mapping[str, int | str]]
    has_checksum: bool

    @property
    def remedy(self) -> str:
        return _remedy(self.folder)

    def size(self, name: str) -> int:
        """Returns the bytes of a listed file."""
        return int(self.files[name]["bytes"])

    def check(self, name: str) -> Path:
        """Returns the path of one file, once its contents are found to be those that were committed.

        Raises:
            CheckpointError: the file is not listed, missing, a link, or has another size or other contents.
        """
        path, expected = self.folder / name, self.files.get(name)
        if expected is None:
            raise CheckpointError(f"{path} is not listed in {MANIFEST}, so it is not opened; {self.remedy}")
        # A link on any level could lead out of the checkpoint, to a file that no manifest describes.
        steps = [self.folder / part for part in (*map(str, PurePosixPath(name).parents), name) if part != "."]
        if any(step.is_symlink() for step in steps):
            raise CheckpointError(f"{path} is a link, expected a file of the checkpoint itself; {self.remedy}")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {self.remedy}")
        try:
            size = path.stat().st_size
            # A wrong size needs no hash: a file of 30 GB that was cut off is named at once.
            found = _fingerprint(path) if size == expected["bytes"] else {"bytes": size}
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); {self.remedy}") from error
        if found != expected:
            raise CheckpointError(f"{path} is damaged: found {found}, expected {dict(expected)}; {self.remedy}")
        return path


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a committed folder and checks its own checksum; no other file is opened.

    Raises:
        CheckpointError: the manifest cannot be read, is damaged, or is none.
    """
    path = folder / MANIFEST
    try:
        text = read_text(path)
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); {_remedy(folder)}") from error
    if not isinstance(content, dict) or not isinstance(files := content.get("files"), dict) or not files:
        found = f"{type(content).__name__} {text[:40]!r}"
        raise CheckpointError(f"{path} is no manifest: found {found}, expected files; {_remedy(folder)}")
    if odd := [name for name, entry in files.items() if not (_is_inside(name) and _is_entry(entry))]:
        raise CheckpointError(
            f"{path} is no manifest: it lists {odd[0][:80]!r} with {str(files[odd[0]])[:80]}, expected a file in the "
            f"folder with bytes and xxh3; {_remedy(folder)}"
        )
    # What was written is compared, not only what it means: a flipped bit may also hide in a name that occurs twice.
    if text not in (_render(files), _render_without_checksum(files)):
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its contents; {_remedy(folder)}")
    return Manifest(folder, files, text == _render(files))


def read_text(path: Path) -> str:
    """Reads a small text file that is no link and no device.

    Raises:
        OSError: the file cannot be read. ValueError: the file is something else, too large, or not UTF-8.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_JSON:
        raise ValueError(f"expected a file of at most {LARGEST_JSON >> 20} MiB and no link")
    return path.read_text(encoding="utf-8")


def verify(folder: Path) -> Manifest:
    """Checks every file against the manifest.

    Raises:
        CheckpointError: names the first file that is missing, has another size, or other contents.
    """
    manifest = read_manifest(folder)
    for name in manifest.files:
        manifest.check(name)
    return manifest


def fingerprint(folder: Path) -> str:
    """Returns a hash of the contents of a committed checkpoint; two equal runs write checkpoints with the same hash.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    files = read_manifest(folder).files
    content = [[name, files[name]] for name in sorted(files) if not name.startswith(NOT_IN_WEIGHTS)]
    return hash_json(content)


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
    """Writes a safetensors file that everyone with access to the folder can read; the library lets the owner alone."""
    from safetensors.torch import save_file  # imports torch, which whoever only looks for checkpoints does not need

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def _remedy(folder: Path) -> str:
    return f"remove {folder} to go on from the checkpoint before it"


def _render(files: Mapping[str, Any]) -> str:
    """Returns the text of a manifest, with the hash of its list."""
    digest = hash_bytes(_render_without_checksum(files).encode())
    return json.dumps({"files": files, "xxh3": digest}, indent=1, sort_keys=True)


def _render_without_checksum(files: Mapping[str, Any]) -> str:
    return json.dumps({"files": files}, indent=1, sort_keys=True)  # as earlier versions wrote it


def _is_inside(name: str) -> bool:
    """Tells whether a name can only mean a file in the folder."""
    path = PurePosixPath(name)
    is_plain = bool(path.parts) and str(path) == name and "\0" not in name and "\\" not in name
    return is_plain and not path.is_absolute() and ".." not in path.parts


def _is_entry(entry: Any) -> bool:
    is_pair = isinstance(entry, dict) and entry.keys() == {"bytes", "xxh3"}
    return is_pair and type(entry["bytes"]) is int and entry["bytes"] >= 0 and _is_hash(entry["xxh3"])


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def _fingerprint(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
