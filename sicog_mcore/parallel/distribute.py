"""One loader per replica; its batches handed to every tensor-parallel and pipeline rank of that replica.

In: PackedBatch on the loading rank   Out: the same PackedBatch in host memory on all ranks of the replica   Next: ahead.py
One broadcast between host memories brings everything but pixels: all ranks know the most that a batch may hold, so its
sizes need no message of their own, and are known without asking a device. Pixels follow in ahead.py, to the first pipeline
stage only. A failure of the loader reaches every rank as the same error instead of leaving the others to wait. As long as
the loader takes, the others are told so again and again: a slow loader has a time limit of its own
(``data.worker_timeout_s``) and is no collective that hangs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.data.wire import most_words, num_pixel_bytes, pack, unpack, without_pixels
from sicog_mcore.errors import DataError, PeerError
from sicog_mcore.parallel.topology import Topology

ANNOUNCEMENT = 2  # words before the batch: what it is, and ends_step
BATCH, FAILED, NOT_YET = 0, 1, 2  # what it may be
NOT_YET_EVERY_S = 5.0  # or more often, where collectives may not take long


@dataclass(frozen=True)
class BatchSpec:
    """Budgets that a receiving rank must know beforehand, since they bound every size of a batch."""

    token_budget: int
    slice_budget: int

    @classmethod
    def of(cls, experiment: Experiment) -> BatchSpec:
        """The budgets of a run."""
        return cls(experiment.data.token_budget, experiment.data.slice_budget)


class StepwiseLoader(Protocol):
    """Endless batches; ``ends_step`` says whether the last one closed an optimiser step."""

    @property
    def ends_step(self) -> bool:
        """Whether the next batch belongs to the next step."""

    def __next__(self) -> PackedBatch:
        """The next batch, in host memory."""


class BatchDistributor:
    """Iterator of PackedBatch in host memory, equal on all ranks of a replica but for pixels and sample ids.

    Args:
        loader: the data loader on the rank where ``topology.loads_data``; None elsewhere.
    """

    def __init__(self, topology: Topology, spec: BatchSpec, loader: StepwiseLoader | None):
        self.topology = topology
        self.loader = loader
        self.ends_step = True  # whether the last batch was the last one of an optimiser step
        self._num_words = ANNOUNCEMENT + most_words(spec.token_budget, spec.slice_budget)

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
            batch = next(self.loader)
            self.ends_step = self.loader.ends_step
            return batch, None
        except DataError as error:
            return None, error

    def _load_while_others_wait(self) -> tuple[PackedBatch | None, DataError | None]:
        """Loads a batch, and tells the ranks that wait for it that it takes time."""
        loaded = threading.Event()
        failures: list[RuntimeError] = []

        def tell() -> None:
            try:
                while not loaded.wait(min(NOT_YET_EVERY_S, self.topology.config.timeout_s / 3)):
                    self._broadcast(self._announce(NOT_YET))
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
        """One broadcast, unless the loader takes long: the loading rank's batch or failure reaches the others."""
        words = self._announce(BATCH if error is None else FAILED)
        if batch is not None:
            words[1] = self.ends_step
            pack(batch, words[ANNOUNCEMENT:])
        self._broadcast(words)
        while words[0] == NOT_YET:
            self.topology.watch.beat()
            self._broadcast(words)
        if words[0] == FAILED:
            raise error or PeerError("the data loader of this replica failed; its own rank says why")
        if batch is not None:
            return batch
        self.ends_step = bool(words[1])
        batch = unpack(words[ANNOUNCEMENT:])
        has_pixels = self.topology.is_first_stage and num_pixel_bytes(batch)
        return batch if has_pixels else without_pixels(batch)

    def _announce(self, kind: int) -> Tensor:
        """A buffer of its own for each batch, which the batch keeps: int64 [words], page-locked where copies need that."""
        words = torch.zeros(self._num_words, dtype=torch.int64, pin_memory=self.topology.device.type == "cuda")
        words[0] = kind
        return words

    def _broadcast(self, words: Tensor) -> None:
        group = self.topology.host_group
        dist.broadcast(words, src=dist.get_process_group_ranks(group)[0], group=group)
