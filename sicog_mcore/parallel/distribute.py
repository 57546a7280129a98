"""One loader per model copy; its batches handed to every tensor-parallel and pipeline rank of that copy.

In: PackedBatch on the loading rank   Out: the same PackedBatch on all ranks of the copy   Next: train/step.py
Pixels go to the first pipeline stage only, as uint8. A failure of the loader reaches every rank as the same error instead
of leaving the others to wait. As long as the loader takes, the others are told so again and again: a slow loader has a time
limit of its own (``data.worker_timeout_s``) and is no collective that hangs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.errors import DataError, PeerError
from sicog_mcore.parallel.topology import Topology

HEADER_FIELDS = (
    11  # what it is, ends_step, t, n + 1, p, k, m, length of pair_reference, num_tokens, num_images, num_pairs
)
BATCH, FAILED, NOT_YET = 0, 1, 2  # what a header announces
NOT_YET_EVERY_S = 5.0  # or more often, where collectives may not take long


@dataclass(frozen=True)
class BatchSpec:
    """What a receiving rank must know beforehand: the width of a patch row."""

    patch_dim: int


class StepwiseLoader(Protocol):
    """Endless batches; ``ends_step`` says whether the last one closed an optimiser step."""

    @property
    def ends_step(self) -> bool:
        """Whether the next batch belongs to the next step."""

    def __next__(self) -> PackedBatch:
        """The next batch, in host memory."""


class BatchDistributor:
    """Iterator of PackedBatch on this rank's device, equal on all ranks of a model copy.

    Args:
        loader: the data loader on the rank where ``topology.loads_data``; None elsewhere.
    """

    def __init__(self, topology: Topology, spec: BatchSpec, loader: StepwiseLoader | None):
        self.topology = topology
        self.spec = spec
        self.loader = loader
        self.ends_step = True  # whether the last batch was the last one of an optimiser step

    def __iter__(self) -> BatchDistributor:
        return self

    def __next__(self) -> PackedBatch:
        batch: PackedBatch | None
        if self.topology.groups.mp.size() > 1:
            batch = self._share(*(self._load_while_others_wait() if self.loader is not None else (None, None)))
        else:
            batch, error = self._load()
            if error is not None:
                raise error
        self.topology.watch.beat()
        assert batch is not None, "a rank without a loader must be in a group with one"
        return batch

    def _load(self) -> tuple[PackedBatch | None, DataError | None]:
        assert self.loader is not None
        try:
            batch = next(self.loader).to(self.topology.device)
            self.ends_step = self.loader.ends_step
            return batch, None
        except DataError as error:
            return None, error

    def _load_while_others_wait(self) -> tuple[PackedBatch | None, DataError | None]:
        """Loads a batch, and tells the ranks that wait for it that it takes time."""
        loaded = threading.Event()
        failures: list[RuntimeError] = []

        def tell() -> None:
            device = self.topology.device
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # a new thread starts on device 0
                while not loaded.wait(min(NOT_YET_EVERY_S, self.topology.config.timeout_s / 3)):
                    header = torch.zeros(HEADER_FIELDS, dtype=torch.int64, device=device)
                    header[0] = NOT_YET
                    self._broadcast(header, self.topology.groups.mp)
                    self.topology.watch.beat()
            except RuntimeError as error:
                failures.append(error)

        # The loader stays in the main thread, where torch reports the death of one of its workers.
        teller = threading.Thread(target=tell, name="not yet", daemon=True)
        teller.start()
        try:
            batch, error = self._load()
        finally:
            loaded.set()
        teller.join()
        if failures:
            raise failures[0]
        return batch, error

    def _share(self, batch: PackedBatch | None, error: DataError | None) -> PackedBatch:
        header = torch.zeros(HEADER_FIELDS, dtype=torch.int64, device=self.topology.device)
        if error is not None:
            header[0] = FAILED
        if batch is not None:
            rows = (batch.tokens, batch.cu_seqlens, batch.patches, batch.grids, batch.image_slots, batch.pair_reference)
            counts = [batch.num_tokens, batch.num_images, batch.num_pairs]
            header[1] = self.ends_step
            header[2:] = torch.tensor([x.shape[0] for x in rows] + counts)
        self._broadcast(header, self.topology.groups.mp)
        while header[0] == NOT_YET:
            self.topology.watch.beat()
            self._broadcast(header, self.topology.groups.mp)
        kind, ends_step, t, n, p, k, m, references, num_tokens, num_images, num_pairs = header.tolist()
        self.ends_step = bool(ends_step)
        if kind == FAILED:
            raise error or PeerError("the data loader of this model copy failed; its own rank says why")
        new = self._empty
        batch = batch or PackedBatch(
            tokens=new(t),
            labels=new(t),
            positions=new(t),
            cu_seqlens=new(n, dtype=torch.int32),
            patches=new(p if self.topology.is_first_stage else 0, self.spec.patch_dim, dtype=torch.uint8),
            grids=torch.empty(k, 2, dtype=torch.int64),
            image_slots=new(m),
            visual_rows=new(m),
            num_tokens=num_tokens,
            num_images=num_images,
            sample_ids=(),
            num_pairs=num_pairs,
            pair_reference=new(references, dtype=torch.float64),
        )
        for tensor in (batch.tokens, batch.labels, batch.positions, batch.cu_seqlens):
            self._broadcast(tensor, self.topology.groups.mp)
        for tensor in (batch.image_slots, batch.visual_rows, batch.pair_reference):
            self._broadcast(tensor, self.topology.groups.mp)
        if self.topology.is_first_stage:
            self._broadcast(batch.patches, self.topology.groups.tp)
        grids = batch.grids.to(self.topology.device)
        self._broadcast(grids, self.topology.groups.mp)
        return replace(batch, grids=grids.cpu())

    def _empty(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.topology.device)

    def _broadcast(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        if tensor.numel() and group.size() > 1:
            dist.broadcast(tensor, src=dist.get_process_group_ranks(group)[0], group=group)
