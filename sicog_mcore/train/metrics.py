"""The metrics of a step, the files they are written to, and the sums of a run.

In: numbers of one step, equal on all ranks   Out: metrics.jsonl, TensorBoard files, Summary   Next: console.py
Only rank 0 writes. A number that is not finite becomes null in JSON and is left out of TensorBoard.
"""

from __future__ import annotations

import json
import math
import time
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from sicog_mcore.errors import SicogError
from sicog_mcore.files import LineFile, whole_file, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TENSORBOARD_GROUPS: Mapping[str, tuple[str, ...]] = {
    "train": ("loss", "grad_norm", "lr", "supervised_tokens", "samples"),
    "speed": ("tokens_per_s", "images_per_s", "slices_per_s", "step_s", "data_wait_s", "tflops", "mfu"),
    "data": ("decoder_tokens", "images", "slices", "pack_fill", "quarantined", "truncated"),
    "memory": ("peak_memory_gib",),
}
PREFERENCE_GROUP = "preference"
HELD_OUT_GROUP = "held_out"


@dataclass(frozen=True, kw_only=True)
class PreferenceStats:
    """The judgement of the pairs of a global batch, as means.

    Attributes:
        preference_accuracy: share of pairs whose chosen answer has the higher reward.
        reward_margin: mean reward of chosen answers minus that of rejected ones.
        chosen_reward: mean of beta times the log-ratio of chosen answers to the reference model.
        rejected_reward: mean of beta times the log-ratio of rejected answers to the reference model.
    """

    preference_accuracy: float
    reward_margin: float
    chosen_reward: float
    rejected_reward: float


@dataclass(frozen=True, kw_only=True)
class HeldOutStats:
    """Losses and answers measured after a step on held-out data; None stands for a number that was not measured.

    Attributes:
        held_out_loss: mean over the supervised tokens of all held-out rows (nats).
        held_out_perplexity: its exponential.
        held_out_tokens: tokens that the mean was taken over.
        held_out_refused: held-out rows that could not be used.
        held_out_accuracy: mean over all questions of the benchmark of what the answer was worth, from 0 to 1.
        held_out_questions: number of these questions; one without an answer counts as wrong.
        held_out_s: wall time of the measurement (s), not part of ``step_s``.
    """

    held_out_loss: float | None = None
    held_out_perplexity: float | None = None
    held_out_tokens: int | None = None
    held_out_refused: int | None = None
    held_out_accuracy: float | None = None
    held_out_questions: int | None = None
    held_out_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One optimiser step of the whole job.

    Attributes:
        step: optimiser steps done, this one included; the first is 1.
        loss: mean over the supervised tokens, or pairs, of the global batch.
        grad_norm: before clipping.
        lr: scheduled learning rate, before the factors of the parts.
        step_s: wall time from step to step (s), data wait included, held-out measurements not.
        data_wait_s: part of it that rank 0 waited for its batch (s).
        decoder_tokens: positions of all samples, visual tokens included, padding not.
        supervised_tokens: positions with a label.
        pack_fill: decoder_tokens as a share of all positions, padding included.
        quarantined: samples refused since the run began.
        truncated: samples that lost the end of their answer since the run began.
        peak_memory_gib: most memory of any rank so far (GiB).
        tflops: model TFLOP/s of one device; flops.py has the convention.
        mfu: tflops as a share of the device's peak; None if the peak is not known.
        preferences: of preference training, whose loss is a mean over pairs; None for next-token prediction.
        held_out: of a step after which held-out rows were measured; None for all others.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    step_s: float
    data_wait_s: float
    samples: int
    decoder_tokens: int
    supervised_tokens: int
    images: int
    slices: int
    pack_fill: float
    quarantined: int
    truncated: int
    peak_memory_gib: float
    tflops: float
    mfu: float | None
    preferences: PreferenceStats | None = None
    held_out: HeldOutStats | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.decoder_tokens / self.step_s

    @property
    def images_per_s(self) -> float:
        return self.images / self.step_s

    @property
    def slices_per_s(self) -> float:
        return self.slices / self.step_s

    def values(self) -> dict[str, int | float | None]:
        """Gives all fields and rates by name; a number that is not finite is None."""
        rates = {name: getattr(self, name) for name in ("tokens_per_s", "images_per_s", "slices_per_s")}
        values: dict[str, int | float | None] = {f.name: getattr(self, f.name) for f in fields(self)} | rates
        # Grouped metrics stand beside the others, by their own names; the fields that group them go.
        for name in ("preferences", "held_out"):
            del values[name]
            values |= asdict(getattr(self, name)) if getattr(self, name) else {}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


