"""Reads parts of our own checkpoints as first weights.

In: a folder ``step_N``, the output folder of a run, or what ``save_weights`` wrote   Out: parameters filled in place
Any layout, any of the three parts; optimizer state, data position and random states are left alone.
Next: part_writer.py (checkpoints that hold weights only), store.py, which resumes whole runs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.validation import StrictHandling

from sicog_mcore.checkpoint import commit
from sicog_mcore.checkpoint.finite import FiniteWatch
from sicog_mcore.checkpoint.locate import find_folder
from sicog_mcore.checkpoint.targets import local_parameters, part_of
from sicog_mcore.checkpoint.trusted_files import STATE, examine, load_shards, read_state, stored_tensors
from sicog_mcore.cli import describe_changes, experiment_from_dict
from sicog_mcore.config import Experiment, ModelPart
from sicog_mcore.errors import CheckpointError
from sicog_mcore.model.layers import EXTRA_STATE
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology

WIDTHS: Mapping[ModelPart, tuple[str, ...]] = {"resampler": ("model.tower.hidden:", "model.decoder.hidden:")}
# May differ between stages: they do not change what a weight means.
FREE_TO_CHANGE = ("model.resampler.train_positions", "model.decoder.mcore")
OPTIMIZER = ("optimizer.", "chained_")  # entries of a whole run's checkpoint that are no weights


def find_weights(path: Path, topology: Topology) -> Path | None:
    """Our checkpoint folder that a path stands for: itself, or the newest of a run; None if it is none of ours.

    Looked up and verified on rank 0; the answer is the same on all ranks.

    Raises:
        CheckpointError: it is damaged or holds what it must not, or the run has no committed checkpoint.
    """
    found = _find(path) if topology.is_main else None
    answer: Any = topology.broadcast_object(found)
    if isinstance(answer, CheckpointError):
        raise answer
    return answer


def _find(path: Path) -> Path | CheckpointError | None:
    try:
        folder = find_folder(path) or path  # a checkpoint whose manifest is gone is ours, and damaged
        if not (folder / STATE).is_file():
            return None
        examine(commit.verify(folder))
    except CheckpointError as error:
        return error
    return folder


def read_experiment(folder: Path) -> Experiment:
    """The configuration that a checkpoint was written with.

    Raises:
        CheckpointError: it cannot be read, or another version wrote it.
    """
    commit.read_manifest(folder).check(STATE)
    return experiment_from_dict(read_state(folder)["experiment"])


def read_tensors(folder: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every weight of a checkpoint, layers stacked along the first axis; reads no tensor."""
    return sorted(entry for entry in stored_tensors(folder) if not entry[0].startswith(OPTIMIZER))


def load_parts(
    chunks: Sequence[VisionLanguageModel],
    parts: Sequence[ModelPart],
    folder: Path,
    experiment: Experiment,
    topology: Topology,
) -> list[str]:
    """Fills parts of the model from one of our checkpoints, written under any layout. Collective, before wrapping.

    Returns:
        a line per part for the user.

    Raises:
        CheckpointError: the checkpoint holds another model, or values that are no finite numbers.
    """
    saved = read_experiment(folder)
    _require_same_model(saved, experiment, parts, folder)
    state = {name: part_entries(chunk, parts, topology) for name, chunk in named_chunks(chunks)}
    loaded = load_shards(state, folder, topology, StrictHandling.RAISE_UNEXPECTED)
    for name, chunk in named_chunks(chunks):
        # A later pipeline stage has nothing of tower and resampler, and Megatron drops what is empty.
        outcome = chunk.load_state_dict(loaded.get(name, {}), strict=False)
        left = [key for key in outcome.missing_keys if part_of(key) in parts and EXTRA_STATE not in key]
        assert not left and not outcome.unexpected_keys, f"not filled: {left}, unknown: {outcome.unexpected_keys}"
    watch = FiniteWatch()
    for name, parameter in local_parameters(chunks):
        if part_of(name) in parts:
            watch.see(name, parameter.detach())
    notes = watch.settle(topology, str(folder))
    return [f"{part}: {folder} ({saved.train.precision} -> {experiment.train.precision})" for part in parts] + notes


def named_chunks(chunks: Sequence[VisionLanguageModel]) -> list[tuple[str, VisionLanguageModel]]:
    """This rank's chunks of the model under the names that a checkpoint gives them."""
    return [(f"model{i}" if len(chunks) > 1 else "model", chunk) for i, chunk in enumerate(chunks)]


def part_entries(chunk: VisionLanguageModel, parts: Sequence[ModelPart], topology: Topology) -> dict[str, Any]:
    """Megatron's description of a chunk's parts; Transformer Engine's extra states matter for fp8 only."""
    state = chunk.sharded_state_dict(metadata={"dp_cp_group": topology.groups.dp_cp})
    return {key: value for key, value in state.items() if part_of(key) in parts and EXTRA_STATE not in key}


def _require_same_model(saved: Experiment, experiment: Experiment, parts: Sequence[ModelPart], folder: Path) -> None:
    judged = tuple(place for part in parts for place in (f"model.{part}.", *WIDTHS.get(part, ())))
    changes = [
        change
        for change in describe_changes(saved, experiment)
        if change.startswith(judged) and not change.startswith(FREE_TO_CHANGE)
    ]
    if changes:
        raise CheckpointError(
            f"{folder} holds another {' and '.join(parts)} ({'; '.join(changes)}); restore these values, or start from "
            "other weights"
        )
