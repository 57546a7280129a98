"""ParallelConfig -> process groups, made once and passed to whoever needs them.

Rank order is Megatron's: tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages.
Next: distribute.py (batches to ranks), ddp.py (gradients over ranks).
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed.checkpoint import CheckpointException

from sicog_mcore.config import ParallelConfig
from sicog_mcore.errors import MachineError
from sicog_mcore.parallel.cpu import install_cpu_support
from sicog_mcore.parallel.upstream import install_fixes
from sicog_mcore.parallel.watch import MARGIN_S, RESUME, RankWatch, watch_parent
from sicog_mcore.parallel.writers import install_writers
from sicog_mcore.ranks import read_place

STARTS_APART = datetime.timedelta(seconds=30)  # beside the timeout of collectives
WritersFailed = CheckpointException  # raised on every rank when Megatron's checkpoint writers fail on one


@dataclass(frozen=True)
class PipelineChunk:
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
        watch: notices that the ranks get no further; told of every collective here.
        host_group: the ranks that share this replica of the model, as in ``groups.mp``, for tensors in host memory.
        copy_stream: the CUDA stream on which micro-batches are copied to the device; None on a CPU.
    """

    config: ParallelConfig
    groups: ProcessGroupCollection
    tower_groups: ProcessGroupCollection
    device: torch.device
    rank: int
    world_size: int
    watch: RankWatch
    host_group: dist.ProcessGroup
    copy_stream: Any

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
        """True on the one rank of each replica that reads samples; distribute.py hands them to the others."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def stages(self) -> tuple[PipelineChunk, ...]:
        """The model chunks of this rank, in the order Megatron's schedules expect."""
        chunks, last = self.config.virtual_pipeline, self.config.pipeline - 1
        # Interleaved chunks: the decoder is cut into pipeline * chunks pieces, dealt out in rounds, so chunk c of rank
        # r is piece c * pipeline + r. Only the first piece of all has tower and embedding, and only the last one the
        # output head.
        return tuple(
            PipelineChunk(c, chunks, self.pipeline_rank == 0 and c == 0, self.pipeline_rank == last and c == chunks - 1)
            for c in range(chunks)
        )

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a small tensor over all ranks, in place."""
        dist.all_reduce(values)
        self.watch.beat()
        return values

    def sum_over_copy(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a small tensor over the ranks that share this replica of the model, in place."""
        dist.all_reduce(values, group=self.groups.mp)
        self.watch.beat()
        return values

    def max_over_world(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def broadcast_object(self, value: object) -> object:
        """Sends a small picklable object from rank 0 to all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        self.watch.beat()
        return box[0]

    def share_object(self, value: Any) -> Any:
        """Sends a picklable object from the first rank of each replica to the others of that replica."""
        if self.groups.mp.size() == 1:
            return value
        # The first rank of the group is the one with ``loads_data``: tensor rank 0 of the first stage.
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_process_group_ranks(self.groups.mp)[0], group=self.groups.mp)
        self.watch.beat()
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
        self.watch.beat()
        return values


def _join_world(timeout: datetime.timedelta, init_method: str, rank: int, world_size: int) -> Any:
    """Joins the default group; returns the store through which the ranks met.

    Raises:
        MachineError: not all ranks came.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not init_method and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        # A single process needs no network, and nobody who starts one has set an address.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return None
    try:
        # The rendezvous is made here and not by init_process_group: the watch needs its store, and a rank that is
        # missing can be named through it.
        place = (init_method, rank, world_size) if init_method else ("env://", -1, -1)  # the environment knows the rest
        store, rank, world_size = next(dist.rendezvous(*place, timeout=timeout + STARTS_APART))
        _wait_for_all(store, rank, world_size, timeout + STARTS_APART)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        text = f"the ranks did not find each other: {reason}; see that all of them start, then {RESUME}"
        raise MachineError(text) from error
    return store


def _wait_for_all(store: Any, rank: int, world_size: int, patience: datetime.timedelta) -> None:
    """Returns as soon as all ranks are here: some import for longer than a collective may take."""
    # The counter lets everyone wait for a single key; the key of each rank is there to say who is missing.
    store.set(f"here/{rank}", "yes")
    if store.add("here", 1) == world_size:
        store.set("all here", "yes")
    try:
        store.wait(["all here"], patience)
    except dist.DistStoreError:
        missing = [str(other) for other in range(world_size) if not store.check([f"here/{other}"])]
        text = f"rank {', '.join(missing)} of {world_size} did not start within {patience.total_seconds():.0f} s"
        raise MachineError(f"{text}; look for its own message, then {RESUME}") from None


def _group_timeout(config: ParallelConfig) -> datetime.timedelta:
    """Sets how long collectives wait. NCCL kills the process where it gives up, so there the watch speaks first."""
    last_resort_s = 2 * MARGIN_S if torch.cuda.is_available() else 0
    return datetime.timedelta(seconds=config.timeout_s + last_resort_s)


def start_topology(
    config: ParallelConfig,
    seed: int,
    init_method: str = "",
    rank: int = 0,
    world_size: int = 1,
    output: str = "",
) -> Topology:
    """Joins the process group and builds every parallel group. Ends with a seeded random state on every rank.

    Args:
        init_method: a rendezvous URL with explicit ``rank`` and ``world_size``; empty reads torchrun's environment, or
            makes a world of one rank where there is none.
        output: folder for the stacks of ranks that wait in vain; without it they go to standard error.

    Raises:
        ConfigError: the environment does not say which rank this is.
        MachineError: a rank is missing, or was lost.
    """
    if not init_method:
        place = read_place(os.environ, torch.cuda.is_available())
        if place.by_torchrun:
            watch_parent(speaks=place.is_main)
    install_cpu_support()
    install_fixes()
    install_writers()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    timeout = _group_timeout(config)
    store = _join_world(timeout, init_method, rank, world_size)
    watch = _watch_world(store, config.timeout_s, output)
    # Watched from here on: making the groups is already collective, and so can wait for ever.
    with watch.explaining():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout.total_seconds() / 60,  # it makes a timedelta of them, seconds and all
        )
    # Megatron's own random state, which differs between tensor-parallel ranks; then torch's, alike on all ranks.
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    # Two collections that share all groups, but for the tensor-parallel one of the tower.
    groups = ProcessGroupCollection.use_mpu_process_groups()
    tower_groups = ProcessGroupCollection.use_mpu_process_groups()
    # Only this rank takes part in making the group: no handshake with thousands of others.
    tower_groups.tp = dist.new_group([dist.get_rank()], use_local_synchronization=True, timeout=timeout)
    with watch.explaining():
        host_group = _host_group(groups.mp, timeout)
    copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Topology(config, groups, tower_groups, device, rank, world_size, watch, host_group, copy_stream)


