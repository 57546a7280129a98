"""Loads a checkpoint as a model that answers, under any layout without pipeline stages.

In: the output folder of a run, or one of its ``step_N`` folders   Out: Loaded   Next: engine.py
Sizes, tokenizer and template come from the checkpoint itself; nothing else of the run that wrote it takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sicog_mcore.build import Build, build_chunks, plan_build
from sicog_mcore.checkpoint import commit
from sicog_mcore.checkpoint.locate import CHECKPOINTS, find_folder
from sicog_mcore.checkpoint.part_reader import read_experiment
from sicog_mcore.checkpoint.trusted_files import STATE
from sicog_mcore.checkpoint.weights import import_init
from sicog_mcore.config import Experiment, InitConfig, ParallelConfig
from sicog_mcore.data.tokenizer import find_tokenizer_file
from sicog_mcore.data.tokenizer_files import tokenizer_notes
from sicog_mcore.errors import CheckpointError, ConfigError, ConfigProblem
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology

Precision = Literal["bf16", "fp32"]
# Replicas have different amounts to do and wait for each other only at the end.
TIMEOUT_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it is known before any process joins another.

    Attributes:
        folder: ``step_N``.
        fingerprint: of its files.
        tokenizer: file of the tokenizer.
        experiment: as the run had it, with the layout and precision that were asked for.
    """

    folder: Path
    fingerprint: str
    tokenizer: Path
    experiment: Experiment


def read_checkpoint(path: Path, tensor: int = 1, precision: Precision | None = None, tokenizer: str = "") -> Checkpoint:
    """Finds a checkpoint and reads what it says about itself; no weight is read.

    Args:
        path: output folder of a run (its newest checkpoint counts) or a ``step_N`` folder.
        tensor: ranks that share the model.
        precision: of the computation; None for that of the run.
        tokenizer: another place of the tokenizer; empty for the one of the run.

    Raises:
        CheckpointError: there is none, or another version wrote it.
        ConfigError: its tokenizer is not where it was.
    """
    folder = _find(path)
    fingerprint = commit.fingerprint(folder)
    saved = read_experiment(folder)
    # No sources: the rows of training may be gone, and generation reads none of them.
    data = replace(saved.data, tokenizer=tokenizer or saved.data.tokenizer, sources=())
    tokenizer_file = find_tokenizer_file(data.tokenizer)
    if tokenizer_file is None:
        problem = "holds no tokenizer"
        raise ConfigError([ConfigProblem("tokenizer", data.tokenizer, problem, "say where it is with --tokenizer")])
    experiment = replace(
        saved,
        data=data,
        # All else is 1: the engine needs whole models, and replicas follow from the number of ranks.
        parallel=ParallelConfig(tensor=tensor, timeout_s=TIMEOUT_S),
        train=replace(
            saved.train,
            precision=precision or saved.train.precision,
            # Nothing is recomputed, for there is no backward pass; attention is chosen anew, for this machine may lack
            # the run's.
            recompute_decoder="none",
            recompute_tower="none",
            attention="auto",
        ),
        init=InitConfig(checkpoint=str(folder)),
    )
    return Checkpoint(folder, fingerprint, tokenizer_file, experiment)


def _find(path: Path) -> Path:
    folder = find_folder(path)
    if folder is None or not (folder / STATE).is_file():
        raise CheckpointError(
            f"{path} is no checkpoint of ours; give the output folder of a run or one of its {CHECKPOINTS}/step_N "
            "folders (sicog convert turns other weights into one)"
        )
    return folder


@contextmanager
def joined(
    checkpoint: Checkpoint, world_size: int, init_method: str = "", rank: int = 0, output: str = ""
) -> Iterator[tuple[Build, Topology]]:
    """Checks the layout, joins the other ranks, and leaves them at the end.

    Args:
        init_method: see ``start_topology``; empty under torchrun and in a single process.
        output: folder for the stacks of ranks that wait in vain.

    Raises:
        MachineError: a rank is missing, or was lost.
        ConfigError: the ranks cannot be shared out, or Megatron refuses the layout.
    """
    parallel = checkpoint.experiment.parallel
    if world_size % parallel.tensor:
        problem = f"does not divide the {world_size} ranks"
        raise ConfigError([ConfigProblem("tensor", parallel.tensor, problem, "start as many ranks, or a multiple")])
    build = plan_build(checkpoint.experiment)
    topology = start_topology(parallel, checkpoint.experiment.train.seed, init_method, rank, world_size, output)
    try:
        topology.watch.beat("generation")
        with topology.watch.explaining():
            yield build, topology
    finally:
        stop_topology()


def load_model(build: Build, topology: Topology, notice: Callable[[str], None] = lambda _: None) -> VisionLanguageModel:
    """Builds this rank's part of the model and loads the checkpoint's weights.

    Args:
        notice: is told what is to be said of weights and tokenizer.

    Raises:
        CheckpointError: on every rank alike.
    """
    (model,) = chunks = build_chunks(build, topology)
    of_tokenizer = tokenizer_notes(build.experiment.data) if topology.is_main else []
    for line in [*import_init(chunks, build.experiment, topology), *of_tokenizer]:
        notice(line)
    return model.requires_grad_(False).eval()
