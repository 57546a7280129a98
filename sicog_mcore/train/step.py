"""One optimiser step over Megatron's pipeline schedules.

In: the PackedBatches of this model copy   Out: StepResult, equal on all ranks   Next: trainer.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.parallel.wrap import TrainableModel


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean over all supervised tokens of the global batch; NaN if there were none.
        supervised_tokens: of the global batch.
        grad_norm: before clipping, over all parameters.
        applied: False if the optimizer refused the step because of a non-finite gradient.
    """

    loss: float
    supervised_tokens: int
    grad_norm: float
    applied: bool


def _loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss contract: (sum, count, log). The schedules divide the sum in place, hence the clone."""
    total = losses.sum()
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, count, {"loss": torch.stack([total.detach().clone().double(), count.double()])}


def _forward(
    batches: Iterator[PackedBatch], model: DistributedDataParallel
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    return model(next(batches)), _loss


def run_schedule(model: TrainableModel, batches: Sequence[PackedBatch], forward_only: bool = False) -> Tensor:
    """Forward and backward passes of all micro-batches; gradients are reduced and scaled by the global token count.

    Returns:
        fp64 [2]: loss sum and supervised tokens over all ranks.
    """
    topology, config = model.topology, model.config
    chunks = list(model.wrapped)
    schedule = partial(
        get_forward_backward_func(),
        forward_step_func=_forward,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[0],
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=topology.groups,
    )
    iterators = [iter(batches) for _ in chunks]
    if topology.config.pipeline > 1:
        schedule = partial(schedule, p2p_communicator=P2PCommunicator(topology.groups.pp, config))
    interleaved = len(chunks) > 1
    logs = schedule(
        data_iterator=iterators if interleaved else iterators[0], model=chunks if interleaved else chunks[0]
    )
    total = torch.zeros(2, dtype=torch.float64, device=topology.device)
    if topology.tensor_rank == 0:  # all tensor-parallel ranks know the same loss
        for log in logs:
            total += log["loss"]
    return topology.sum_over_world(total)


def train_step(model: TrainableModel, batches: Sequence[PackedBatch], lr: float) -> StepResult:
    """Trains on one global batch.

    Args:
        batches: this model copy's share of the global batch, one packed sequence per micro-batch.
        lr: scheduled learning rate.
    """
    model.zero_grad()
    loss_sum, count = run_schedule(model, batches).tolist()
    model.set_learning_rate(lr)
    applied, grad_norm = model.optimizer_step()
    return StepResult(loss_sum / count if count else float("nan"), int(count), grad_norm, applied)
