"""Corrects Megatron's description of the optimizer for a checkpoint where gradient buckets are padded.

Buckets end at multiples of 128 and of the data-parallel size. For a checkpoint Megatron collects the states of a buffer
without the padding behind its buckets; 0.16 then cuts parameters out of them by their places *with* that padding. So with
more than one bucket, as in every model of some size, a parameter's state could be written under its neighbour's name, and
a resumed run went on from wrong masters and moments. Here the places are without padding, and the result is checked.
Pull request 5077 of Megatron-LM mends it, which neither megatron-core 0.16.1 nor 0.19.2 has; a test fails with the first
version that has it, and this file can go when no supported version is without it.
Used by ddp.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from sicog_mcore.errors import CheckpointError

FAULT = "missing_elems_num"  # Megatron's own patch over this fault, gone where it is mended
# Relative difference between weights and masters: one step makes less, numbers of another tensor make more.
OTHER_NUMBERS = 1.0


def repair_description(optimizer: Any) -> None:
    """Makes a ``DistributedOptimizer`` describe itself rightly whatever the padding of its buckets."""
    original = optimizer.sharded_param_state_fully_reshardable
    optimizer.sharded_param_state_fully_reshardable = partial(_describe, optimizer, original)


def _describe(
    optimizer: Any, original: Any, model_state: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
) -> Any:
    if not any(_has_gaps(buffer) for buffer in optimizer.buffers):
        return original(model_state, is_loading, metadata)
    # A version that is mended needs no other places, and would cut wrongly with them; the check below is for all
    # versions.
    is_faulty = FAULT in inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable)
    with _places_without_padding(optimizer.buffers if is_faulty else ()):
        state = original(model_state, is_loading, metadata)
    if not is_loading and state is not None:
        _require_own_masters(optimizer, state)
    return state


def _has_gaps(buffer: Any) -> bool:
    # Padding behind the last bucket moves no parameter.
    return any(bucket.numel_unpadded != bucket.grad_data.numel() for bucket in buffer.buckets[:-1])


@contextmanager
def _places_without_padding(buffers: Sequence[Any]) -> Iterator[None]:
    places = [buffer.param_index_map for buffer in buffers]
    for buffer, padded in zip(buffers, places, strict=True):
        shifts, end = [], 0
        for bucket in buffer.buckets:
            # All padding in front of the bucket: its offset in the padded buffer, less the elements of the buckets
            # before it.
            shifts.append(bucket.offset - end)
            end += bucket.numel_unpadded
        # Another map for the time of the description only: training finds its gradients by the padded places.
        buffer.param_index_map = {
            parameter: (first - shifts[bucket], last - shifts[bucket], bucket)
            for parameter, (first, last, bucket) in padded.items()
        }
    try:
        yield
    finally:
        for buffer, padded in zip(buffers, places, strict=True):
            buffer.param_index_map = padded


def own_weights(optimizer: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Gives this rank's share of every trained matrix; fp32 weights are their own masters, so their shares are copied."""
    shares = {}
    for _, parameter, places in _shares(optimizer):
        # Matrices only: a bias may stand at zero, where any step is a large relative change.
        if parameter.dim() > 1:
            share = parameter.detach().view(-1)[places.start : places.end]
            shares[parameter] = share.clone() if share.dtype is torch.float32 else share
    return shares


def count_foreign_masters(optimizer: Any, weights: dict[torch.nn.Parameter, torch.Tensor]) -> int:
    """Counts the shares whose masters are not a step away, but the numbers of another tensor."""
    count = 0
    for parameter, share in weights.items():
        master = optimizer._get_main_param_and_optimizer_states(parameter)["param"].detach()
        # A share and its master differ by rounding and at most one step, a small part of their norm. Numbers of another
        # tensor of this size differ by about sqrt(2) times the norm.
        count += bool((share.float() - master).norm() > OTHER_NUMBERS * share.float().norm())
    return count


def _shares(optimizer: Any) -> Iterator[tuple[int, torch.nn.Parameter, Any]]:
    """Yields each parameter of whose masters this rank has a share: its index in a description, and the share."""
    index = -1
    for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        # gbuf_ranges: for each buffer {dtypes: [a bucket's ranges]}; "param" is the range within the flattened
        # parameter.
        buckets = [bucket["param_map"] for per_bucket in ranges.values() for bucket in per_bucket]
        mine = {parameter: places["param"] for bucket in buckets for parameter, places in bucket.items()}
        for parameter in buffer.param_index_map:
            # A description numbers all parameters of all buffers, also those of which this rank has no share.
            index += 1
            if parameter in mine:
                yield index, parameter, mine[parameter]


def _require_own_masters(optimizer: Any, state: dict[int, Any]) -> None:
    """Checks that this rank's share of the masters stands where the description says.

    Raises:
        CheckpointError: it does not; nothing may be written then.
    """
    for index, parameter, places in _shares(optimizer):
        described = state[index]["param"]
        master = optimizer._get_main_param_and_optimizer_states(parameter)["param"].detach()
        if not torch.equal(described.data.flatten()[places.start : places.end], master.to(described.data)):
            raise CheckpointError(
                f"Megatron would write the wrong state of {described.key}, because gradient buckets are padded; "
                "set parallel.overlap_grad_reduce=false and report this"
            )
