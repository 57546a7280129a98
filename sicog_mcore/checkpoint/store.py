"""Saves and restores a run: model, optimizer, position in the data, random states, configuration.

Model and optimizer use Megatron's distributed checkpoint, which loads under any TP/PP/DP layout.
In: TrainableModel, RunState   Out: a committed folder ``checkpoints/step_N``   Used by: train/trainer.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from safetensors import SafetensorError

from sicog_mcore.checkpoint import commit
from sicog_mcore.checkpoint.rng import load_rng, save_rng
from sicog_mcore.cli import describe_changes, experiment_from_dict
from sicog_mcore.config import CheckpointConfig, Experiment
from sicog_mcore.errors import CheckpointError
from sicog_mcore.parallel.topology import Topology, WritersFailed
from sicog_mcore.parallel.wrap import TrainableModel

FORMAT = 1
STATE = "state.json"
OPTIMIZER_GROUPS = ("optim.freeze", "optim.tower_lr_scale", "optim.resampler_lr_scale", "optim.decoder_lr_scale")
# A full disk, as pathlib, torch.save, safetensors and Megatron's writer processes report it.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, WritersFailed)


@dataclass(frozen=True)
class RunState:
    """Where a run stands, in integers that do not depend on the layout.

    Attributes:
        step: optimiser steps done.
        loader: position of the next pack (LoaderState as a dictionary).
        samples: samples consumed so far, over all ranks.
    """

    step: int = 0
    loader: Mapping[str, int] = field(default_factory=dict)
    samples: int = 0


@dataclass(frozen=True)
class Found:
    """What a search for checkpoints came up with; ``notes`` are lines for the user."""

    step: int | None
    notes: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run, in ``<output>/checkpoints``."""

    def __init__(self, experiment: Experiment, topology: Topology):
        self.experiment = experiment
        self.topology = topology
        self.root = Path(experiment.output) / "checkpoints"

    def find(self) -> Found:
        """Looks for the newest committed checkpoint, on rank 0; the answer is the same on all ranks."""
        found = find_checkpoint(self.root, self.experiment.checkpoint) if self.topology.is_main else None
        answer = self.topology.broadcast_object(found)
        if isinstance(answer, CheckpointError):
            raise answer
        assert isinstance(answer, Found)
        return answer

    def folder(self, step: int) -> Path:
        return commit.step_folder(self.root, step)

    def save(self, model: TrainableModel, state: RunState) -> Path:
        """Writes and commits a checkpoint; older ones go only after that. Collective.

        Raises:
            CheckpointError: it cannot be written; what was there before is untouched.
        """
        self.topology.watch.beat(f"the save of step {state.step}")
        folder = self.folder(state.step)
        temporary = commit.aside(folder)
        content = _sharded_state(model, is_loading=False)
        try:
            self._together(lambda: self._prepare(temporary))
            dist_checkpointing.save(content, str(temporary))
            self._together(lambda: self._add_own_files(temporary, state))
            self._together(lambda: self._commit(folder))
        except WRITE_ERRORS as error:
            place = next(parent for parent in self.root.resolve().parents if parent.is_dir())
            free = shutil.disk_usage(place).free / 2**30
            raise CheckpointError(
                f"checkpoint {folder} cannot be written: {_reason(error)} ({free:.1f} GiB free); "
                "make room and run the command again"
            ) from error
        return folder

    def _together(self, work: Callable[[], None]) -> None:
        """Does one part of a save; where it fails on one rank it fails on all, so that none waits for another."""
        failure = None
        try:
            work()
        except WRITE_ERRORS as error:
            failure = _reason(error)
        failures = [text for text in self.topology.gather_objects(failure) if text is not None]
        if failures:
            raise OSError(failures[0])

    def _prepare(self, temporary: Path) -> None:
        if self.topology.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in commit.unfinished_folders(self.root):
                shutil.rmtree(leftover)
            temporary.mkdir()

    def _add_own_files(self, temporary: Path, state: RunState) -> None:
        save_rng(_rng_file(temporary, self.topology.rank))
        if self.topology.is_main:
            content = {
                "format": FORMAT,
                "state": asdict(state),
                "layout": _layout(self.topology),
                "experiment": self.experiment.to_dict(),
            }
            (temporary / STATE).write_text(json.dumps(content, indent=1))

    def _commit(self, folder: Path) -> None:
        if self.topology.is_main:
            commit.commit(folder)
            commit.keep_last(self.root, self.experiment.checkpoint.keep_last)

    def load(self, model: TrainableModel, step: int) -> tuple[RunState, list[str]]:
        """Restores step ``step`` into the model, under any layout. Collective.

        Returns:
            the state of the run, and lines for the user about what differs from the run that was saved.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
        """
        folder = self.folder(step)
        content = json.loads((folder / STATE).read_text())
        notes = self._compare(content, folder)
        model.allocate_optimizer_state()
        loaded = dist_checkpointing.load(
            _sharded_state(model, is_loading=True), str(folder), strict=StrictHandling.RAISE_ALL
        )
        for name, chunk in _named_chunks(model):
            chunk.load_state_dict(loaded[name], strict=True)
        model.load_optimizer_state(loaded["optimizer"])
        if content["layout"] == _layout(self.topology):
            load_rng(_rng_file(folder, self.topology.rank))
        else:
            notes.append(
                f"layout changed from {content['layout']} to {_layout(self.topology)}: random states start anew"
            )
        return RunState(**content["state"]), notes

    def _compare(self, content: dict[str, Any], folder: Path) -> list[str]:
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has format {content['format']}, this version reads {FORMAT}; use the version that wrote it"
            )
        saved = experiment_from_dict(content["experiment"])
        if saved.model != self.experiment.model:
            changes = [c for c in describe_changes(saved, self.experiment) if c.startswith("model.")]
            raise CheckpointError(
                f"{folder} holds another model ({'; '.join(changes)}); restore these values or choose another output folder"
            )
        groups = [c for c in describe_changes(saved, self.experiment) if c.startswith(OPTIMIZER_GROUPS)]
        if groups:
            raise CheckpointError(
                f"{folder} groups the parameters differently ({'; '.join(groups)}); restore these values, "
                "or choose another output folder"
            )
        return [f"changed since the checkpoint: {change}" for change in describe_changes(saved, self.experiment)]


