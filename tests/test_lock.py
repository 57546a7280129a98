"""One run owns a folder: whoever comes second is refused, whoever finds a dead owner takes over, and only one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sicog_mcore import lock as lock_module
from sicog_mcore.errors import EXIT_RETRY, ConfigError, MachineError
from sicog_mcore.lock import LOCK, FolderLock, owned

REPOSITORY = Path(__file__).parents[1]
# Waits for a start signal, takes the lock, says how it went, and holds it until its input ends.
CONTENDER = """
import sys, time
from pathlib import Path
from sicog_mcore.errors import ConfigError
from sicog_mcore.lock import FolderLock
folder, start = Path(sys.argv[1]), Path(sys.argv[2])
lock = FolderLock(folder, "contender")
print("ready", flush=True)
while not start.exists():
    time.sleep(0.0005)
try:
    print("won", lock.acquire(), flush=True)
except ConfigError as error:
    print("refused", error, flush=True)
    sys.exit(2)
sys.stdin.read()
lock.release()
"""


def contend(folder: Path, start: Path, count: int) -> Iterator[subprocess.Popen[str]]:
    """Processes that are ready to take the lock of a folder."""
    for _ in range(count):
        words = [sys.executable, "-c", CONTENDER, str(folder), str(start)]
        process = subprocess.Popen(
            words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout and process.stdout.readline() == "ready\n"
        yield process


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that takes minutes takes moments."""
    for name, seconds in (("BEAT_S", 0.05), ("STALE_AFTER_S", 0.4), ("WATCHED_S", 0.02)):
        monkeypatch.setattr(lock_module, name, seconds)


def leave(folder: Path, **changes: str | int) -> Path:
    """The lock of an owner that is not this process."""
    content = asdict(FolderLock(folder, "python other.py").own) | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps(content))
    return folder / LOCK


def test_a_lock_says_who_holds_it_and_goes_with_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    first, second = FolderLock(folder, "python first.py"), FolderLock(folder, "python second.py")
    assert first.acquire() == ""
    with pytest.raises(ConfigError) as refused:
        second.acquire()
    text = str(refused.value)
    assert f"process {os.getpid()} on {first.own.host} since {first.own.since} UTC (python first.py)" in text
    assert "wait for it or end it, or choose another folder" in text and "\n" not in text.partition(":\n")[2]
    second.release()
    assert json.loads((folder / LOCK).read_text())["token"] == first.own.token
    first.release()
    assert not (tmp_path / "a").exists()
    assert second.acquire() == ""
    (folder / "metrics.jsonl").touch()
    second.release()
    assert [file.name for file in folder.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": "1"}, {"pid": os.getpid(), "started": "7"}])
def test_a_process_that_ended_here_is_succeeded_at_once(tmp_path: Path, changes: dict[str, str | int]) -> None:
    leave(tmp_path, **changes)
    mine = FolderLock(tmp_path, "python next.py")
    note = mine.acquire()
    assert note.startswith("took over the lock of process ") and "(python other.py)" in note
    assert json.loads((tmp_path / LOCK).read_text())["token"] == mine.own.token
    mine.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_a_killed_owner_is_succeeded_also_while_its_parent_has_not_noticed(tmp_path: Path) -> None:
    (start := tmp_path / "start").touch()
    (process,) = contend(tmp_path / "run", start, 1)
    assert says(process).startswith("won")
    with pytest.raises(ConfigError):
        FolderLock(tmp_path / "run", "").acquire()
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but still known: a zombie
    mine = FolderLock(tmp_path / "run", "")
    assert f"process {process.pid} on" in mine.acquire()
    mine.release()
    process.communicate()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("changes", [{"kernel": "another boot pid:[1]", "host": "node7"}, {"kernel": ""}])
def test_an_owner_elsewhere_is_judged_by_its_silence(tmp_path: Path, changes: dict[str, str]) -> None:
    path = leave(tmp_path, **changes)
    began = time.monotonic()
    mine = FolderLock(tmp_path, "python next.py")
    assert mine.acquire().startswith("took over the lock of ")
    assert time.monotonic() - began >= 0.3
    mine.release()
    assert not path.exists() and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_an_owner_elsewhere_that_touches_its_lock_is_respected(tmp_path: Path) -> None:
    path = leave(tmp_path, kernel="another boot", host="node7", pid=11)
    words = [sys.executable, "-c", f"import os, time\nfor _ in range(200): os.utime({str(path)!r}); time.sleep(0.02)"]
    process = subprocess.Popen(words)
    try:
        with pytest.raises(ConfigError, match="process 11 on node7"):
            FolderLock(tmp_path, "").acquire()
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}', "\udcff"])
def test_a_lock_without_sense_is_somebodys_until_it_is_silent(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content, errors="surrogateescape")
    mine = FolderLock(tmp_path, "")
    assert "cannot be read" in mine.acquire()
    mine.release()


