"""The watch of a rank: it looks after the launcher, and says who is missing when the ranks get no further.

In: the store through which the ranks met   Out: a message, the stacks of the ranks that wait, exit code 75
Used by: topology.py, launcher.py
Progress is a beat (a phase of the run began, a collective of ours ended), a main thread whose stack has moved or that used
its processor since the last look, or a disk that was read or written. So a long compilation, a long save, a long forward
pass all count, and one call that waits for ever does not.
Importing this file costs nothing; torch stays behind the store.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sicog_mcore.errors import EXIT_RETRY, MachineError, printable

LOOK_EVERY_S = 1.0
MARGIN_S = 10.0  # collectives fail by themselves after the timeout, with a better message; then comes this watch
LOOKS_COUNT_S = 3.0  # most that one look adds to a silence: a machine that slept has not waited
BUSY = 0.2  # share of a look's time on the processor that counts as progress
BUSY_BYTES = 1 << 20  # between two looks; the beats of a lock are much less
SIGNS_PER_S = 2000  # of all ranks together, so that the store has time for others
ASKING_S = 10.0  # most time to find out who is missing
SPEAKER_FIRST_S = 5.0
STACKS = "stacks-{}.txt"
PARENT = "parent"  # name of the thread that looks after the launcher
RESUME = "the same command resumes from the newest checkpoint"
PACKAGE = "sicog_mcore"
# How gloo and NCCL word, in a plain RuntimeError, that another rank has gone or is silent.
PEER_WORDS = (
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
)
TRANSPORTS = ("gloo", "NCCL", "TCPStore", "socket")


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life, written every second.

    Attributes:
        count: of signs so far; a rank whose count stands still is stopped, dead, or cut off.
        phase: of the run.
        place: where its main thread is in our code.
    """

    count: int
    phase: str
    place: str
    host: str
    pid: int


def watch_parent(speaks: bool, end: Callable[[int], object] = os._exit) -> None:
    """Ends this process when its launcher has gone: nobody would end it any more, or notice how it ends.

    Safe to call more than once.

    Args:
        speaks: whether this rank says so.
    """
    if _parent_watch() is None:
        ParentWatch(speaks, end).start()


class ParentWatch(threading.Thread):
    """The thread that looks after the launcher."""

    def __init__(self, speaks: bool, end: Callable[[int], object]) -> None:
        super().__init__(name=PARENT, daemon=True)
        self.parent, self._speaks, self._end_process = os.getppid(), speaks, end

    @property
    def sees_nobody(self) -> bool:
        return os.getppid() != self.parent

    def run(self) -> None:
        while not self.sees_nobody:
            time.sleep(LOOK_EVERY_S)
        if self._speaks:
            _say(f"error: torchrun (process {self.parent}) is gone, so its ranks stop; {RESUME}")
        self._end_process(EXIT_RETRY)


def _parent_watch() -> ParentWatch | None:
    return next((thread for thread in threading.enumerate() if isinstance(thread, ParentWatch)), None)


def _leave_it_to_parent_watch() -> None:
    """Lets the parent watch speak first: a launcher that goes takes the ranks' store along, and collectives fail early."""
    watch, deadline = _parent_watch(), time.monotonic() + LOOK_EVERY_S
    while watch is not None and time.monotonic() < deadline:
        if watch.sees_nobody:
            watch.join(SPEAKER_FIRST_S)  # it ends this process
            return
        time.sleep(LOOK_EVERY_S / 20)


