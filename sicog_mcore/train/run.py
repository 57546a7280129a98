"""Experiment -> a finished run: the one place where the parts are put together.

In: a checked Experiment   Out: the newest checkpoint   Called by every launcher   Next: trainer.py (the loop)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sicog_mcore.build import Build, build_chunks, build_model, plan_build
from sicog_mcore.checkpoint.store import CheckpointStore, RunState
from sicog_mcore.config import Experiment
from sicog_mcore.data.resume import OpenRows
from sicog_mcore.data.tokenizer_files import tokenizer_notes
from sicog_mcore.memory import estimate_memory, estimate_text, fitting
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.sizes import params_by_part
from sicog_mcore.train.console import Console, RunFacts, finish_lines, resume_text, start_lines
from sicog_mcore.train.dpo import Preferences
from sicog_mcore.train.feed import Complete, Feed, open_data
from sicog_mcore.train.held_out_check import AnswerGrader, HeldOutCheck
from sicog_mcore.train.reference import FrozenReference, precompute_reference
from sicog_mcore.train.reporter import Reporter, device_name
from sicog_mcore.train.step import NextToken, Objective
from sicog_mcore.train.trainer import Trainer


def build_objective(
    build: Build,
    topology: Topology,
    model: TrainableModel,
    opened: OpenRows | None,
    notice: Callable[[str], None],
) -> tuple[Objective, Complete | None]:
    """Builds the objective, and the function that completes its batches.

    Called while the model has its first weights, before a checkpoint is loaded: they are the reference of preferences.
    """
    experiment = build.experiment
    if experiment.objective == "next_token":
        return NextToken(), None
    if experiment.dpo.reference == "frozen":
        return Preferences(experiment.dpo, FrozenReference(build_chunks(build, topology), model)), None
    return Preferences(experiment.dpo), precompute_reference(experiment, model, opened, notice).complete


def run(experiment: Experiment, command: str, grader: AnswerGrader | None = None) -> Path:
    """Trains until the last step, from the newest checkpoint if there is one.

    Args:
        command: what the user typed; the summary says that it resumes.
        grader: on rank 0, where ``held_out.benchmark`` names questions.

    Returns:
        folder of the newest checkpoint.
    """
    build = plan_build(experiment)
    topology = start_topology(experiment.parallel, experiment.train.seed, output=experiment.output)
    topology.watch.beat("the building of the model")
    try:
        with topology.watch.explaining():
            return train(build, topology, command, grader)
    finally:
        stop_topology()


def train(build: Build, topology: Topology, command: str, grader: AnswerGrader | None = None) -> Path:
    """Trains on ranks that have already joined each other, until the last step; returns the newest checkpoint."""
    experiment = build.experiment
    doubts = _fit(experiment, topology)
    console = Console(topology.is_main, experiment.train.log_every)
    store = CheckpointStore(experiment, topology)
    # Data is opened before the model is built: a wrong path ends the run in seconds, not after loading weights.
    found = store.find()
    saved = store.saved_state(found.step) if found.step is not None else None
    place, held = (saved.loader, saved.data) if saved else (None, None)
    opened = open_data(experiment, topology, place, held, console.notice)
    # The first weights are also the reference of preferences, so these need them on a resumed run too.
    imports = found.step is None or experiment.objective == "dpo"
    model = build_model(build, topology, console.notice, imports)
    objective, complete = build_objective(build, topology, model, opened, console.notice)
    state, notes = store.load(model, found.step) if found.step is not None else (RunState(), [])
    held_out = HeldOutCheck(experiment, model, console.notice, grader) if experiment.held_out.every_steps else None
    feed = Feed(experiment, topology, opened, first_step=state.step + 1, complete=complete)
    reporter = Reporter(experiment, topology, console, first_step=state.step + 1)
    trainer = Trainer(experiment, model, feed, store, reporter, state, objective, held_out)
    checkpoint = store.folder(state.step) if found.step is not None else None
    try:
        console.start(start_lines(experiment, _facts(build, topology, feed)))
        of_tokenizer = tokenizer_notes(experiment.data) if topology.is_main else ()
        of_data = [f"data: {note}" for note in feed.notes]
        for note in [*of_data, *doubts, *found.notes, *notes, *(opened.notes if opened else ()), *of_tokenizer]:
            console.notice(note)
        for note in held_out.notes if held_out else ():
            console.notice(note)
        console.notice(resume_text(checkpoint, state.step, experiment.train.steps, str(store.root)))
        newest = trainer.fit()
        console.finish(finish_lines(reporter.summary, experiment, newest, command))
    # The launcher prints this text, and cannot know how far the run has come.
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"after step {trainer.state.step:,}") from interrupt
    finally:
        feed.close()
        reporter.close()
    return newest


def _fit(experiment: Experiment, topology: Topology) -> list[str]:
    """Estimates whether the run fits its device; a CPU shares its memory with other programs, so nothing is said there."""
    if topology.device.type != "cuda":
        return []
    return fitting(experiment, topology.world_size, torch.cuda.get_device_properties(topology.device).total_memory)


def _facts(build: Build, topology: Topology, feed: Feed) -> RunFacts:
    return RunFacts(
        parameters=params_by_part(build.experiment.model),
        num_rows=feed.num_rows,
        world_size=topology.world_size,
        device=device_name(topology.device),
        layers=f"{build.layers.name} ({build.layers.why})",
        attention=f"{build.attention.name} ({build.attention.why})",
        memory=estimate_text(estimate_memory(build.experiment, topology.world_size)),
    )
