"""ParallelConfig -> process groups, made once and passed to whoever needs them.

Rank order is Megatron's: tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages.
Next: distribute.py (batches to ranks), wrap.py (gradients over ranks).
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed.checkpoint import CheckpointException

from sicog_mcore.config import ParallelConfig
from sicog_mcore.parallel.cpu import install_cpu_support

WritersFailed = CheckpointException  # raised on every rank when Megatron's checkpoint writers fail on one


@dataclass(frozen=True)
class Stage:
    """One model chunk of this rank: which part of the pipeline it is."""

    chunk: int  # index among this rank's chunks
    num_chunks: int
    is_first: bool  # has the vision tower and the embedding table
    is_last: bool  # has the output head

    @property
    def vp_stage(self) -> int | None:
        """Megatron's virtual stage number; None for the plain schedule."""
        return self.chunk if self.num_chunks > 1 else None


@dataclass(frozen=True)
class Topology:
    """This rank's place, its process groups, and its device.

    Attributes:
        groups: Megatron's groups of the decoder.
        tower_groups: the same with a tensor-parallel group of one rank: the tower's weights are replicated, and its
            slices, not its matrices, are shared out over the tensor-parallel ranks.
    """

    config: ParallelConfig
    groups: ProcessGroupCollection
    tower_groups: ProcessGroupCollection
    device: torch.device
    rank: int
    world_size: int

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        return self.groups.dp.size()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def loads_data(self) -> bool:
        """True on the one rank of each model copy that reads samples; distribute.py hands them to the others."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model chunks of this rank, in the order Megatron's schedules expect."""
        chunks, last = self.config.virtual_pipeline, self.config.pipeline - 1
        return tuple(
            Stage(c, chunks, self.pipeline_rank == 0 and c == 0, self.pipeline_rank == last and c == chunks - 1)
            for c in range(chunks)
        )

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a small tensor over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def sum_over_copy(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a small tensor over the ranks that share this copy of the model, in place."""
        dist.all_reduce(values, group=self.groups.mp)
        return values

    def max_over_world(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def broadcast_object(self, value: object) -> object:
        """Sends a small picklable object from rank 0 to all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share_object(self, value: Any) -> Any:
        """Sends a picklable object from the first rank of each model copy to the others of that copy."""
        if self.groups.mp.size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_process_group_ranks(self.groups.mp)[0], group=self.groups.mp)
        return box[0]

    def share_over_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Gives the tensor-parallel ranks the values of their first one, in place."""
        if self.groups.tp.size() > 1:
            dist.broadcast(values, src=dist.get_process_group_ranks(self.groups.tp)[0], group=self.groups.tp)
        return values

    def gather_objects(self, value: object) -> list[Any]:
        """Small picklable objects of all ranks, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def _join_world(timeout: datetime.timedelta, init_method: str, rank: int, world_size: int) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if init_method:
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    elif "RANK" in os.environ:  # started by torchrun
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def start_topology(
    config: ParallelConfig, seed: int, init_method: str = "", rank: int = 0, world_size: int = 1
) -> Topology:
    """Joins the process group and builds every parallel group. Ends with a seeded random state on every rank.

    Args:
        init_method: a rendezvous URL with explicit ``rank`` and ``world_size``; empty reads torchrun's environment, or
            makes a world of one rank where there is none.
    """
    install_cpu_support()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    _join_world(datetime.timedelta(seconds=config.timeout_s), init_method, rank, world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    tower_groups = ProcessGroupCollection.use_mpu_process_groups()
    # Only this rank takes part in making the group: no handshake with thousands of others.
    tower_groups.tp = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return Topology(config, groups, tower_groups, device, dist.get_rank(), dist.get_world_size())


def stop_topology() -> None:
    """Leaves all groups; safe to call when nothing was started."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