class RankWatch:
    """Notices that this rank gets no further, and finds out which rank keeps it.

    Args:
        rank, world_size: of this process.
        timeout_s: ``parallel.timeout_s``; MARGIN_S later the watch ends the rank.
        store: with ``set``, ``get``, ``check`` and ``compare_set``, common to all ranks; used by the watch's threads alone.
        folder: for the stacks; without it they go to standard error.
        end: called with the exit code, by a thread of the watch.
        spins: whether waiting uses the processor, as waiting for a GPU does; then its use is no progress.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_s: float,
        store: Any = None,
        folder: Path | None = None,
        end: Callable[[int], object] = os._exit,
        spins: bool = False,
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._store, self._folder, self._end = store, folder, end
        self._main = threading.get_ident()
        # The processor time of the main thread alone: loader and watch threads work on while it waits.
        self._clock = None if spins else time.pthread_getcpuclockid(self._main)
        self._beats, self._phase = 0, "start"
        self._is_active: Callable[[], bool] = lambda: False
        self._pid, self._host = os.getpid(), socket.gethostname()
        self._signs = 0
        self._ends = threading.Lock()

    def beat(self, phase: str = "") -> None:
        """The run got on; ``phase`` names what begins now, in words for people."""
        self._beats += 1
        if phase:
            self._phase = phase

    def start(self, is_active: Callable[[], bool]) -> None:
        """Begins to watch the calling thread, for as long as ``is_active``; a single rank has nobody to wait for."""
        if self.world_size == 1 or self._store is None:
            return
        self._is_active = is_active
        self._show()
        for target in (self._show_signs, self._look_for_silence):
            threading.Thread(target=target, name="watch", daemon=True).start()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turns the failure of a collective inside into one message.

        Raises:
            MachineError: another rank has gone, or kept this one waiting.
        """
        try:
            yield
        except Exception as error:
            if self.world_size == 1 or not is_peer_failure(error):
                raise
            raise self._failure(error) from error  # also where a save took it for an error of its own

    def _failure(self, error: BaseException) -> MachineError:
        _leave_it_to_parent_watch()
        with self._ends:  # the silence that the watch would end is over
            where = self._write_stacks("".join(traceback.format_exception(error)))
            speaks, missing = self._ask()
            if not speaks:
                time.sleep(SPEAKER_FIRST_S)  # this rank shows that it lives, as long as another finds out who does
            reason = " ".join(str(error).split())
            text = f"rank {self.rank} lost another rank in {self._phase}: {missing}{where}; {RESUME} ({reason})"
            failure = MachineError(text)
            failure.said_elsewhere = not speaks
            return failure

    def _show_signs(self) -> None:
        every = max(LOOK_EVERY_S, self.world_size / SIGNS_PER_S)
        while self._is_active():
            try:
                self._show()
            except RuntimeError:
                return  # the store has gone with its rank; the collectives will say so
            time.sleep(every)

    def _show(self) -> None:
        self._signs += 1
        sign = Sign(self._signs, self._phase, self._place()[0], self._host, self._pid)
        self._store.set(_key(self.rank), json.dumps(asdict(sign)))

    def _look_for_silence(self) -> None:
        seen: object = None
        silence_s, before = 0.0, time.monotonic()
        worked, moved = self._work()
        while self._is_active():
            time.sleep(LOOK_EVERY_S)
            now = time.monotonic()
            # A look that comes late, since the machine slept or the process was stopped, counts little: it is no
            # waiting.
            silence_s, before = silence_s + min(now - before, LOOKS_COUNT_S), now
            found = (self._beats, self._place()[1])
            work, moves = self._work()
            # A long computation in C leaves the stack as it is, but uses the processor; a long save moves bytes.
            is_busy = work - worked > BUSY * LOOK_EVERY_S or moves - moved > BUSY_BYTES
            worked, moved = work, moves
            if found != seen or is_busy:
                seen, silence_s = found, 0.0
            # Never given back once taken: either the main thread explains a failed collective, or this one ends the
            # rank, not both.
            elif silence_s >= self.timeout_s + MARGIN_S and self._ends.acquire(blocking=False):
                if self._is_active():
                    self._give_up(silence_s)
                return

    def _give_up(self, silence_s: float) -> None:
        place = self._place()[0]
        where = self._write_stacks("")
        speaks, missing = self._ask()
        if speaks:
            waited = f"rank {self.rank} has waited {silence_s:.0f} s in {self._phase} ({place})"
            _say(f"error: {waited}: {missing}{where}; {RESUME}")
        else:
            time.sleep(SPEAKER_FIRST_S)  # torchrun ends all ranks as soon as one has ended
        self._end(EXIT_RETRY)

    def _place(self) -> tuple[str, Sequence[tuple[int, int]]]:
        """Where the watched thread is in our code, and its whole stack as numbers that change when it moves."""
        frame = sys._current_frames().get(self._main)
        place, stack = "", []
        while frame is not None:
            # Code object and instruction: cheap to take every second, and different as soon as the thread moves.
            stack.append((id(frame.f_code), frame.f_lasti))
            file = frame.f_code.co_filename
            # The innermost frame of our package, but for this file, is what a person wants to know.
            if not place and f"{os.sep}{PACKAGE}{os.sep}" in file and not file.endswith("watch.py"):
                place = f"{file.rpartition(PACKAGE + os.sep)[2]}:{frame.f_lineno}, {frame.f_code.co_name}"
            frame = frame.f_back
        return place or "outside of its code", stack

    def _work(self) -> tuple[float, int]:
        """Seconds of the processor that the watched thread used so far, and bytes between this process and disks."""
        seconds = time.clock_gettime(self._clock) if self._clock is not None else 0.0
        try:
            lines = Path("/proc/self/io").read_text().splitlines()
        except OSError:
            return seconds, 0
        return seconds, sum(int(line.split()[1]) for line in lines if line.startswith(("read_bytes", "write_bytes")))

    def _write_stacks(self, failure: str) -> str:
        """Writes what all threads of this rank do; returns where, as part of a message."""
        title = f"rank {self.rank}, process {self._pid} on {self._host}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {self._phase}"
        try:
            if self._folder is None:
                raise FileNotFoundError
            path = self._folder / STACKS.format(self.rank)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{title}\n{failure}")
                file.flush()
                faulthandler.dump_traceback(file)
            return f"; stacks of the ranks that wait: {self._folder / STACKS.format('*')}"
        except OSError:
            sys.stderr.write(printable(f"{title}\n{failure}"))
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            return ""

    def _ask(self) -> tuple[bool, str]:
        """Returns whether this rank is the one that speaks, and a text on who is missing."""
        answers: list[tuple[bool, str]] = []
        # The store lives on one of the ranks. Where that one is stopped, its calls block, so they get a thread and a
        # deadline.
        asking = threading.Thread(target=lambda: answers.append(self._ask_store()), daemon=True)
        asking.start()
        asking.join(ASKING_S)
        return (
            answers[0] if answers else (True, "who is missing cannot be found out, for the ranks' store is silent too")
        )

    def _ask_store(self) -> tuple[bool, str]:
        try:
            # The first rank to write its number speaks; the others read that number and stay silent: one message, not
            # one per rank.
            speaks = self._store.compare_set("watch/speaker", "", str(self.rank)) == str(self.rank).encode()
            if not speaks:
                return False, ""
            # Two looks, more than two periods apart: a rank that lives has counted on in between.
            before = self._read_signs()
            time.sleep(2 * max(LOOK_EVERY_S, self.world_size / SIGNS_PER_S) + LOOK_EVERY_S / 2)
            return True, describe(before, self._read_signs(), self.rank)
        except RuntimeError:
            return True, "who is missing cannot be found out, for the ranks' store has gone"

    def _read_signs(self) -> list[Sign | None]:
        keys = [_key(rank) for rank in range(self.world_size)]
        return [Sign(**json.loads(self._store.get(key))) if self._store.check([key]) else None for key in keys]