class MetricsLog:
    """metrics.jsonl and TensorBoard files of a run; a resumed run continues both.

    Args:
        folder: output folder of the run.
        first_step: first step that will be written; lines of an interrupted run from there on are dropped.
        tensorboard: write TensorBoard files too.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool) -> None:
        path = folder / METRICS_FILE
        # A run that was killed has written steps after its newest checkpoint; they are trained, and written, again.
        drop_steps_from(path, first_step)
        self._lines = LineFile(path)
        self._board: SummaryWriter | None = None
        self._board_folder = folder / TENSORBOARD_FOLDER
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            with writing(self._board_folder):
                # purge_step makes TensorBoard hide events of earlier files from that step on.
                self._board = SummaryWriter(str(self._board_folder), purge_step=first_step)

    def write(self, stats: StepStats) -> None:
        """Writes one step; the line is on its way to the disk when this returns.

        Raises:
            MachineError: the disk is full or fails.
        """
        values = stats.values()
        wall_time = time.time()
        self._lines.append(json.dumps(values | {"time": round(wall_time, 3)}, allow_nan=False))
        if self._board is not None:
            with writing(self._board_folder):
                self._draw(self._board, stats, values, wall_time)

    def _draw(
        self, board: SummaryWriter, stats: StepStats, values: Mapping[str, int | float | None], wall_time: float
    ) -> None:
        preferences = tuple(asdict(stats.preferences)) if stats.preferences else ()
        held_out = tuple(asdict(stats.held_out)) if stats.held_out else ()
        of_step = ((PREFERENCE_GROUP, preferences), (HELD_OUT_GROUP, held_out))
        for group, names in (*TENSORBOARD_GROUPS.items(), *of_step):
            for name in names:
                value = values[name]
                if value is not None:
                    board.add_scalar(f"{group}/{name}", value, stats.step, walltime=wall_time)

    def close(self) -> None:
        """Ends both files; lines that a full disk did not take are lost, and were reported when they were written."""
        with suppress(SicogError):
            self._lines.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()


def drop_steps_from(path: Path, first_step: int) -> None:
    """Keeps the lines of a JSONL file before ``first_step``; a torn last line, left by a kill, goes too.

    Raises:
        MachineError: the disk is full or fails; the file is as it was.
    """
    if not path.exists():
        return
    kept = []
    with writing(path):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                is_before = json.loads(line)["step"] < first_step
            # A line torn by a kill: the step it tells of comes after the newest checkpoint.
            except (ValueError, TypeError, KeyError):
                continue
            if is_before:
                kept.append(line)
        # Written anew as a whole: a kill at this point leaves the file as it was.
        with whole_file(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


class Summary:
    """Sums over the steps of this process; only valid after the first ``add``."""

    def __init__(self) -> None:
        self.first: StepStats | None = None
        self.last: StepStats | None = None
        self.samples = self.decoder_tokens = self.images = self.slices = 0
        # Eight bytes a step, however long the run is; the median needs all of them.
        self._step_s = array("d")
        self._pack_fill = array("d")

    def add(self, stats: StepStats) -> None:
        self.first = self.first or stats
        self.last = stats
        self.samples += stats.samples
        self.decoder_tokens += stats.decoder_tokens
        self.images += stats.images
        self.slices += stats.slices
        self._step_s.append(stats.step_s)
        self._pack_fill.append(stats.pack_fill)

    @property
    def seconds(self) -> float:
        return math.fsum(self._step_s)

    @property
    def median_step_s(self) -> float:
        return median(self._step_s)

    @property
    def mean_pack_fill(self) -> float:
        return fmean(self._pack_fill)
