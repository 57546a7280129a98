"""A rank that gets no further ends, says who is missing, and shows where it stood; one that does anything at all goes on."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.errors import EXIT_RETRY, CheckpointError, MachineError
from sicog_mcore.parallel import watch as watch_module
from sicog_mcore.parallel.watch import RankWatch, Sign, describe, is_peer_failure

REPOSITORY = Path(__file__).parents[2]
GLOO = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"
CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:28033"


class Store:
    """A store in memory with the methods of torch's store that the watch needs."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
        return self.values.setdefault(key, wanted).encode()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become hundredths of them."""
    for name, seconds in (
        ("LOOK_EVERY_S", 0.02),
        ("MARGIN_S", 0.1),
        ("LOOKS_COUNT_S", 0.06),
        ("SPEAKER_FIRST_S", 0.05),
    ):
        monkeypatch.setattr(watch_module, name, seconds)


def watched(store: Any, folder: Path | None, timeout_s: float = 0.3) -> tuple[RankWatch, threading.Event, list[int]]:
    """A watch of this thread as rank 0 of 2; what it ended with, and an event that is set then."""
    ended, codes = threading.Event(), list[int]()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    return RankWatch(0, 2, timeout_s, store, folder, end), ended, codes


@pytest.mark.usefixtures("quick")
def test_a_silence_ends_with_who_is_missing_and_all_stacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store()
    RankWatch(1, 2, 0.3, store)._show()  # rank 1 gave one sign, and no second
    watch, ended, codes = watched(store, tmp_path)
    watch.beat("step 4")
    watch.start(lambda: not codes)
    assert ended.wait(30) and codes == [EXIT_RETRY]
    said = capsys.readouterr().err
    assert said.startswith("error: rank 0 has waited ") and "in step 4" in said
    assert f"no sign of life from rank 1 (process {os.getpid()} on" in said
    assert f"stacks of the ranks that wait: {tmp_path / 'stacks-*.txt'}; the same command resumes" in said
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert stacks.startswith("rank 0, process ") and "test_a_silence_ends_with_who_is_missing" in stacks


@pytest.mark.usefixtures("quick")
def test_only_the_first_rank_that_notices_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store()
    store.set("watch/speaker", "1")
    watch, ended, codes = watched(store, tmp_path)
    watch.start(lambda: not codes)
    assert ended.wait(30) and codes == [EXIT_RETRY] and capsys.readouterr().err == ""
    assert (tmp_path / "stacks-0.txt").exists()


@pytest.mark.usefixtures("quick")
def test_a_store_that_is_silent_too_does_not_keep_the_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "ASKING_S", 0.1)
    store = Store()
    monkeypatch.setattr(store, "compare_set", lambda *_: time.sleep(60))
    watch, ended, codes = watched(store, tmp_path)
    watch.start(lambda: not codes)
    assert ended.wait(30) and "cannot be found out, for the ranks' store is silent too" in capsys.readouterr().err


def spin() -> None:
    sum(range(1000))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", ["beats", "work", "disk"])
def test_progress_of_any_kind_is_no_silence(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()
    watch, ended, _ = watched(Store(), tmp_path)
    if what == "disk":
        moved = itertools.count(0, 2 << 20)
        monkeypatch.setattr(watch, "_work", lambda: (0.0, next(moved)))
    watch.start(lambda: not is_over.is_set())
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        if what == "beats":
            watch.beat()
            ended.wait(0.02)
        elif what == "work":
            spin()  # always met at the same place
        else:
            ended.wait(0.02)
    is_over.set()
    assert not ended.is_set() and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_machine_that_slept_has_not_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sleep = time.monotonic, time.sleep
    jumps = [0.0]

    def jump(seconds: float) -> None:
        jumps[0] += 1000 if jumps[0] == 0 else 0
        sleep(seconds)

    fake: Any = type(time)("time")
    fake.monotonic, fake.sleep = lambda: clock() + jumps[0], jump
    for name in ("strftime", "clock_gettime", "pthread_getcpuclockid"):
        setattr(fake, name, getattr(time, name))
    monkeypatch.setattr(watch_module, "time", fake)
    watch, ended, codes = watched(Store(), tmp_path, timeout_s=5)
    watch.start(lambda: not codes)
    assert not ended.wait(0.5) and jumps == [1000]
    codes.append(0)


def test_one_rank_waits_for_nobody() -> None:
    before = set(threading.enumerate())
    RankWatch(0, 1, 1.0, Store()).start(lambda: True)
    assert set(threading.enumerate()) <= before  # those of other tests may end meanwhile


def _raise(error: BaseException, cause: BaseException | None = None) -> Callable[[], None]:
    def act() -> None:
        raise error from cause

    return act


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "act",
    [
        _raise(RuntimeError(GLOO)),
        _raise(RuntimeError(CLOSED)),
        _raise(CheckpointError("checkpoint x cannot be written; make room"), RuntimeError(CLOSED)),
        _raise(MachineError("another rank failed"), OSError(GLOO)),
    ],
)
def test_a_collective_that_failed_is_one_message(act: Callable[[], None], tmp_path: Path) -> None:
    store = Store()
    RankWatch(1, 2, 0.3, store)._show()
    watch, _, _ = watched(store, tmp_path)
    watch._show()
    watch.beat("the save of step 4")
    with pytest.raises(MachineError) as caught, watch.explaining():
        act()
    assert caught.value.exit_code == EXIT_RETRY and caught.value.is_said_by(is_main=False)
    assert "rank 0 lost another rank in the save of step 4: no sign of life from rank 1" in str(caught.value)
    assert "gloo/transport" in (tmp_path / "stacks-0.txt").read_text()
    with pytest.raises(MachineError) as second, watched(store, tmp_path)[0].explaining():
        act()
    assert second.value.is_said_by(is_main=True)  # the same rank has the word
    third = RankWatch(1, 2, 0.3, store, tmp_path)
    with pytest.raises(MachineError) as other, third.explaining():
        act()
    assert not other.value.is_said_by(is_main=False) and not other.value.is_said_by(is_main=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        OSError(28, "No space left on device"),
        BrokenPipeError(32, "Broken pipe"),
        CheckpointError("step_00000003 is damaged"),
        ValueError(GLOO),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert not is_peer_failure(error)
    with pytest.raises(type(error)) as caught, RankWatch(0, 2, 1.0).explaining():
        raise error
    assert caught.value is error


def test_a_single_rank_has_no_peer_to_lose() -> None:
    with pytest.raises(RuntimeError, match="gloo") as caught, RankWatch(0, 1, 1.0).explaining():
        raise RuntimeError(CLOSED)
    assert not isinstance(caught.value, MachineError)


def test_who_is_missing_is_told_apart_from_who_differs() -> None:
    def sign(count: int, phase: str = "step 3", place: str = "train/step.py:9, f") -> Sign:
        return Sign(count, phase, place, "node1", 40 + count)

    two = [sign(1), sign(5)]
    assert describe([*two, None], [sign(2), sign(6), None], 0) == "rank 2 has not started yet"
    text = describe(two, [sign(2), sign(5)], 0)
    assert text.startswith("no sign of life from rank 1 (process 45 on node1) since step 3 (train/step.py:9, f)")
    assert describe(two, [sign(2), sign(6)], 0) == "all ranks live; they all wait at the same place"
    text = describe(two, [sign(2), sign(6, "step 2", "data/loader.py:1, g")], 0)
    assert text == "all ranks live; rank 1 is in step 2 (data/loader.py:1, g)"
    assert "rank 0" in describe(two, [sign(1), sign(6)], 1)  # whoever asks lives


CHILD = """
import sys, time
from sicog_mcore.parallel.watch import watch_parent
watch_parent(speaks=True)
watch_parent(speaks=True)
print("watching", flush=True)
time.sleep(120)
"""
PARENT = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
os._exit(0)
"""


@pytest.mark.fault
def test_a_rank_ends_when_its_launcher_has_gone() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    began = time.monotonic()
    said, errors = parent.communicate(timeout=60)  # ends when the child, which holds standard error, has ended
    assert errors == f"error: torchrun (process {parent.pid}) is gone, so its ranks stop; {watch_module.RESUME}\n"
    assert said.strip().isdecimal() and time.monotonic() - began < 60