@pytest.mark.usefixtures("quick")
def test_a_run_whose_lock_was_taken_ends_before_it_writes_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    mine = FolderLock(tmp_path, "", end=ended.append)
    mine.acquire()
    os.replace(leave(tmp_path / "aside", pid=12, host="node8"), tmp_path / LOCK)
    deadline = time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == [EXIT_RETRY]
    assert "was taken over by process 12 on node8" in capsys.readouterr().err
    mine.release()
    assert "node8" in (tmp_path / LOCK).read_text()  # not ours any more


@pytest.mark.usefixtures("quick")
def test_a_lock_that_somebody_removed_is_taken_again(tmp_path: Path) -> None:
    ended: list[int] = []
    mine = FolderLock(tmp_path, "", end=ended.append)
    mine.acquire()
    (tmp_path / LOCK).unlink()
    deadline = time.monotonic() + 20
    while not (tmp_path / LOCK).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert json.loads((tmp_path / LOCK).read_text())["token"] == mine.own.token and not ended
    mine.release()


@pytest.mark.fault
@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
def test_of_starts_at_the_same_instant_one_wins(tmp_path: Path, stale: bool) -> None:
    folder, start = tmp_path / "run", tmp_path / "start"
    if stale:
        leave(folder, pid=2**22 + 1)
    processes = list(contend(folder, start, 6))
    start.touch()
    answers = [says(process) for process in processes]
    assert sorted(answer.split()[0] for answer in answers) == ["refused"] * 5 + ["won"]
    winner, answer = next(pair for pair in zip(processes, answers, strict=True) if pair[1].startswith("won"))
    assert ("took over" in answer) == stale
    assert json.loads((folder / LOCK).read_text())["pid"] == winner.pid
    for process in processes:
        process.communicate("")
    assert not (folder / LOCK).exists()


def test_without_links_the_lock_is_still_made_in_one_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = FolderLock(tmp_path, "python first.py")
    assert first.acquire() == ""
    with pytest.raises(ConfigError, match="python first.py"):
        FolderLock(tmp_path, "").acquire()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used: Not a directory"):
        FolderLock(tmp_path / "file" / "run", "").acquire()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left on device; make room"):
        FolderLock(tmp_path / "run", "").acquire()


def test_control_characters_in_a_lock_are_shown_as_codes(tmp_path: Path) -> None:
    assert "\x1b" not in str(replace(FolderLock(tmp_path, "").own, command="\x1b[2J"))


def test_only_the_first_rank_locks_and_errors_give_the_lock_back(tmp_path: Path) -> None:
    told: list[str] = []
    with owned(tmp_path, "", told.append, is_owner=False):
        assert not (tmp_path / LOCK).exists()
    leave(tmp_path, pid=2**22 + 1)
    with pytest.raises(KeyboardInterrupt), owned(tmp_path, "", told.append):
        assert (tmp_path / LOCK).exists()
        raise KeyboardInterrupt
    assert not (tmp_path / LOCK).exists() and len(told) == 1 and told[0].startswith("note: took over the lock")
