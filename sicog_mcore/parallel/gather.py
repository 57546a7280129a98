"""Gathers the shards of one tensor on rank 0, for writing a whole model one tensor at a time.

The shards travel point to point, so no rank holds what it does not own, save rank 0 for one tensor. The file also runs work
that may fail on one rank and then fails on all of them, so that none waits for another.   Used by: checkpoint/export.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sicog_mcore.errors import CheckpointError, SicogError
from sicog_mcore.parallel.topology import Topology

WRITER = 0  # the rank that receives

T = TypeVar("T")


def gather_shards(
    own: Tensor | None, owners: Sequence[int], shape: Sequence[int], dtype: torch.dtype, topology: Topology
) -> list[Tensor]:
    """Gathers one tensor's shards; every rank calls it for the same tensors in the same order.

    Args:
        own: this rank's shard where it is one of the owners.
        owners: ranks of all shards, in order.
        shape: of one shard.
        dtype: in which the shards travel and arrive.

    Returns:
        on rank 0 all shards, on the CPU; elsewhere nothing.
    """
    if topology.rank in owners:
        assert own is not None, "an owner must hand in its shard"
        own = own.detach().to(dtype).contiguous()
    # Sends and receives need no tags: both sides go through tensors and owners in one order.
    if topology.rank != WRITER:
        if own is not None and topology.rank in owners:
            dist.send(own, dst=WRITER)
        return []
    return [_receive(own, owner, shape, dtype, topology.device).cpu() for owner in owners]


def _receive(own: Tensor | None, owner: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if owner == WRITER:
        assert own is not None, "an owner must hand in its shard"
        return own
    buffer = torch.empty(tuple(shape), dtype=dtype, device=device)
    dist.recv(buffer, src=owner)
    return buffer


def first_failure(topology: Topology, failure: T | None) -> T | None:
    """Gathers what failed on each rank, None for nothing; returns that of the lowest rank, on every rank. Collective."""
    return next((found for found in topology.gather_objects(failure) if found is not None), None)


def on_all(topology: Topology, work: Callable[[], T]) -> T:
    """Does work on every rank, and waits for all; where it fails on one, it fails on all. Collective.

    Returns:
        what the work returned on this rank.

    Raises:
        CheckpointError: on every rank, with the text of the lowest rank that met one.
    """
    # An error raised at once would leave the other ranks waiting in the gathering below.
    failure, results = None, []
    try:
        results.append(work())
    except CheckpointError as error:
        failure = str(error)
    text = first_failure(topology, failure)
    if text is not None:
        raise CheckpointError(text)
    return results[0]


def on_main(topology: Topology, work: Callable[[], object], errors: tuple[type[BaseException], ...]) -> None:
    """Does work on rank 0, the others wait; where it fails, it fails on all ranks.

    Args:
        errors: what a failing disk raises; reported like a CheckpointError.

    Raises:
        CheckpointError: on every rank.
    """
    failure = None
    if topology.is_main:
        try:
            work()
        except SicogError as error:
            failure = str(error)
        except errors as error:
            failure = f"it cannot be written: {error}; make room, or choose another folder"
    # Broadcast also where nothing failed: the other ranks wait in it for the end of the work.
    text = topology.broadcast_object(failure)
    if text is not None:
        raise CheckpointError(str(text))
