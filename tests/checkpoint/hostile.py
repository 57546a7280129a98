"""Checkpoints that want to run a program, or that are none: a real one, changed in one place and committed again."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sicog_mcore.checkpoint import commit

EVIL = "evil.distcp"


class Payload:
    """Runs a harmless command wherever its pickle is opened: a file with the name of the marker appears."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Evaluated(Payload):
    """The same, and what comes out is what a reader expects."""

    def __init__(self, marker: Path, content: bytes):
        super().__init__(marker)
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        code = f"(__import__('pathlib').Path({str(self.marker)!r}).touch(), __import__('pickle').loads({self.content!r}))[1]"
        return eval, (code,)


class Call:
    """Pickles as the call of a function by its dotted name."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def recommit(folder: Path) -> None:
    """A manifest that is right for what the folder holds now."""
    (folder / commit.MANIFEST).unlink(missing_ok=True)
    os.rename(folder, commit.temporary_folder(folder))
    commit.commit(folder)


def _metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def _write_metadata(folder: Path, value: Any) -> None:
    (folder / ".metadata").write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))


def reduce_system(folder: Path, marker: Path) -> None:
    _write_metadata(folder, Payload(marker))


def eval_that_gives_the_real_thing(folder: Path, marker: Path) -> None:
    _write_metadata(folder, Evaluated(marker, (folder / ".metadata").read_bytes()))


def getattr_chain(folder: Path, marker: Path) -> None:
    module = b"cbuiltins\n__import__\n(S'os'\ntR"
    _write_metadata(folder, b"cbuiltins\ngetattr\n(" + module + f"S'system'\ntR(S'touch {marker}'\ntR.".encode())


def getattr_of_an_allowed_class(folder: Path, marker: Path) -> None:
    """From a class that may be named to ``os`` through the globals of its methods."""
    method = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadataIndex\nS'__init__'\ntR"
    spaces = b"cbuiltins\ngetattr\n(" + method + b"S'__globals__'\ntR"
    _write_metadata(folder, b"cbuiltins\ngetattr\n(" + spaces + b"S'get'\ntR(S'os'\ntR.")


def in_the_state_of_an_allowed_class(folder: Path, marker: Path) -> None:
    content = _metadata(folder)
    content.planner_data = Payload(marker)
    _write_metadata(folder, content)


def as_a_place_in_a_file(folder: Path, marker: Path) -> None:
    content = _metadata(folder)
    next(iter(content.storage_data.values())).relative_path = Payload(marker)
    _write_metadata(folder, content)


def load_from_bytes(folder: Path, marker: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer, _use_new_zipfile_serialization=False)
    _write_metadata(folder, Call(torch.storage._load_from_bytes, buffer.getvalue()))


def subprocess_by_its_class(folder: Path, marker: Path) -> None:
    """No function at all: making an object of a class is enough."""
    import subprocess

    _write_metadata(folder, Call(subprocess.Popen, ["touch", str(marker)]))


def changed_class(folder: Path, marker: Path) -> None:
    """Names only what may be named, but sets an attribute of a class, for the whole process."""
    name = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    _write_metadata(folder, b"\x80\x02" + name + b"(N}X\x03\x00\x00\x00oddK\x01stb.")


def in_common(folder: Path, marker: Path) -> None:
    torch.save({"a": Payload(marker)}, folder / "common.pt")


def in_common_of_the_old_kind(folder: Path, marker: Path) -> None:
    torch.save({"a": Payload(marker)}, folder / "common.pt", _use_new_zipfile_serialization=False)


def _replace_item(folder: Path, is_wanted: Callable[[str], bool], value: Any) -> None:
    """One item of the shards becomes another, in a file of its own."""
    content = _metadata(folder)
    index, place = next((index, place) for index, place in content.storage_data.items() if is_wanted(index.fqn))
    torch.save(value, folder / EVIL)
    place.relative_path, place.offset, place.length = EVIL, 0, (folder / EVIL).stat().st_size
    _write_metadata(folder, content)


def in_a_tensor(folder: Path, marker: Path) -> None:
    _replace_item(folder, lambda name: name.endswith("final_layernorm.weight"), Payload(marker))


def in_an_object_among_the_shards(folder: Path, marker: Path) -> None:
    """Hides a program in a state that Megatron unpickles in full: of a layer, or in 0.19 of all but tensors."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    content = _metadata(folder)
    name = next((n for n in content.state_dict_metadata if "_extra_state" in n), "common_state/shard_0_1")
    content.state_dict_metadata[name] = BytesStorageMetadata()
    content.storage_data[MetadataIndex(name)] = next(iter(content.storage_data.values()))
    _write_metadata(folder, content)
    _replace_item(folder, lambda found: found == name, [Payload(marker)])


def as_megatron_019_writes_it(folder: Path, marker: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    (folder / "common.pt").unlink(missing_ok=True)
    content, name = _metadata(folder), "common_state/shard_0_1"
    content.state_dict_metadata[name] = BytesStorageMetadata()
    content.storage_data[MetadataIndex(name)] = next(iter(content.storage_data.values()))
    _write_metadata(folder, content)
    _replace_item(folder, lambda found: found == name, [{"optimizer": Payload(marker)}])
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def pickle_as_random_state(folder: Path, marker: Path) -> None:
    (folder / "rng" / "rank_00000.safetensors").write_bytes(pickle.dumps(Payload(marker)))


def outside_of_the_folder(folder: Path, marker: Path) -> None:
    content = _metadata(folder)
    torch.save(Payload(marker), folder.parent.parent / EVIL)
    next(iter(content.storage_data.values())).relative_path = f"../../{EVIL}"
    _write_metadata(folder, content)


def link_to_the_outside(folder: Path, marker: Path) -> None:
    torch.save({"a": Payload(marker)}, folder.parent.parent / "elsewhere.pt")
    (folder / "common.pt").unlink(missing_ok=True)
    (folder / "common.pt").symlink_to(folder.parent.parent / "elsewhere.pt")


def another_back_end(folder: Path, marker: Path) -> None:
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "common_backend": "torch"}')


def odd_state(folder: Path, marker: Path) -> None:
    (folder / "state.json").write_text("[" * 100_000)


def state_without_configuration(folder: Path, marker: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"format": 1, "state": [], "experiment": []}))


def shard_that_is_gone(folder: Path, marker: Path) -> None:
    (folder / "__0_0.distcp").unlink()


HOSTILE: Mapping[str, Callable[[Path, Path], None]] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            *(reduce_system, eval_that_gives_the_real_thing, getattr_chain, getattr_of_an_allowed_class),
            *(in_the_state_of_an_allowed_class, as_a_place_in_a_file, load_from_bytes, subprocess_by_its_class),
            *(changed_class, in_common, in_common_of_the_old_kind, in_a_tensor, in_an_object_among_the_shards),
            *(as_megatron_019_writes_it, pickle_as_random_state, outside_of_the_folder, link_to_the_outside),
            *(another_back_end, odd_state, state_without_configuration, shard_that_is_gone),
        )
    }
)


def make_hostile(name: str, run: Path, source: Path, marker: Path) -> Path:
    """A run whose only checkpoint is the source, made hostile. Returns the checkpoint's folder."""
    folder = run / "checkpoints" / source.name
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(source, folder)
    HOSTILE[name](folder, marker)
    recommit(folder)
    return folder
