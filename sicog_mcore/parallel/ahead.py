"""Micro-batches on this rank's device, each copied while the one before runs.

In: PackedBatches of a step in host memory (distribute.py)   Out: the same on the device   Next: train/step.py
A schedule takes one micro-batch after the other. When it takes one, the copy of the next is begun on a stream of its own,
so that the device computes and copies at the same time, and never holds the pixels of a whole step. The pixels of a
tensor-parallel group are copied from the host by its first rank, and broadcast to the others, at the same place: all of
them run the same schedule, so all of them meet there in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sicog_mcore.data.batch import TENSORS, PackedBatch
from sicog_mcore.data.wire import num_pixel_bytes, pixels_of, with_pixels
from sicog_mcore.parallel.topology import Topology


class DeviceBatches:
    """The micro-batches of one pass, handed to each model chunk of this rank in turn.

    Args:
        batches: in host memory, or on the device already.
        num_readers: model chunks of this rank, each of which reads all of them; what all have read is let go.
    """

    def __init__(self, topology: Topology, batches: Sequence[PackedBatch], num_readers: int):
        self._topology = topology
        self._batches = batches
        self._num_readers = num_readers
        self._copied: dict[int, tuple[PackedBatch, Any]] = {}  # by place: on the device, and when the copy is done
        self._num_copied = 0
        self._reads = [0] * len(batches)

    def reader(self) -> Iterator[PackedBatch]:
        """All micro-batches for one model chunk."""
        return (self._take(place) for place in range(len(self._batches)))

    def _take(self, place: int) -> PackedBatch:
        while self._num_copied < min(place + 2, len(self._batches)):
            self._copied[self._num_copied] = self._copy(self._batches[self._num_copied])
            self._num_copied += 1
        batch, is_done = self._copied[place]
        self._reads[place] += 1
        if self._reads[place] == self._num_readers:
            del self._copied[place]
        if is_done is not None:
            computing = torch.cuda.current_stream(self._topology.device)
            computing.wait_event(is_done)
            for name in TENSORS:
                if (tensor := getattr(batch, name)).is_cuda:
                    tensor.record_stream(computing)  # its memory is the copying stream's, and must outlast this use
        return batch

    def _copy(self, batch: PackedBatch) -> tuple[PackedBatch, Any]:
        """Begins a copy; the second value is the event that ends it, None where there are no streams."""
        stream = self._topology.copy_stream
        if stream is None:
            return self._on_device(batch), None
        # What the device was told before comes first: tensors that are there already, and the micro-batch before the one
        # that runs next to this copy, so that no more than two are in its memory.
        stream.wait_stream(torch.cuda.current_stream(self._topology.device))
        with torch.cuda.stream(stream):
            return self._on_device(batch), stream.record_event()

    def _on_device(self, batch: PackedBatch) -> PackedBatch:
        topology = self._topology
        if not topology.is_first_stage or topology.groups.tp.size() == 1 or not num_pixel_bytes(batch):
            return batch.to(topology.device)
        if topology.tensor_rank == 0:
            batch = batch.to(topology.device)
            pixels = pixels_of(batch)
        else:
            pixels = torch.empty(num_pixel_bytes(batch), dtype=torch.uint8, device=topology.device)
            batch = with_pixels(batch, pixels).to(topology.device)
        topology.share_over_tensor(pixels)
        return batch
