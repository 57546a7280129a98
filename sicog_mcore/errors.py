"""The errors that a user can cause or meet, each with the exit code that a job script may act on.

Error text says what was found, what was expected, and the remedy.
"""

from __future__ import annotations

import errno
import signal
from dataclasses import dataclass

EXIT_OK = 0
EXIT_CONFIG = 2  # wrong configuration or input: do not retry
EXIT_GIVE_UP = 17  # too many bad samples, or a diverged run: do not retry
EXIT_RETRY = 75  # the machine failed, not the run: a full disk, a dead peer, a hang; the same command may work later
EXIT_CRASH = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell reports Ctrl-C
# Error numbers of a disk, or of a limit of the machine, that may be otherwise later. A wrong path is none of these.
MACHINE_ERRNOS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)
IN_TEXT = ("(os error {})", "[Errno {}]")  # how an errno stands in what libraries, or other ranks, tell

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)  # a matter of rights: trying again changes nothing


@dataclass(frozen=True)
class ConfigProblem:
    """One thing wrong with the configuration: where, what was found, and what to do about it."""

    path: str  # dotted path, e.g. "parallel.tensor"
    value: object
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path} = {self.value!r}: {self.problem}; {self.fix}"


def printable(text: object) -> str:
    """The text as a terminal may get it.

    Whatever would steer it (escape sequences, control and direction characters, halves of characters) is shown as its code,
    the way Python writes it. Line ends and tabs stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in str(text))


class SicogError(Exception):
    """Base of all errors that are reported as one clear message, without a traceback."""

    exit_code = EXIT_CRASH
    same_on_all_ranks = True  # then only rank 0 prints it
    said_elsewhere = False  # another rank prints it; set on an error, not on a class

    def is_said_by(self, is_main: bool) -> bool:
        """Whether the rank that has this error prints it."""
        return (is_main or not self.same_on_all_ranks) and not self.said_elsewhere


class ConfigError(SicogError):
    """The configuration cannot work; carries every problem found, not only the first."""

    exit_code = EXIT_CONFIG

    def __init__(self, problems: list[ConfigProblem]):
        self.problems = problems
        noun = "problem" if len(problems) == 1 else "problems"
        lines = [f"{len(problems)} configuration {noun}:"] + [f"  - {p}" for p in problems]
        super().__init__("\n".join(lines))


class SampleError(SicogError):
    """One sample cannot be used. ``reason`` is a stable code that is counted and logged."""

    def __init__(self, reason: str, detail: str):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # crosses process borders in loader workers
        return SampleError, (self.reason, self.detail)


class DataError(SicogError):
    """The data as a whole cannot be used (too many bad samples, nothing left to train on)."""

    exit_code = EXIT_GIVE_UP
    same_on_all_ranks = False


class PeerError(DataError):
    """Another rank of this replica met the error and reports it; this one only stops with it."""

    same_on_all_ranks = True


class TrainingError(SicogError):
    """The run itself went wrong (a loss that is not a number); trying again from the same state would repeat it."""

    exit_code = EXIT_GIVE_UP


class MachineError(SicogError):
    """The machine failed, not the run: a full disk, a peer that died, a collective that hung. Trying again can work."""

    exit_code = EXIT_RETRY
    same_on_all_ranks = False


class CheckpointError(SicogError):
    """A checkpoint is missing, damaged, or does not fit this run."""

    exit_code = EXIT_CONFIG


class RecordError(SicogError):
    """A file of the self-improvement loop is missing, damaged, or of another version."""

    exit_code = EXIT_CONFIG


def is_machine_fault(error: BaseException) -> bool:
    """Whether an error is a full disk, a broken one, or a used-up limit of the machine, also where a library wrapped it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in MACHINE_ERRNOS
    return any(form.format(number) in str(error) for form in IN_TEXT for number in MACHINE_ERRNOS)


def exit_code(error: BaseException) -> int:
    """The exit code of an error that ends a command with one message."""
    if isinstance(error, SicogError):
        # A checkpoint error is often the wrapper of a full disk, and that one is worth another try.
        causes = (error, error.__cause__) if isinstance(error, CheckpointError) else ()
        return EXIT_RETRY if any(cause and is_machine_fault(cause) for cause in causes) else error.exit_code
    return EXIT_RETRY if is_machine_fault(error) else EXIT_CONFIG


class WriteError(MachineError, CheckpointError):
    """A checkpoint could not be written because a disk or a process failed; what was there before is untouched."""
