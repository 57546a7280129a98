"""A file is whole or not there, a full disk is one message, and every other error stays what it was."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from sicog_mcore.cognition.generation.record_parts import PartWriter, open_parts
from sicog_mcore.cognition.records import Scores, read_records, write_records
from sicog_mcore.cognition.scoring.vectors import VectorStore
from sicog_mcore.errors import CheckpointError, ConfigError, MachineError, exit_code, is_machine_fault
from sicog_mcore.files import disk_faults, made_folder, whole_file, whole_folder, write_json
from tests.cognition.generation.test_generate import record
from tests.disks import full_after


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as aside:
        aside.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [full(), KeyboardInterrupt(), ValueError("x")])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(MachineError if isinstance(error, OSError) else type(error)), whole_file(path) as aside:
        aside.write_text("half")
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
