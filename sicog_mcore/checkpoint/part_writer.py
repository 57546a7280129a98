"""Writes checkpoints that hold weights only, for runs to start from.

In: the model's chunks under any layout   Out: a committed folder, for ``init.checkpoint``   Next: part_reader.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron.core import dist_checkpointing

from sicog_mcore.checkpoint import commit
from sicog_mcore.checkpoint.failures import WRITE_ERRORS, write_failure
from sicog_mcore.checkpoint.hf import require_free
from sicog_mcore.checkpoint.part_reader import named_chunks, part_entries
from sicog_mcore.checkpoint.store import RunState
from sicog_mcore.checkpoint.targets import PARTS
from sicog_mcore.checkpoint.trusted_files import FORMAT, STATE
from sicog_mcore.config import Experiment
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.gather import on_main
from sicog_mcore.parallel.topology import Topology


def save_weights(
    chunks: Sequence[VisionLanguageModel], experiment: Experiment, topology: Topology, folder: Path
) -> None:
    """Commits a checkpoint of weights alone, for ``init`` to start from. Collective.

    Raises:
        CheckpointError: the folder exists, or it cannot be written; then nothing is there under its name.
    """
    temporary = commit.temporary_folder(folder)

    def prepare() -> None:
        require_free(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        content = {"format": FORMAT, "state": asdict(RunState()), "experiment": experiment.to_dict()}
        (temporary / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # empty, see require_free
        commit.commit(folder)

    state = {name: part_entries(chunk, PARTS, topology) for name, chunk in named_chunks(chunks)}
    on_main(topology, prepare, WRITE_ERRORS)
    try:
        dist_checkpointing.save(state, str(temporary))
    except WRITE_ERRORS as error:
        raise write_failure(folder, error) from error
    on_main(topology, finish, WRITE_ERRORS)
