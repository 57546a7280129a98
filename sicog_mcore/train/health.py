"""The health of a run: weights are kept only if they are finite and have not exploded; a leap of the loss is reported.

In: a model before a save, the loss of each step   Out: TrainingError, or a line   Used by: trainer.py, reporter.py
A checkpoint is only worth something if it is good: it replaces older ones, and every later start goes on from it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from sicog_mcore.errors import CheckpointError, TrainingError
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.param_groups import PARTS

# A part has exploded when the root mean square (RMS) of its parameters is more than GROWTH times what it was at the last
# checkpoint, and above ORDINARY_RMS. The RMS of whole parts lies far below 1 in models that work; at a rate of 1e-3 a
# part that starts at zero would take 3,000 steps in one direction to get there.
GROWTH = 100.0
ORDINARY_RMS = 3.0
# A loss leaps when it is above twice the median of the last ones, by more than a nat, and well above their highest tenth.
SPIKE_WINDOW = 64
SPIKE_FACTOR = 2.0
SPIKE_NATS = 1.0
SPIKE_OVER_HIGH = 1.5
HIGHEST_TENTH = 0.9
HIGH_FROM = 4  # losses from which on it can be told what high ones are
REMEDY = "Lower optim.lr, or look at the samples of this step in consumed-*.jsonl"


@dataclass(frozen=True)
class Soundness:
    """The soundness of the parameters, over all ranks.

    Attributes:
        rms: root mean square of the parameters, by part; a part that is not finite is NaN or infinite.
        optimizer_is_finite: whether masters and moments are.
    """

    rms: dict[str, float]
    optimizer_is_finite: bool

    @property
    def not_finite(self) -> str:
        """Names the parts that are not finite, for a message; empty if all are."""
        names = [part for part, rms in self.rms.items() if not math.isfinite(rms)]
        return ", ".join([*names, *([] if self.optimizer_is_finite else ["the optimizer's state"])])


def measure(model: TrainableModel) -> Soundness:
    """Looks at every parameter, master and moment once; one reduction. Collective, equal on all ranks."""
    # Squares are summed in fp64: those of 1e20 are not finite in fp32.
    sums = torch.zeros(2 * len(PARTS) + 1, dtype=torch.float64, device=model.topology.device)
    for chunk in model.chunks:
        for index, part in enumerate(PARTS):
            parameters = chunk.parameters_of(part)
            # [2 * parts + 1]: sum of squares and count of each part, then the optimizer's sum of squares. A NaN or an
            # infinity anywhere shows in its sum.
            sums[2 * index] += _squares(parameters)
            sums[2 * index + 1] += sum(parameter.numel() for parameter in parameters)
    sums[-1] = _squares(model.optimizer_tensors())
    *found, optimizer = model.topology.sum_over_world(sums).tolist()
    rms: dict[str, float] = {
        part: math.sqrt(square / count) if count else 0.0
        for part, square, count in zip(PARTS, found[::2], found[1::2], strict=True)
    }
    return Soundness(rms, math.isfinite(optimizer))


@torch.no_grad()
def _squares(tensors: Sequence[Tensor]) -> Tensor | float:
    return sum((torch.linalg.vector_norm(t.detach(), dtype=torch.float64).square() for t in tensors), start=0.0)


def require_sound_start(found: Soundness, last_good: str) -> None:
    """Refuses weights that were not finite before the first step.

    Raises:
        CheckpointError: on every rank.
    """
    if found.not_finite:
        raise CheckpointError(f"the weights to start from are not finite: {found.not_finite}; use others ({last_good})")


def require_sound(model: TrainableModel, before: Soundness, when: str, last_good: str) -> Soundness:
    """Refuses to commit weights that are not finite or have exploded. Collective.

    Args:
        before: at the last checkpoint, or at the start.
        when: for messages.
        last_good: the checkpoint to go back to, for messages.

    Raises:
        TrainingError: on every rank.
    """
    found = measure(model)
    if found.not_finite:
        raise TrainingError(f"{when}: not finite: {found.not_finite}; nothing was saved; {last_good}. {REMEDY}")
    for part, rms in found.rms.items():
        if rms > ORDINARY_RMS and rms > GROWTH * before.rms[part]:
            raise TrainingError(
                f"{when}: the weights of the {part} have exploded: their root mean square went from {before.rms[part]:.3g} "
                f"to {rms:.3g} since the last checkpoint or the start; nothing was saved; {last_good}. {REMEDY}"
            )
    return found


class SpikeWatch:
    """Tells a loss that leaps from one that merely varies; the median of the last ones does not follow single leaps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._is_high = False

    def see(self, step: int, loss: float) -> str | None:
        """Takes the loss of a step; a line for the user if it leapt, once for as long as it stays high."""
        if not math.isfinite(loss):  # a step without labels; a loss that ruins a run is an error elsewhere
            return None
        known = sorted(self._losses)
        usual = median(known) if known else loss
        high = known[int(HIGHEST_TENTH * (len(known) - 1))] if len(known) >= HIGH_FROM else 0.0
        limit = max(usual + SPIKE_NATS, SPIKE_FACTOR * usual, SPIKE_OVER_HIGH * high)
        # A loss is judged against those before it, and then counts itself, so that a lasting new level becomes the
        # usual one.
        self._losses.append(loss)
        was_high, self._is_high = self._is_high, loss > limit
        if was_high or not self._is_high:
            return None
        return (
            f"warning: the loss leapt at step {step}: {loss:.4g}, usually {usual:.4g}; its samples stand in "
            f'consumed-*.jsonl under "step": {step}. If it stays high, go back to an older checkpoint or lower optim.lr'
        )