def describe(before: Sequence[Sign | None], after: Sequence[Sign | None], own: int) -> str:
    """Describes which ranks gave no sign of life between two looks, or how those that live differ.

    Args:
        before, after: the sign of each rank; None where it has given none.
        own: the rank that asks, which lives.
    """
    absent = [rank for rank, sign in enumerate(after) if sign is None]
    silent = [
        (rank, now)
        for rank, (then, now) in enumerate(zip(before, after, strict=True))
        if rank != own and then and now and then.count == now.count
    ]
    parts = [f"rank {rank} has not started yet" for rank in absent]
    parts += [
        f"no sign of life from rank {rank} (process {sign.pid} on {sign.host}) since {sign.phase} ({sign.place}): "
        "stopped, killed, or cut off"
        for rank, sign in silent
    ]
    if parts:
        return "; ".join(parts)
    elsewhere = [
        f"rank {rank} is in {sign.phase} ({sign.place})"
        for rank, sign in enumerate(after)
        if sign and rank != own and (after[own] is None or (sign.phase, sign.place) != _where(after[own]))
    ]
    return "all ranks live; " + ("; ".join(elsewhere) or "they all wait at the same place")


def _where(sign: Sign | None) -> tuple[str, str]:
    return (sign.phase, sign.place) if sign else ("", "")


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that a collective failed because of another rank or of the network."""
    while error is not None:
        # By name, since torch is not imported here.
        if any(parent.__name__ == "DistError" for parent in type(error).__mro__):
            return True
        text = str(error)
        # Gloo and NCCL raise plain RuntimeErrors. A wording alone would also fit a broken pipe of our own.
        is_told = any(word in text for word in PEER_WORDS) and any(word in text for word in TRANSPORTS)
        if is_told and isinstance(error, RuntimeError | OSError):
            return True
        error = error.__cause__
    return False


def _key(rank: int) -> str:
    return f"watch/{rank}"


def _say(text: str) -> None:
    """One line, even where nobody reads it any more."""
    try:
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()
    except OSError:
        pass
