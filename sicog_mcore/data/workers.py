"""Decoding of packs in worker processes, and what is to be said when one of them dies or hangs.

In: PackPlans   Out: PackedBatches with the samples that could not be decoded   Next: loader.py
Reason: row_changed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Dataset

from sicog_mcore.config import DataConfig, ModelConfig
from sicog_mcore.data.batch import EncodedSample, PackedBatch
from sicog_mcore.data.collate import collate
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.index.block_table import BlockUnreadable
from sicog_mcore.data.plan import PackPlan
from sicog_mcore.data.quarantine import Rejection
from sicog_mcore.data.resume import EpochRows
from sicog_mcore.data.sources import SampleIndex
from sicog_mcore.errors import DataError, SampleError

WORKER_REMEDY = "look for out-of-memory kills, or lower data.workers"

Decoded = tuple[PackedBatch, list[Rejection]]


class PackBuilder(Dataset[Decoded | DataError]):
    """Decodes the samples of a pack; what runs in the workers.

    An index that cannot be read any more is returned, not raised: a worker's exception arrives with a page of traceback.
    """

    def __init__(self, rows: EpochRows, encoder: Encoder, model: ModelConfig, data: DataConfig) -> None:
        self._rows = rows.without_sizes()
        self._encoder = encoder
        self._model = model
        self._data = data

    def __getitem__(self, plan: PackPlan) -> Decoded | DataError:
        try:
            return self.build(plan)
        except BlockUnreadable as error:
            return DataError(f"{error}; was the index deleted while a run needs it? the same command builds it again")

    def build(self, plan: PackPlan) -> Decoded:
        """The batch of a pack, and what could not be decoded.

        Raises:
            BlockUnreadable: the index is gone.
        """
        samples = self._rows.of(plan.epoch)
        outcomes = [self._encode(samples, row, plan.epoch) for row in plan.members]
        batch = collate(
            [outcome for outcome in outcomes if isinstance(outcome, EncodedSample)],
            token_budget=self._data.token_budget,
            pad_id=self._encoder.chat.pad_id,
            queries=self._model.resampler.queries,
            patch_dim=self._model.tower.patch_dim,
        )
        return batch, [outcome for outcome in outcomes if isinstance(outcome, Rejection)]

    def _encode(self, samples: SampleIndex, row: int, epoch: int) -> EncodedSample | Rejection:
        """One sample, or why it cannot be used."""
        sample_id = f"row {row}"
        try:
            sample = samples.read(row)
            sample_id = sample.id
            encoded = self._encoder.encode(sample)
            _check_size(encoded, samples.measures(row))
            return encoded
        except SampleError as error:
            return Rejection(sample_id, samples.origin(row), error.reason, error.detail, epoch)


def _check_size(encoded: EncodedSample, planned: tuple[int, int] | None) -> None:
    """Refuses a sample that is not what its pack was planned for: its image, which the index does not watch, was changed."""
    found = (len(encoded.tokens), len(encoded.grids))
    if planned is not None and found != planned:
        sizes = "{} tokens and {} slices".format
        detail = (
            f"found {sizes(*found)}, the index has {sizes(*planned)}; was an image replaced? then delete data.index"
        )
        raise SampleError("row_changed", detail)


class PackDecoder(Iterator[Decoded]):
    """Decoded packs in the order of their plans; workers start with the first one.

    Args:
        builder: decodes a pack.
        plans: endless; asked for a few packs ahead of what was handed out.
        data: number of workers, and how long a batch may take.
        pin_memory: put batches into page-locked memory (needs CUDA).
    """

    def __init__(self, builder: PackBuilder, plans: Iterator[PackPlan], data: DataConfig, pin_memory: bool) -> None:
        self._builder = builder
        self._plans = plans
        self._data = data
        self._pin_memory = pin_memory
        # A new thread starts on device 0; pages must be locked for this rank's own.
        select_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="batch-fetcher", initializer=select_device)
        self._workers: list[BaseProcess] = []
        self._batches = self._decode()

    def __next__(self) -> Decoded:
        """The next pack.

        Raises:
            DataError: a worker died, nothing came within data.worker_timeout_s, or the index is gone.
        """
        # In a thread: whatever stops (a worker, its pipe, the storage), this one goes on.
        fetched = self._fetching.submit(next, self._batches)
        try:
            decoded = fetched.result(timeout=self._data.worker_timeout_s)
        except TimeoutError as error:
            self._kill_workers()  # so that the thread ends, and the process can
            found = f"no batch within data.worker_timeout_s ({self._data.worker_timeout_s} s)"
            raise DataError(f"{found}; is the storage slow, or a worker stuck?") from error
        except (EOFError, ConnectionError) as error:  # a worker died with a batch half handed over
            raise DataError(f"decoding stopped: a worker died; {WORKER_REMEDY}") from error
        except RuntimeError as error:
            # torch tells a dead worker from a worker's own error by these words only
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(f"decoding stopped: {error}; {WORKER_REMEDY}") from error
        if isinstance(decoded, DataError):
            raise decoded
        return decoded

    def close(self) -> None:
        """Ends the workers and the thread."""
        self._kill_workers()
        self._fetching.shutdown()
        self._batches.close()

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _decode(self) -> Generator[Decoded | DataError, None, None]:
        others = set(active_children())
        batches = iter(
            DataLoader(
                self._builder,
                batch_size=None,
                sampler=self._plans,
                num_workers=self._data.workers,
                multiprocessing_context="spawn" if self._data.workers else None,
                pin_memory=self._pin_memory,
                generator=torch.Generator(),  # otherwise the workers' seeds are drawn from the model's random stream
            )
        )
        self._workers = [process for process in active_children() if process not in others]
        yield from batches
