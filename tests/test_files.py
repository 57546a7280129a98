"""A file is whole or not there, a full disk is one message, and every other error stays what it was."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from sicog_mcore import files
from sicog_mcore.cognition.generation.record_parts import PartWriter, open_parts
from sicog_mcore.cognition.records import Scores, read_records, write_records
from sicog_mcore.cognition.scoring.vectors import VectorStore
from sicog_mcore.errors import CheckpointError, ConfigError, MachineError, exit_code, is_machine_fault
from sicog_mcore.files import (
    CHUNK_BYTES,
    TAIL_BYTES,
    LineFile,
    append_lines,
    commit_folder,
    cut_torn_line,
    disk_faults,
    hash_bytes,
    hash_chunks,
    hash_file,
    hash_json,
    made_folder,
    move,
    whole_file,
    whole_folder,
    write_json,
)
from tests.cognition.generation.test_generate import record
from tests.disks import full_after


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [full(), KeyboardInterrupt(), ValueError("x")])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(MachineError if isinstance(error, OSError) else type(error)), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    with (
        pytest.raises(MachineError, match=r"new/er/b cannot be written: No space left"),
        whole_file(tmp_path / "new" / "er" / "b"),
    ):
        raise full()
    with pytest.raises(MachineError), whole_folder(tmp_path / "folder") as _:
        (tmp_path / "folder" / "half").write_text("x")
        raise full()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_holds_something_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError), made_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_text("x")
        raise ValueError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_device_that_is_full_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="/dev/full cannot be written: No space left on device; make room") as caught:
        with disk_faults(Path("/dev/full")), open("/dev/full", "w") as file:
            file.write("x")
    assert caught.value.exit_code == 75
    with pytest.raises(FileNotFoundError), disk_faults(tmp_path):
        (tmp_path / "none").read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "x"), 75),
        (OSError(errno.EDQUOT, "x"), 75),
        (OSError(errno.EIO, "x"), 75),
        (OSError("Worker failure: [Errno 28] No space left on device"), 75),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 75),
        (MachineError("x"), 75),
        (CheckpointError("it cannot be written: [Errno 28] No space left on device"), 75),
        (FileNotFoundError(errno.ENOENT, "x"), 2),
        (PermissionError(errno.EACCES, "x"), 2),
        (CheckpointError("line 28 is damaged"), 2),
        (ConfigError([]), 2),
        (ValueError("x"), 2),
    ],
)
def test_only_what_may_be_otherwise_later_is_told_to_be_tried_again(error: Exception, code: int) -> None:
    assert exit_code(error) == code
    assert is_machine_fault(error) or code == 2 or isinstance(error, MachineError)


def test_records_vectors_and_stamps_leave_nothing_half_written(tmp_path: Path) -> None:
    class Embedder:
        name = "ones"

        def embed(self, texts: object) -> np.ndarray:
            return np.ones((3, 4096), np.float32)

    with full_after(4096):
        for suffix in ("jsonl", "parquet"):
            many = (Scores(f"{i * 7919:x}" * 9, "hand", agreement=1 / (i + 1)) for i in range(2000))
            with pytest.raises(MachineError, match=f"s.{suffix} cannot be written"):
                write_records(tmp_path / "a" / f"s.{suffix}", many)
        with pytest.raises(MachineError, match="npy cannot be written"):
            list(VectorStore(tmp_path / "v", Embedder()).fill("abc"))  # type: ignore[arg-type]
        with pytest.raises(MachineError):
            write_json(tmp_path / "steps" / "a.json", "x" * 5000, shared=True)
    assert list(tmp_path.rglob("*")) == []


def test_half_a_record_on_a_full_disk_is_cut_off_and_the_others_stay(tmp_path: Path) -> None:
    open_parts(tmp_path, {})
    with full_after(4096), pytest.raises(MachineError, match="00000.jsonl cannot be written"):
        with PartWriter(tmp_path, "00000") as part:
            for number in range(100):
                part.commit(record(str(number)))
    path = tmp_path / "parts" / "00000.jsonl"
    assert path.stat().st_size == 4096
    done = open_parts(tmp_path, {})
    assert 0 < len(done) < 100 and len(list(read_records(path, type(record("x"))))) == len(done)


def test_what_is_appended_stands_whole_whoever_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    with LineFile(path) as file:
        file.append('{"a": "\u00e4"}')
        assert path.read_bytes() == b'{"a": "\xc3\xa4"}\n'  # not only when it is closed
        append_lines(path, ["b", "c"], is_synced=True)
        file.append("d", is_synced=True)
    append_lines(path, [])
    assert path.read_text().splitlines()[1:] == ["b", "c", "d"]


def test_a_line_that_a_full_disk_refuses_is_one_message(tmp_path: Path) -> None:
    with full_after(4), pytest.raises(MachineError, match="log cannot be written: File too large; make room") as caught:
        append_lines(tmp_path / "log", ["12345678"])
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("torn", [0, 1, TAIL_BYTES - 1, TAIL_BYTES, 3 * TAIL_BYTES + 7])
@pytest.mark.parametrize("whole", [b"", b"a\n", b"a\nbc\n"])
def test_only_a_torn_last_line_is_cut(tmp_path: Path, whole: bytes, torn: int) -> None:
    path = tmp_path / "log"
    path.write_bytes(whole + b"x" * torn)
    cut_torn_line(path)
    assert path.read_bytes() == whole


def test_a_hash_is_of_the_bytes_however_they_are_read(tmp_path: Path) -> None:
    data = bytes(range(256)) * (CHUNK_BYTES // 256) + b"rest"
    (tmp_path / "a").write_bytes(data)
    assert hash_file(tmp_path / "a") == hash_bytes(data) == hash_chunks([data[:7], b"", data[7:]])
    # Stored in manifests, records and build records: these values may never change.
    assert hash_bytes(b"") == "99aa06d3014798d86001c324468d497f"
    assert hash_json({"b": [1], "a": "\u00e4"}) == hash_json({"a": "\u00e4", "b": [1]})
    assert hash_json({"a": "\u00e4", "b": [1]}) == hash_bytes(b'{"a": "\\u00e4", "b": [1]}')


def test_a_folder_is_shown_once_all_in_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, synced = tmp_path / "a.tmp", list[str]()
    (temporary / "below").mkdir(parents=True)
    (temporary / "below" / "file").write_text("x")

    def note(path: Path) -> None:
        synced.append(path.relative_to(tmp_path).as_posix())
        assert (tmp_path / "a").exists() == (path == tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", note)
        commit_folder(temporary, tmp_path / "a")
    assert synced == ["a.tmp/below/file", "a.tmp/below", "a.tmp", "."]
    assert (tmp_path / "a" / "below" / "file").read_text() == "x" and not temporary.exists()
    (tmp_path / "b").write_text("old")
    move(tmp_path / "a" / "below" / "file", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "x"


def test_a_file_system_that_cannot_sync_folders_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", refuse)
    files.sync(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(tmp_path / "a")
