"""One optimiser step over Megatron's pipeline schedules, whatever is minimised.

In: the PackedBatches of this replica, an Objective   Out: StepResult, equal on all ranks   Next: trainer.py, dpo.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.model.loss import owners, supervised_rows
from sicog_mcore.parallel.ahead import DeviceBatches
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.train.metrics import PreferenceStats

Log: TypeAlias = Mapping[str, Tensor]
# A batch and the fp32 [t_s] losses of its supervised positions to (sum, count, log). The schedules divide the sum in place.
LossFunction: TypeAlias = Callable[[PackedBatch, Tensor], tuple[Tensor, Tensor, Log]]
SUMS = "sums"  # in the log: fp64 [num_sums], the loss and the count first


@dataclass(frozen=True)
class StepResult:
    """The result that one optimizer step returns.

    Attributes:
        loss: mean over what the objective counts in the global batch; NaN if there was nothing.
        count: supervised tokens, or pairs, of the global batch; whatever their weights.
        grad_norm: before clipping, over all parameters.
        applied: False if loss or gradient norm are not finite; then weights and optimizer state are those before the step.
        preferences: how the pairs of the global batch were judged, if there were pairs.
    """

    loss: float
    count: int
    grad_norm: float
    applied: bool
    preferences: PreferenceStats | None = None


class Objective(Protocol):
    """The loss that is minimised: a sum and its total weight, divided once, over the global batch."""

    @property
    def num_sums(self) -> int:
        """Length of the sums that the loss logs."""

    def prepare(self, model: TrainableModel, batches: Sequence[PackedBatch]) -> tuple[list[PackedBatch], LossFunction]:
        """Completes the batches of a step, and gives the loss that knows what it must of the global batch. Collective.

        Raises:
            ValueError: the groups of a batch, or their weights, are none that this objective is made for.
        """

    def total_weight(self, sums: Sequence[float]) -> float:
        """Gives the divisor of the sum of losses: the count, unless the global batch is weighted."""

    def describe(self, sums: Sequence[float]) -> PreferenceStats | None:
        """Derives the statistics beside the loss from the sums over the global batch."""


class NextToken:
    """Mean cross entropy of supervised tokens, each with the weight of its segment."""

    num_sums = 3  # weighted loss, tokens, total weight of the tokens

    def prepare(self, model: TrainableModel, batches: Sequence[PackedBatch]) -> tuple[list[PackedBatch], LossFunction]:
        for batch in batches:
            if not bool((batch.segment_weights > 0).all()):
                found = f"samples {list(batch.sample_ids)} have weights {batch.segment_weights.tolist()}"
                raise ValueError(
                    f"{found}, expected positive ones: a mean over tokens needs them; use another objective"
                )
        return list(batches), self.loss

    def loss(self, batch: PackedBatch, losses: Tensor) -> tuple[Tensor, Tensor, Log]:
        """Every supervised position of a segment has the segment's weight."""
        count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
        weight = count.double()
        if batch.is_weighted:
            weights = batch.segment_weights[owners(batch, supervised_rows(batch.labels))]  # fp64 [t_s]
            total, weight = (losses.double() * weights).sum().float(), weights.sum()
        else:  # the same to the bit as without weights
            total = losses.sum()
        return total, count, {SUMS: torch.stack([total.detach().clone().double(), count.double(), weight])}

    def total_weight(self, sums: Sequence[float]) -> float:
        return sums[2]

    def describe(self, sums: Sequence[float]) -> PreferenceStats | None:
        return None


def run_schedule(
    chunks: Sequence[Any],
    config: TransformerConfig,
    topology: Topology,
    batches: Sequence[PackedBatch],
    loss: LossFunction,
    forward_only: bool = False,
) -> list[Log]:
    """Forward and backward passes of all micro-batches; gradients are reduced and scaled by the global count.

    Args:
        chunks: of this rank, wrapped or, for ``forward_only``, bare.
        config: of the chunks.
        batches: in host memory, or on the device already.

    Returns:
        the log of each micro-batch on the last pipeline stage; nothing elsewhere.
    """

    def forward(batches: Iterator[PackedBatch], chunk: Any) -> tuple[Tensor, Callable]:
        batch = next(batches)
        return chunk(batch), partial(loss, batch)

    schedule = partial(
        get_forward_backward_func(),
        forward_step_func=forward,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[0],
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=topology.groups,
    )
    on_device = DeviceBatches(topology, batches, len(chunks))
    iterators = [on_device.reader() for _ in chunks]
    if topology.config.pipeline > 1:
        schedule = partial(schedule, p2p_communicator=P2PCommunicator(topology.groups.pp, config))
    interleaved = len(chunks) > 1
    with torch.set_grad_enabled(not forward_only):
        return schedule(
            data_iterator=iterators if interleaved else iterators[0], model=list(chunks) if interleaved else chunks[0]
        )


def sum_logs(topology: Topology, logs: Sequence[Log], num_sums: int) -> list[float]:
    """Adds up what the micro-batches of all replicas logged."""
    total = torch.zeros(num_sums, dtype=torch.float64, device=topology.device)
    if topology.tensor_rank == 0:  # all tensor-parallel ranks know the same
        for log in logs:
            total += log[SUMS]
    return topology.sum_over_world(total).tolist()


def train_step(model: TrainableModel, batches: Sequence[PackedBatch], lr: float, objective: Objective) -> StepResult:
    """Trains on one global batch, unless its loss or its gradient is not finite.

    Args:
        batches: this replica's share of the global batch, one packed sequence per micro-batch.
        lr: scheduled learning rate.
        objective: what is minimised.
    """
    batches, loss = objective.prepare(model, batches)
    model.zero_grad()
    logs = run_schedule(model.wrapped, model.config, model.topology, batches, loss)
    sums = sum_logs(model.topology, logs, objective.num_sums)
    model.set_learning_rate(lr)
    loss_sum, count = sums[:2]
    weight = objective.total_weight(sums)
    mean = loss_sum / weight if count else float("nan")
    if count and weight != count:
        # The schedules count in whole numbers and have divided the gradients by them. What they should have divided by is
        # known with the sums of the step, equal on all ranks, so weights cost no collective of their own.
        model.scale_gradients(count / weight)
    applied, grad_norm = model.optimizer_step(may_apply=not count or math.isfinite(mean))
    return StepResult(mean, int(count), grad_norm, applied, objective.describe(sums) if count else None)
