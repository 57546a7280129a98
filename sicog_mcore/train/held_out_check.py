"""How well a model in training predicts, and answers, what it is not trained on; training goes on as if nobody had asked.

In: HeldOutConfig, the model of the trainer   Out: HeldOutStats of a step   Next: trainer.py (when), reporter.py (where to)
Loss comes from the rows of held_out.py, answers from the rollout engine; both run the trainer's own chunks, without
gradients and in evaluation mode. Weights, gradient buffers, random states and the place in the data stay as they are.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sicog_mcore.config import Experiment
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.quarantine import Rejection
from sicog_mcore.errors import DataError
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.rollout.engine import NativeEngine
from sicog_mcore.rollout.requests import Request, Result, Sampling
from sicog_mcore.train.held_out import HeldOutRows
from sicog_mcore.train.metrics import HeldOutStats

LARGEST_EXPONENT = 700.0  # of a float


class AnswerGrader(Protocol):
    """Questions, and what answers to them are worth. Made above training, for rank 0 alone."""

    def questions(self) -> tuple[Sequence[Request], Sampling]:
        """Gives the questions that the model is asked, and how its answers are drawn."""

    def accuracy(self, results: Sequence[Result]) -> tuple[float, int]:
        """The mean worth of the answers, from 0 to 1, over all questions, and how many these are."""


class HeldOutCheck:
    """Measures a model in training. All methods are collective.

    Args:
        model: which is measured, always with the weights of its last step.
        notice: is told of rows that turn out to be unusable.
        grader: on rank 0, where ``held_out.benchmark`` names questions.

    Attributes:
        notes: what is to be said before the start.

    Raises:
        ConfigError: the rows cannot be opened.
        DataError: none of them can be used.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: TrainableModel,
        notice: Callable[[str], None] = lambda _: None,
        grader: AnswerGrader | None = None,
    ):
        self._model, self._notice, self._grader = model, notice, grader
        self._config, topology = experiment.held_out, model.topology
        self._encoder = Encoder(experiment.model, experiment.data)
        self._told: set[tuple[str, str]] = set()
        self._rows: HeldOutRows | None = None
        self.notes = [
            f"held-out: {path} is trained on too; its loss says nothing of new rows" for path in _both(experiment)
        ]
        if self._config.sources:
            data = replace(experiment.data, sources=self._config.sources)
            self._rows = HeldOutRows(replace(experiment, data=data), topology)
            self.notes += [f"held-out: {note}" for note in self._rows.notes]
            self.notes += self._refusals(self._rows.refused)
            if not self._rows.packs:
                raise DataError("\n".join(["held_out.sources: no row can be used", *self.notes]))
        self._asked: Any = None
        if self._config.benchmark:
            assert grader or not topology.is_main, "rank 0 has the questions"
            self._asked = topology.broadcast_object(grader.questions() if grader else None)

    def measure(self) -> HeldOutStats:
        """Loss and accuracy of the model as it is now; equal on all ranks, save for the time."""
        started = time.perf_counter()
        self._model.topology.watch.beat("the held-out measurement")
        with _evaluating(self._model.chunks) as chunks:
            stats = HeldOutStats()
            if self._rows:
                stats = self._measure_loss(self._rows, chunks)
            if self._asked:
                accuracy, count = self._ask(chunks)
                stats = replace(stats, held_out_accuracy=accuracy, held_out_questions=count)
        return replace(stats, held_out_s=time.perf_counter() - started)

    def _measure_loss(self, rows: HeldOutRows, chunks: Sequence[Any]) -> HeldOutStats:
        losses = rows.measure(chunks, self._model.config)
        for line in self._refusals(losses.refused):
            self._notice(line)
        tokens = sum(sample.tokens for sample in losses.samples)
        # Summed in the order of the ids, so that the layout does not show in the last bits.
        loss = math.fsum(sample.loss_sum for sample in losses.samples) / tokens if tokens else math.nan
        return HeldOutStats(
            held_out_loss=loss,
            held_out_perplexity=math.inf if loss > LARGEST_EXPONENT else math.exp(loss),
            held_out_tokens=tokens,
            held_out_refused=len(losses.refused),
        )

    def _ask(self, chunks: Sequence[Any]) -> tuple[float, int]:
        """Answers of all replicas, each to its share of the questions, judged on rank 0."""
        topology, (requests, sampling) = self._model.topology, self._asked
        (chunk,) = chunks
        engine = NativeEngine(chunk, self._encoder, topology, self._config.batch)
        results = []
        for result in engine.generate(requests[topology.data_rank :: topology.data_size], sampling):
            topology.watch.beat()
            results.append(result)
        gathered = topology.gather_objects(results if topology.loads_data else [])
        judged = self._grader.accuracy([one for part in gathered for one in part]) if self._grader else None
        found: Any = topology.broadcast_object(judged)
        return found

    def _refusals(self, refused: Iterable[Rejection]) -> list[str]:
        """One line for rows that cannot be used and were not spoken of before."""
        new = [one for one in refused if (one.id, one.origin) not in self._told]
        self._told |= {(one.id, one.origin) for one in new}
        if not new:
            return []
        reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(r.reason for r in new).most_common())
        first = f"{new[0].origin}: {new[0].detail}"
        return [f"held-out: {len(new):,} rows cannot be used and are left out: {reasons}; first {first:.400}"]


@contextmanager
def _evaluating(chunks: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The chunks in evaluation mode (no dropout, nothing recomputed), and back in that of training."""
    try:
        for chunk in chunks:
            chunk.eval()
        yield chunks
    finally:
        for chunk in chunks:
            chunk.train()


def _both(experiment: Experiment) -> list[str]:
    """Files and folders that are held out and trained on."""
    trained = {Path(source.path).resolve() for source in experiment.data.sources}
    return [source.path for source in experiment.held_out.sources if Path(source.path).resolve() in trained]
