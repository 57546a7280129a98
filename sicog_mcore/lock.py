"""The lock of an output folder: one run owns it, a second start respects that, and a crash does not hold it for ever.

In: a folder   Out: ``.lock`` in it while the run lives: host, process, since when, command   Next: launcher.py
Imports nothing heavy: it is taken before anything heavy is imported and before anything in the folder is touched. flock is
not trusted, for some shared file systems keep it to one machine: a file that is created in one act is the lock, its owner
touches it every few seconds, and where the owner cannot be looked up as a process its silence decides.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from sicog_mcore.errors import (
    EXIT_RETRY,
    ConfigError,
    ConfigProblem,
    MachineError,
    SicogError,
    is_machine_fault,
    printable,
)
from sicog_mcore.files import move, sync

LOCK = ".lock"
BEAT_S = 3.0  # between two touches by the owner
STALE_AFTER_S = 180.0  # silence by the file system's clock; shared file systems show a new time up to a minute late
WATCHED_S = 1.0  # between two looks at the lock of another machine
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
SHOWN = 160  # characters of a command in a message
DEAD_STATES = ("Z", "X")  # of a process that only its parent still knows


@dataclass(frozen=True)
class Owner:
    """The owner of a lock.

    Attributes:
        kernel: this start of the machine's kernel and the name space of process numbers in it; empty where unknown.
        started: when the process began, in ticks since the kernel did; a number that came into use again has another.
        since: when the lock was taken, UTC.
        token: of this lock alone.
    """

    host: str
    pid: int
    kernel: str
    started: str
    since: str
    command: str
    token: str

    def __str__(self) -> str:
        command = self.command if len(self.command) <= SHOWN else f"{self.command[:SHOWN]} ..."
        return printable(f"process {self.pid} on {self.host} since {self.since} UTC ({command})")

    @property
    def is_gone(self) -> bool | None:
        """True if the process has ended, False if it lives; None if that cannot be seen from here."""
        # A process number means something only on the machine, and in the name space, that gave it.
        if not self.kernel or self.kernel != _kernel():
            return None
        return _process_start(self.pid) != self.started


def _this_process(command: str) -> Owner:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, _kernel(), _process_start(pid), now, command, secrets.token_hex(8))


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """Empty if there is no such process, or only what is left of it."""
    try:
        # The name of the program stands in brackets and may hold spaces and brackets: what counts starts behind the
        # last one.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in DEAD_STATES else rest[18]
    except (OSError, IndexError, ValueError):
        return ""


class FolderLock:
    """The lock of one folder, held between ``acquire`` and ``release``.

    Args:
        folder: made if it does not exist.
        command: what the user typed, for whoever finds the folder locked.
        end: called, after a message, with an exit code when somebody else has taken the lock: this run must not write on.
    """

    def __init__(self, folder: Path, command: str, end: Callable[[int], object] = os._exit) -> None:
        self.path = folder / LOCK
        self.own = _this_process(command)
        self._end = end
        self._stop = threading.Event()
        self._made: list[Path] = []

    def acquire(self) -> str:
        """Takes the lock; returns a line about an owner that had not given it back, or nothing.

        The lock of a process on this machine is judged at once. That of another machine is watched: as soon as it is
        touched it is respected, and when nobody has touched it for STALE_AFTER_S it is taken over.

        Raises:
            ConfigError: another process holds it, or the folder cannot be used.
            MachineError: the disk is full or fails.
        """
        try:
            self._made = _make_folder(self.path.parent)
            note = self._take(self.path)
            self._remove_leftovers()
        except OSError as error:
            self._unmake()
            raise self._unusable(error) from error
        threading.Thread(target=self._keep, name="lock", daemon=True).start()
        return note

    def release(self) -> None:
        """Gives the lock back, if it is still this one's; a folder that was made and stayed empty goes too."""
        self._stop.set()
        with suppress(OSError):
            if _read(self.path) == self.own:
                self.path.unlink()
        self._unmake()

    def _take(self, path: Path) -> str:
        while not self._create(path):
            found = _read(path)
            if found is None:
                continue  # it was given back just now
            if not self._outlived(path, found):
                raise self._held(found)
            # Whoever replaces a stale lock holds the lock on that lock, so only one does. Who was slower finds another
            # owner here.
            successor = path.with_name(f"{LOCK}.after-{found.token}")
            self._take(successor)
            try:
                if _read(path) == found:
                    self._replace(path)
                    return f"took over the lock of {found}, which has ended without giving it back"
            finally:
                successor.unlink(missing_ok=True)
        return ""

    def _create(self, path: Path) -> bool:
        """Makes the lock file, whole, in one act; False if there is one."""
        temporary = self._write_temporary(path)
        try:
            # A link appears with its content and fails if the name exists: no reader ever sees half a lock.
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return self._create_empty(path)  # a file system without links
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create_empty(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self.own)) + "\n")
        return True

    def _replace(self, path: Path) -> None:
        move(self._write_temporary(path), path)

    def _write_temporary(self, path: Path) -> Path:
        temporary = path.with_name(f"{LOCK}.new-{self.own.token}")
        temporary.write_text(json.dumps(asdict(self.own)) + "\n", encoding="utf-8")
        sync(temporary)
        return temporary

    def _outlived(self, path: Path, owner: Owner) -> bool:
        """Whether the owner is gone; where it is a process of another machine, this may take STALE_AFTER_S."""
        if owner.is_gone is not None:
            return owner.is_gone
        probe = self.path.with_name(f"{LOCK}.clock-{self.own.token}")
        first = None
        try:
            while True:
                # Both times are given by the file system, whatever the clocks of the machines say.
                probe.write_text("\n")
                touched = path.stat().st_mtime
                first = touched if first is None else first
                if touched != first or _read(path) != owner:
                    return False
                if probe.stat().st_mtime - touched > STALE_AFTER_S:
                    return True
                time.sleep(WATCHED_S)
        except FileNotFoundError:
            return False  # it was given back while we looked: the next try says by whom it is held now
        finally:
            probe.unlink(missing_ok=True)

    def _keep(self) -> None:
        """Touches the lock until it is given back; ends the run when it belongs to somebody else."""
        while not self._stop.wait(BEAT_S):
            with suppress(OSError):  # a file system may fail for a while
                # Also tells whether the lock was taken: a process that was stopped for minutes may have been taken for
                # dead.
                found = _read(self.path)
                if found is None and not self._stop.is_set() and self._create(self.path):
                    continue  # somebody has removed it, and nobody else has taken it
                if found == self.own:
                    os.utime(self.path)
                elif not self._stop.is_set() and (thief := _read(self.path)) != self.own:
                    text = f"error: {self.path} was taken over by {thief}; this run ends before it writes more\n"
                    sys.stderr.write(text)
                    sys.stderr.flush()
                    self._end(EXIT_RETRY)
                    return

    def _remove_leftovers(self) -> None:
        """Removes files that killed starts have left; nobody looks at them any more now that the lock is another one."""
        for leftover in self.path.parent.glob(f"{LOCK}.after-*"):
            leftover.unlink(missing_ok=True)

    def _held(self, owner: Owner) -> SicogError:
        problem = f"is in use by another run: {owner}"
        fix = (
            "wait for it or end it, or choose another folder; if it is surely gone, its lock "
            f"{self.path} is taken over {STALE_AFTER_S:.0f} s after its last sign of life"
        )
        return ConfigError([ConfigProblem("output", str(self.path.parent), problem, fix)])

    def _unusable(self, error: OSError) -> SicogError:
        text = f"{self.path.parent} cannot be used: {error.strerror or error}"
        if is_machine_fault(error):
            return MachineError(f"{text}; make room or repair the file system, then run the same command again")
        return ConfigError([ConfigProblem("output", str(self.path.parent), text, "choose a folder you may write to")])

    def _unmake(self) -> None:
        with suppress(OSError):  # it holds something
            for folder in reversed(self._made):
                folder.rmdir()


def _make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns the new ones, the highest first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _read(path: Path) -> Owner | None:
    """Reads the owner of a lock; None if nobody holds it.

    A lock that says nothing sensible is somebody's: it is being written, or was written by another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return Owner(**{item.name: content[item.name] for item in fields(Owner)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return Owner("an unknown machine", 0, "", "", "an unknown time", "a lock that cannot be read", "unreadable")


@contextmanager
def owned(folder: Path, command: str, notice: Callable[[str], object], is_owner: bool = True) -> Iterator[None]:
    """Holds the lock of a folder, where ``is_owner``, as the first of several ranks is.

    Args:
        notice: is told of a lock that was taken over.

    Raises:
        ConfigError: another process holds it, or the folder cannot be used.
        MachineError: the disk is full or fails.
    """
    if not is_owner:
        yield
        return
    lock = FolderLock(folder, command)
    if note := lock.acquire():
        notice(f"note: {note}")
    try:
        yield
    finally:
        lock.release()
