"""Why a save failed decides what people do next: make room, choose another folder, or just start again."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sicog_mcore.checkpoint.failures import failure_of, write_failure
from sicog_mcore.errors import EXIT_CONFIG, EXIT_RETRY, CheckpointError, MachineError
from sicog_mcore.parallel.topology import WritersFailed
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks


class DistError(RuntimeError):
    """As in torch.distributed."""


class DistBackendError(DistError):
    """As in torch.distributed."""


def by_writer(failure: BaseException) -> WritersFailed:
    return WritersFailed("write", {1: (failure, None)})  # type: ignore[dict-item]


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:39063"


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room", EXIT_RETRY),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room", EXIT_RETRY),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "make room", 75),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
            "make room or check",
            75,
        ),
        (by_writer(OSError(errno.ENOSPC, "No space left on device")), "rank 1: .*make room", EXIT_RETRY),
        (OSError(errno.EIO, "Input/output error"), "check the disk", EXIT_RETRY),
        (OSError(errno.ESTALE, "Stale file handle"), "check the disk", EXIT_RETRY),
        (PermissionError(errno.EACCES, "Permission denied"), "you may write to", EXIT_CONFIG),
        (OSError(errno.EROFS, "Read-only file system"), "you may write to", EXIT_CONFIG),
        (by_writer(PermissionError(errno.EACCES, "Permission denied")), "you may write to", EXIT_CONFIG),
        (RuntimeError(GLOO), "another rank", EXIT_RETRY),
        (
            RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms"),
            "another rank",
            75,
        ),
        (DistBackendError("NCCL communicator was aborted on rank 3"), "another rank", EXIT_RETRY),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "process that writes", EXIT_RETRY),
        (EOFError(), "process that writes", EXIT_RETRY),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "process that writes", EXIT_RETRY),
        (by_writer(RuntimeError("results_queue should not be empty")), "process that writes", EXIT_RETRY),
        (by_writer(ValueError("anything")), "process that writes", EXIT_RETRY),
    ],
)
def test_a_cause_has_its_remedy_and_exit_code(error: BaseException, said: str, code: int, tmp_path: Path) -> None:
    found = write_failure(tmp_path / "step_00000002", error)
    with pytest.raises(type(found), match=f"step_00000002 cannot be written: .*{said}"):
        raise found
    assert found.exit_code == code
    assert ("make room" in str(found)) == ("make room" in said or "check the disk" in said)


def test_a_full_disk_is_an_error_of_checkpoints_and_of_the_machine(tmp_path: Path) -> None:
    found = write_failure(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(found, CheckpointError) and isinstance(found, MachineError)
    assert not isinstance(write_failure(tmp_path, RuntimeError(GLOO)), CheckpointError)


def test_a_mistake_in_a_program_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        failure_of(RuntimeError("shape mismatch"))


def _die_in_a_save(rank: Rank, experiment: Any, out: Path) -> None:
    from sicog_mcore.build import build_model, plan_build
    from sicog_mcore.checkpoint import store

    checkpoints = store.CheckpointStore(experiment, rank.start(experiment.parallel))
    model = build_model(plan_build(experiment), checkpoints.topology)
    model.allocate_optimizer_state()
    checkpoints.save(model, store.RunState(1))
    if rank.rank == 1:
        store.save_rng = lambda path: os._exit(9)
    try:
        checkpoints.save(model, store.RunState(2))
    except MachineError as error:
        out.write_text(f"{error.exit_code} {error} | {sorted(path.name for path in checkpoints.root.iterdir())}")
    os._exit(0)


@pytest.mark.fault
@pytest.mark.slow
def test_a_rank_that_dies_in_a_save_is_not_a_full_disk(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, parallel={"timeout_s": 30}, train={"packs_per_step": 2})
    with pytest.raises(RuntimeError, match="ranks died with exit codes .0, 9."):
        run_ranks(_die_in_a_save, 2, experiment, tmp_path / "outcome")
    said = (tmp_path / "outcome").read_text()
    assert said.startswith("75 ") and "another rank" in said and "make room" not in said
    assert said.endswith("['step_00000001']")
