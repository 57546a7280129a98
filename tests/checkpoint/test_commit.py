"""A checkpoint folder exists whole or not at all; what is damaged is named; old ones go last."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sicog_mcore import files
from sicog_mcore.checkpoint import commit
from sicog_mcore.checkpoint.store import Found, find_checkpoint
from sicog_mcore.config import CheckpointConfig
from sicog_mcore.errors import EXIT_CONFIG, CheckpointError

FILES = {"common.pt": b"groups", "rng/rank_00000.safetensors": b"\x00" * 40, "__0_0.distcp": bytes(range(256)) * 9}
NO_CHECKPOINTS = ("step_1", "step_000000012", "latest", "step_00000007.bak", "step_0000000x")


def write_aside(root: Path, step: int) -> Path:
    """A checkpoint of which everything is written but the commit."""
    folder = commit.step_folder(root, step)
    for name, content in FILES.items():
        path = commit.temporary_folder(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def committed(root: Path, *steps: int) -> list[Path]:
    folders = [write_aside(root, step) for step in steps]
    for folder in folders:
        commit.commit(folder)
    return folders


def interrupt(*_: Path) -> None:
    raise KeyboardInterrupt


def test_a_commit_makes_the_whole_folder_visible_and_tells_its_size(tmp_path: Path) -> None:
    folder = write_aside(tmp_path, 3)
    assert commit.committed_steps(tmp_path) == []
    size = commit.commit(folder)
    assert commit.committed_steps(tmp_path) == [3] and not commit.temporary_folder(folder).exists()
    assert size == sum(map(len, FILES.values())) + (folder / commit.MANIFEST).stat().st_size
    commit.verify(folder)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 3)
    (folder / commit.MANIFEST).unlink()
    assert commit.committed_steps(tmp_path) == []
    assert commit.unfinished_folders(tmp_path) == [folder]
    with pytest.raises(CheckpointError, match="manifest.json cannot be read .* remove .*step_00000003"):
        commit.verify(folder)


def test_a_save_killed_before_the_rename_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(tmp_path, 5)
    folder = write_aside(tmp_path, 10)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "replace", interrupt)
        commit.commit(folder)
    assert commit.committed_steps(tmp_path) == [5]
    assert commit.unfinished_folders(tmp_path) == [commit.temporary_folder(folder)]
    found = find_checkpoint(tmp_path, CheckpointConfig())
    assert found == Found(5, ("ignored step_00000010.tmp: its save or its removal was interrupted",))


def test_other_names_are_ignored(tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 20)
    for name in NO_CHECKPOINTS:
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "step_00000001").write_text("a file")
    (tmp_path / "step_00000002.tmp").write_text("a file")
    assert commit.committed_steps(tmp_path) == [20]
    assert commit.unfinished_folders(tmp_path) == []
    assert commit.keep_last(tmp_path, 1) == []
    assert all((tmp_path / name).is_dir() for name in NO_CHECKPOINTS)


def test_a_missing_root_has_no_checkpoints(tmp_path: Path) -> None:
    assert commit.committed_steps(tmp_path / "none") == commit.unfinished_folders(tmp_path / "none") == []


@pytest.mark.parametrize("name", FILES)
def test_missing_and_truncated_files_are_named(name: str, tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 1)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    text = re.escape(str(folder / name))
    with pytest.raises(CheckpointError, match=f"{text} is damaged: found .*{len(content) - 1}.*remove"):
        commit.verify(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{text} is missing"):
        commit.verify(folder)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_and_the_file_named(name: str, tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 1)
    content = (folder / name).read_bytes()
    draw = random.Random(0)
    for bit in draw.sample(range(8 * len(content)), 40):
        flip(folder / name, content, bit)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(folder / name))} is damaged"):
            commit.verify(folder)
    (folder / name).write_bytes(content)
    commit.verify(folder)


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 1)
    content = (folder / commit.MANIFEST).read_bytes()
    for bit in range(8 * len(content)):
        flip(folder / commit.MANIFEST, content, bit)
        with pytest.raises(CheckpointError):
            commit.verify(folder)


def flip(path: Path, content: bytes, bit: int) -> None:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


def test_keep_last_removes_the_oldest(tmp_path: Path) -> None:
    committed(tmp_path, 1, 5, 10, 100_000)
    assert commit.keep_last(tmp_path, 2) == [1, 5]
    assert commit.committed_steps(tmp_path) == [10, 100_000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00100000"]


def test_a_removal_that_is_interrupted_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = committed(tmp_path, 1, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(commit.shutil, "rmtree", interrupt)
        commit.keep_last(tmp_path, 1)
    assert old.is_dir() and commit.committed_steps(tmp_path) == [2]
    assert commit.unfinished_folders(tmp_path) == [old]
    commit.verify(new)


@pytest.mark.parametrize(("resume", "step"), [("auto", None), ("must", CheckpointError), ("never", None)])
def test_without_a_checkpoint_only_must_refuses(resume: str, step: object, tmp_path: Path) -> None:
    write_aside(tmp_path, 4)
    found = find_checkpoint(tmp_path, CheckpointConfig(resume=resume))  # type: ignore[arg-type]
    if step is CheckpointError:
        assert isinstance(found, CheckpointError) and "'must'" in str(found) and "'auto'" in str(found)
    else:
        assert found == Found(None, ("ignored step_00000004.tmp: its save or its removal was interrupted",))


@pytest.mark.parametrize(("resume", "step"), [("auto", 8), ("must", 8), ("never", CheckpointError)])
def test_with_checkpoints_the_newest_is_taken_unless_never(resume: str, step: object, tmp_path: Path) -> None:
    committed(tmp_path, 4, 8)
    found = find_checkpoint(tmp_path, CheckpointConfig(resume=resume))  # type: ignore[arg-type]
    if step is CheckpointError:
        assert isinstance(found, CheckpointError) and "step 8" in str(found) and found.exit_code == EXIT_CONFIG
    else:
        assert found == Found(8, ())


def test_a_damaged_newest_checkpoint_stops_the_search_with_its_name(tmp_path: Path) -> None:
    folder = committed(tmp_path, 4, 8)[1]
    (folder / "common.pt").unlink()
    found = find_checkpoint(tmp_path, CheckpointConfig())
    assert isinstance(found, CheckpointError) and f"{folder / 'common.pt'} is missing" in str(found)
    shutil.rmtree(folder)  # the remedy that the message gives
    assert find_checkpoint(tmp_path, CheckpointConfig()) == Found(4, ())


def test_tensors_are_readable_for_whom_the_folder_is(tmp_path: Path) -> None:
    for mode in (0o755, 0o770, 0o700):
        tmp_path.chmod(mode)
        file = tmp_path / f"{mode}.safetensors"
        commit.write_tensors(file, {"a": torch.arange(6.0).reshape(2, 3).T})
        assert file.stat().st_mode & 0o777 == mode & 0o666
        assert torch.equal(load_file(file)["a"], torch.arange(6.0).reshape(2, 3).T)


def test_equal_weights_have_an_equal_fingerprint(tmp_path: Path) -> None:
    def fingerprint_with(root: str, name: str, content: bytes) -> str:
        write_aside(tmp_path / root, 1)
        folder = commit.step_folder(tmp_path / root, 1)
        path = commit.temporary_folder(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        commit.commit(folder)
        return commit.fingerprint(folder)

    first = fingerprint_with("a", "rng/rank_00000.safetensors", b"1")
    assert fingerprint_with("b", "rng/rank_00000.safetensors", b"2") == first
    assert fingerprint_with("c", ".metadata", b"3") == first
    assert fingerprint_with("d", "__0_0.distcp", b"4") != first
    with pytest.raises(CheckpointError, match="cannot be read"):
        commit.fingerprint(tmp_path)


def listing(name: str = "common.pt", size: str = "6", digest: str = f'"{"0" * 32}"', more: str = "") -> str:
    return f'{{"files": {{"{name}": {{"bytes": {size}, "xxh3": {digest}{more}}}}}}}'


NAMES = ("../x", "/etc/passwd", ".", "", "a/../b", "a//b", "./a", "a\\\\b", "a\\u0000b", "manifest.json/..")
ODD_MANIFESTS = (
    *("", "[]", "null", "3", '"files"', "{}", '{"files": {}}', '{"files": []}', '{"files": null}', '{"files": "x"}'),
    *('{"files": {"common.pt": "x"}}', '{"files": {"common.pt": {}}}', '{"files": {"common.pt": null}}'),
    *(listing(size=size) for size in ('"6"', "true", "-1", "6.0", "null", "[6]", "9" * 5000)),
    *(listing(digest=digest) for digest in ("6", '"abc"', "null", '["x"]')),
    *(listing(name) for name in NAMES),
    *(listing(), listing(more=', "more": 1'), listing(more=', "xxh3": 1'), listing()[:-2] + ', "a": {}}}'),
    *("[" * 100_000, '{"files": ' * 50_000, "\ufeff{}", "NaN", '{"files": NaN}'),
)


@pytest.mark.parametrize("text", ODD_MANIFESTS, ids=lambda text: text[:40])
def test_an_odd_manifest_is_one_error(text: str, tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 1)
    (folder / commit.MANIFEST).write_text(text)
    for read in (commit.verify, commit.fingerprint):
        with pytest.raises(CheckpointError, match=re.escape(str(folder / commit.MANIFEST))) as error:
            read(folder)
        assert len(str(error.value)) < 1000
    assert isinstance(find_checkpoint(tmp_path, CheckpointConfig()), CheckpointError)


def test_a_manifest_that_is_no_file_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, fourth = committed(tmp_path, 1, 2, 3, 4)
    text = (first / commit.MANIFEST).read_bytes()
    (first / commit.MANIFEST).rename(tmp_path / "elsewhere.json")
    (first / commit.MANIFEST).symlink_to(tmp_path / "elsewhere.json")
    (second / commit.MANIFEST).write_bytes(b"\xff\xfe" + text)
    (third / commit.MANIFEST).unlink()
    os.mkfifo(third / commit.MANIFEST)  # whoever opens it waits for ever
    monkeypatch.setattr(commit, "LARGEST_JSON", len(text) - 1)
    for folder in (first, second, third, fourth):
        with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
            commit.verify(folder)


def test_a_flipped_bit_that_makes_two_names_one_is_found(tmp_path: Path) -> None:
    """Names that differ in one bit: a flip makes two entries one, and the other file would go unchecked."""
    folder = commit.step_folder(tmp_path, 1)
    commit.temporary_folder(folder).mkdir(parents=True)
    for number in range(2):
        (commit.temporary_folder(folder) / f"__{number}_0.distcp").write_bytes(b"same")
    commit.commit(folder)
    content = (folder / commit.MANIFEST).read_bytes()
    for bit in range(8 * len(content)):
        flip(folder / commit.MANIFEST, content, bit)
        with pytest.raises(CheckpointError):
            commit.read_manifest(folder)


def test_a_manifest_of_an_earlier_version_is_read_and_told(tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 1)
    files = dict(commit.read_manifest(folder).files)
    (folder / commit.MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True))
    assert not commit.verify(folder).has_checksum
    found = find_checkpoint(tmp_path, CheckpointConfig())
    assert isinstance(found, Found) and found.step == 1 and "earlier version" in found.notes[0]
    assert commit.fingerprint(folder) == commit.fingerprint(committed(tmp_path / "new", 1)[0])
    (folder / commit.MANIFEST).write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match="checksum"):
        commit.verify(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_link_is_not_followed(name: str, tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 1)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        commit.verify(folder)


def test_a_linked_folder_is_not_followed(tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 1)
    (folder / "rng").rename(tmp_path / "elsewhere")
    (folder / "rng").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        commit.verify(folder)


def test_a_file_that_is_not_listed_is_not_opened(tmp_path: Path) -> None:
    (folder,) = committed(tmp_path, 1)
    (folder / "more.pt").write_bytes(b"x")
    commit.verify(folder)
    with pytest.raises(CheckpointError, match="more.pt is not listed"):
        commit.read_manifest(folder).check("more.pt")
