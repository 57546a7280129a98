"""Saves and restores a run: model, optimizer, position in the data, random states, configuration.

Model and optimizer use Megatron's distributed checkpoint, which loads under any TP/PP/DP layout.
In: TrainableModel, RunState   Out: a committed folder ``checkpoints/step_N``   Used by: train/trainer.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from sicog_mcore.checkpoint import commit
from sicog_mcore.checkpoint.failures import WRITE_ERRORS, Failure, SaveFailed, failure_of, free_bytes, write_failure
from sicog_mcore.checkpoint.locate import CHECKPOINTS, newest_folder, newest_step
from sicog_mcore.checkpoint.rng import load_rng, save_rng
from sicog_mcore.checkpoint.trusted_files import FORMAT, STATE, examine, has_shards, load_shards, read_state
from sicog_mcore.cli import describe_changes, experiment_from_dict
from sicog_mcore.config import CheckpointConfig, Experiment
from sicog_mcore.errors import CheckpointError, MachineError
from sicog_mcore.model.layers import EXTRA_STATE
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.gather import first_failure, on_all
from sicog_mcore.parallel.topology import Topology, WritersFailed
from sicog_mcore.sizes import params_by_part

# Values that decide which parameters share a group of the optimizer.
OPTIMIZER_GROUPS = ("optim.freeze", "optim.tower_lr_scale", "optim.resampler_lr_scale", "optim.decoder_lr_scale")
OPTIMIZER_BYTES = 12  # of a trained parameter: an fp32 master and two moments
RESERVE = 1.02  # headers and paddings


@dataclass(frozen=True)
class RunState:
    """The position of a run, in integers that do not depend on the layout.

    Attributes:
        step: optimiser steps done.
        loader: position of the next pack (LoaderState as a dictionary).
        samples: samples consumed so far, over all ranks.
        data: what the position depends on, see data/resume.py; empty where it was written before there was that.
    """

    step: int = 0
    loader: Mapping[str, int] = field(default_factory=dict)
    samples: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """The result of a search for checkpoints; ``notes`` are lines for the user."""

    step: int | None
    notes: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run, in ``<output>/checkpoints``."""

    def __init__(self, experiment: Experiment, topology: Topology):
        self.experiment = experiment
        self.topology = topology
        self.root = Path(experiment.output) / CHECKPOINTS

    def find(self) -> Found:
        """Looks for the newest committed checkpoint, on rank 0; the answer is the same on all ranks."""
        found = find_checkpoint(self.root, self.experiment.checkpoint) if self.topology.is_main else None
        # The error travels as a value: raised on rank 0 alone, it would leave the others waiting in this broadcast.
        answer = self.topology.broadcast_object(found)
        if isinstance(answer, CheckpointError):
            raise answer
        assert isinstance(answer, Found)
        return answer

    def folder(self, step: int) -> Path:
        return commit.step_folder(self.root, step)

    def newest(self) -> Path | None:
        """Returns the newest committed checkpoint, if there is one."""
        return newest_folder(self.root)

    def save(self, model: TrainableModel, state: RunState) -> Path:
        """Writes and commits a checkpoint; older ones go only after that. Collective.

        Raises:
            WriteError: the disk is full or fails; what was there before is untouched.
            CheckpointError: the folder may not be written to.
            MachineError: another rank or the network failed.
        """
        # A save may take longer than a collective may; a phase that begins counts as progress for the watchdog.
        self.topology.watch.beat(f"the save of step {state.step}")
        folder = self.folder(state.step)
        temporary = commit.temporary_folder(folder)
        content = _sharded_state(model, is_loading=False)
        # Between two collectives, every part ends on all ranks or on none: a rank that failed alone would leave the others
        # waiting for it in the next one until their timeout, with an error that names the network instead of the disk.
        try:
            self._together(lambda: self._prepare(temporary))
            dist_checkpointing.save(content, str(temporary))
            self._together(lambda: self._add_own_files(temporary, state))
            self._together(lambda: self._commit(folder))
        except WRITE_ERRORS as error:
            if self.topology.is_main:
                with suppress(OSError):  # what was written so far would keep the disk full
                    shutil.rmtree(temporary)
            raise write_failure(folder, error, self._agreed(error)) from error
        return folder

    def _together(self, work: Callable[[], None]) -> None:
        """Does one part of a save; where it fails on one rank it fails on all, so that none waits for another."""
        failure = None
        try:
            work()
        except WRITE_ERRORS as error:
            failure = failure_of(error)
        found = first_failure(self.topology, failure)
        if found is not None:
            raise SaveFailed(found)

    def _agreed(self, error: BaseException) -> Failure:
        """Returns the failure; where all ranks know of one, but only some know its cause, they agree on its kind."""
        failure = failure_of(error)
        if not isinstance(error, WritersFailed):
            return failure
        try:
            kinds = [
                kind for kind, is_told in self.topology.gather_objects((failure.kind, bool(error.failures))) if is_told
            ]
        except RuntimeError as lost:
            return failure_of(lost)
        return Failure(kinds[0] if kinds else failure.kind, failure.text)

    def require_space(self) -> None:
        """Checks, before a run, that one more checkpoint fits; only where the free space can be known. Collective.

        Raises:
            MachineError: there is too little.
        """
        problem = self._lacking_space() if self.topology.is_main else None
        if text := self.topology.broadcast_object(problem):
            failure = MachineError(str(text))
            failure.same_on_all_ranks = True
            raise failure

    def _lacking_space(self) -> str | None:
        try:
            left = sum(
                file.stat().st_size for folder in commit.unfinished_folders(self.root) for file in folder.rglob("*")
            )
            free = free_bytes(self.root) + left  # the first save removes what others left unfinished
        except OSError:
            return None
        needed = checkpoint_bytes(self.experiment)
        if free >= needed:
            return None
        return (
            f"{self.root} has {_size(free)} free, and a checkpoint of this run takes about {_size(needed)}; make room, or "
            "choose another output folder, and run the command again"
        )

    def _prepare(self, temporary: Path) -> None:
        if self.topology.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in commit.unfinished_folders(self.root):
                shutil.rmtree(leftover)
            temporary.mkdir()

    def _add_own_files(self, temporary: Path, state: RunState) -> None:
        # Random states differ from rank to rank; everything else in these files is equal on all.
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

    def saved_state(self, step: int) -> RunState:
        """Reads the state of the run at step ``step``, before there is a model.

        Raises:
            CheckpointError: the checkpoint belongs to another model.
        """
        folder = self.folder(step)
        content = json.loads((folder / STATE).read_text())
        self._compare(content, folder)
        return RunState(**content["state"])

    def load(self, model: TrainableModel, step: int) -> tuple[RunState, list[str]]:
        """Restores step ``step`` into the model, under any layout. Collective.

        Returns:
            the state of the run, and lines for the user about what differs from the run that was saved.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
        """
        folder = self.folder(step)
        content = read_state(folder)
        # Compared before shards are read: "another model" is a better message than a list of tensors.
        notes = self._compare(content, folder)
        state = _run_state(content, folder, step)
        # Megatron loads into a template that it makes of the live optimizer; Adam's moments must exist to be part of it.
        model.allocate_optimizer_state()
        # Differences are returned, not only logged: one message can then name them, and extra states can be forgiven.
        loaded, unread, missing = load_shards(
            _sharded_state(model, is_loading=True), folder, self.topology, strict=StrictHandling.RETURN_ALL
        )
        wrong = sorted(key for key in {*unread, *missing} if EXTRA_STATE not in key)  # which older versions wrote
        if wrong:
            raise CheckpointError(
                f"{folder} does not hold this model and its optimizer: {len(wrong)} entries differ, such as {wrong[0]}; "
                "use the version that wrote it, or choose another output folder"
            )
        try:
            model.load_weights([loaded[name] for name, _ in _named_chunks(model)])
            model.load_optimizer_state(loaded["optimizer"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{folder} does not hold the state of this run's optimizer ({error!r})") from error
        if content.get("layout") == _layout(self.topology):
            on_all(self.topology, partial(self._load_rng, folder))
        else:
            notes.append(
                f"layout changed from {content.get('layout')} to {_layout(self.topology)}: random states start anew"
            )
        return state, notes

    def _load_rng(self, folder: Path) -> None:
        """Restores the random states of this rank."""
        manifest = commit.read_manifest(folder)
        load_rng(manifest.check(_rng_file(folder, self.topology.rank).relative_to(folder).as_posix()))

    def _compare(self, content: dict[str, Any], folder: Path) -> list[str]:
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
    """Finds the newest committed checkpoint under the rules of ``config.resume``, and checks that it is whole."""
    newest = newest_step(root)
    notes = [
        f"ignored {folder.name}: its save or its removal was interrupted" for folder in commit.unfinished_folders(root)
    ]
    if newest is None:
        if config.resume == "must":
            return CheckpointError(
                f"checkpoint.resume is 'must' but {root} has no committed checkpoint; set it to 'auto' to start anew"
            )
        return Found(None, tuple(notes))
    if config.resume == "never":
        return CheckpointError(
            f"checkpoint.resume is 'never' but {root} has a checkpoint of step {newest}; choose another output folder"
        )
    try:
        # The newest alone is verified. Hashing all would read every checkpoint at each start, and an older one is used
        # only after the user has removed the newest, as the message asks.
        manifest = commit.verify(commit.step_folder(root, newest))
        if has_shards(manifest):
            examine(manifest)
    except CheckpointError as error:
        return error
    if not manifest.has_checksum:
        notes.append(
            f"{manifest.folder.name}: an earlier version wrote its {commit.MANIFEST}, which has no checksum itself"
        )
    return Found(newest, tuple(notes))


def checkpoint_bytes(experiment: Experiment) -> int:
    """Estimates the bytes of one checkpoint on the disk: weights of all parts, optimizer states of trained ones."""
    weight, counts = 2 if experiment.train.precision == "bf16" else 4, params_by_part(experiment.model)
    trained = sum(count for part, count in counts.items() if part not in experiment.optim.freeze)
    return int(RESERVE * (weight * sum(counts.values()) + OPTIMIZER_BYTES * trained))


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _run_state(content: Mapping[str, Any], folder: Path, step: int) -> RunState:
    """Reads the state of the run from the content of its file.

    Raises:
        CheckpointError: the file says something else than integers, or another step than its folder.
    """
    try:
        state = RunState(**content["state"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} holds no state of a run ({error}); use another checkpoint") from error
    # ``type`` and not isinstance: True is an int, too, and would pass for step 1.
    numbers = [state.step, state.samples, *state.loader.values()] if isinstance(state.loader, dict) else [None]
    if state.step != step or not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(
            f"{folder / STATE} says {str(content['state'])[:200]}, expected whole numbers and step {step}; "
            "use another checkpoint"
        )
    return state


def _named_chunks(model: TrainableModel) -> list[tuple[str, Any]]:
    chunks = model.chunks
    return [(f"model{i}" if len(chunks) > 1 else "model", chunk) for i, chunk in enumerate(chunks)]


def _sharded_state(model: TrainableModel, is_loading: bool) -> dict[str, Any]:
    # This optimizer format is the one that loads under any TP, PP and DP sizes.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": model.topology.groups.dp_cp}
    chunks = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named_chunks(model)}
    return {**chunks, **model.sharded_optimizer_state(chunks, is_loading, metadata)}


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