def find_checkpoint(root: Path, config: CheckpointConfig) -> Found | CheckpointError:
    """Newest committed checkpoint that is whole, under the rules of ``config.resume``."""
    steps = commit.committed_steps(root)
    notes = [
        f"ignored {folder.name}: its save or its removal was interrupted" for folder in commit.unfinished_folders(root)
    ]
    if not steps:
        if config.resume == "must":
            return CheckpointError(
                f"checkpoint.resume is 'must' but {root} has no committed checkpoint; set it to 'auto' to start anew"
            )
        return Found(None, tuple(notes))
    if config.resume == "never":
        return CheckpointError(
            f"checkpoint.resume is 'never' but {root} has a checkpoint of step {steps[-1]}; choose another output folder"
        )
    try:
        commit.verify(commit.step_folder(root, steps[-1]))
    except CheckpointError as error:
        return error
    return Found(steps[-1], tuple(notes))


def _named_chunks(model: TrainableModel) -> list[tuple[str, Any]]:
    return [(f"model{i}" if len(model.chunks) > 1 else "model", chunk) for i, chunk in enumerate(model.chunks)]


def _sharded_state(model: TrainableModel, is_loading: bool) -> dict[str, Any]:
    # This optimizer format is the one that loads under any TP, PP and DP sizes.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": model.topology.groups.dp_cp}
    chunks = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named_chunks(model)}
    return {**chunks, **model.sharded_optimizer_state(chunks, is_loading, metadata)}


def _reason(error: BaseException) -> str:
    """One line, where Megatron's writers report a traceback per rank."""
    if isinstance(error, WritersFailed):
        found = "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())
        return found or "another rank failed"  # only one rank is told the details
    return str(error)


def _layout(topology: Topology) -> dict[str, int]:
    config = topology.config
    return {
        "tensor": config.tensor,
        "pipeline": config.pipeline,
        "virtual_pipeline": config.virtual_pipeline,
        "data": topology.data_size,
    }


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / "rng" / f"rank_{rank:05d}.safetensors"
