"""A disk that is full, at the start or at any time, is one message with exit code 75."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.data.quarantine import Quarantine, Rejection
from sicog_mcore.errors import EXIT_CONFIG, EXIT_RETRY, MachineError, SicogError
from sicog_mcore.files import LineFile, append_lines, writing
from sicog_mcore.train import metrics, reference
from sicog_mcore.train.feed import CountingLoader
from sicog_mcore.train.metrics import MetricsLog, drop_steps_from
from tests.train.test_metrics import STATS

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def write_metrics(folder: Path) -> None:
    (folder / metrics.METRICS_FILE).symlink_to(FULL)
    log = MetricsLog.__new__(MetricsLog)
    log._board, log._lines = None, LineFile(folder / metrics.METRICS_FILE)
    try:
        log.write(STATS)
    finally:
        log.close()  # says nothing more


def drop_steps(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    (folder / "metrics.jsonl.partial").symlink_to(FULL)
    try:
        drop_steps_from(path, 2)
    finally:
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and not (folder / "metrics.jsonl.partial").is_symlink()


def record_consumed(folder: Path) -> None:
    loader = CountingLoader.__new__(CountingLoader)
    loader._record, loader._ids = FULL, ["a"]
    loader.take(3)


def record_rejection(folder: Path) -> None:
    Quarantine(FULL, 0.1, 10).record(Rejection("a", "x:1", "json_invalid", "", 0))


def write_reference(folder: Path) -> None:
    append_lines(FULL, list(reference._lines({"a": (0.0, 0.0)})), is_synced=True)


@pytest.mark.parametrize("write", [write_metrics, drop_steps, record_consumed, record_rejection, write_reference])
def test_every_writer_of_a_run_says_that_the_disk_is_full(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot be written: No space left on device; make room") as error:
        write(tmp_path)
    assert error.value.exit_code == EXIT_RETRY


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, EXIT_RETRY),
        (errno.EDQUOT, EXIT_RETRY),
        (errno.EIO, EXIT_RETRY),
        (errno.EACCES, EXIT_CONFIG),
        (errno.EROFS, EXIT_CONFIG),
    ],
)
def test_what_a_disk_raises_has_an_exit_code(number: int, code: int) -> None:
    with pytest.raises(SicogError, match="metrics.jsonl.*cannot be written") as error, writing("metrics.jsonl"):
        raise OSError(number, "as the system words it")
    assert error.value.exit_code == code


def test_other_errors_pass() -> None:
    def fail() -> Any:
        with writing("x"):
            raise KeyError("a")

    with pytest.raises(KeyError):
        fail()