def _host_group(group: dist.ProcessGroup, timeout: datetime.timedelta) -> dist.ProcessGroup:
    """The ranks of a group again, for tensors in host memory: gloo, also where the devices have NCCL. Collective."""
    copies: list[Any] = [None] * dist.get_world_size()
    # All ranks make all groups, in one order: torch names a group that only its members make by the number of groups that a
    # rank is in, and the stages of a pipeline are in different numbers of them.
    dist.all_gather_object(copies, tuple(dist.get_process_group_ranks(group)))
    ranks = [list(one) for one in dict.fromkeys(copies)]
    return dist.new_subgroups_by_enumeration(ranks, timeout=timeout, backend="gloo")[0]


def _watch_world(store: Any, timeout_s: float, output: str) -> RankWatch:
    """Watches this rank for as long as the world lasts that it has just joined."""
    world, size = dist.group.WORLD, dist.get_world_size()
    store = store.clone() if size > 1 else None  # a connection of its own: the main thread may wait on the other
    folder = Path(output) if output else None
    watch = RankWatch(dist.get_rank(), size, timeout_s, store, folder, spins=torch.cuda.is_available())
    # A process may join one world after another, as tests do: each watch ends with the world it was made for.
    watch.start(lambda: dist.is_initialized() and dist.group.WORLD is world)
    return watch


def stop_topology() -> None:
    """Leaves all groups; safe to call when nothing was started."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
