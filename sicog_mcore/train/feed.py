"""The data as the training loop sees it: the batches of one step, and what they held.

In: Experiment, OpenRows   Out: this rank's PackedBatches of a step, WorkCounts   Next: trainer.py
On ranks that load, every consumed sample id is written to ``consumed-R.jsonl``: the proof of what a run was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.data.index.indexed_files import open_index
from sicog_mcore.data.loader import Loader
from sicog_mcore.data.plan import PackPlan
from sicog_mcore.data.quarantine import Quarantine, Rejection
from sicog_mcore.data.resume import LoaderState, OpenRows, open_rows, reopen_rows
from sicog_mcore.errors import CheckpointError, ConfigError, DataError, PeerError
from sicog_mcore.files import append_lines
from sicog_mcore.parallel.distribute import BatchDistributor, BatchSpec
from sicog_mcore.parallel.gather import first_failure
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.train.flops import WorkCounts, pack_cost
from sicog_mcore.train.index_share import share_index
from sicog_mcore.train.metrics import drop_steps_from

CONSUMED = "consumed-{}.jsonl"
QUARANTINE = "quarantine-{}.jsonl"

Complete = Callable[[PackedBatch], PackedBatch]


class CountingLoader:
    """A loader that remembers what it handed out since ``take``; one per replica.

    Args:
        opened: the data sets, and where to begin in the stream of packs.
        complete: adds what the loader cannot know (reference log-probabilities); None adds nothing.
    """

    def __init__(self, experiment: Experiment, topology: Topology, opened: OpenRows, complete: Complete | None):
        output, replica, data = Path(experiment.output), topology.data_rank, experiment.data
        self.quarantine = Quarantine(
            output / QUARANTINE.format(replica),
            data.max_bad_rate,
            data.bad_window,
            opened.bad,
            shown=str(output / QUARANTINE.format("*")) if topology.data_size > 1 else "",
        )
        self.loader = Loader(
            experiment,
            replica,
            topology.data_size,
            self.quarantine,
            opened.start,
            pin_memory=topology.device.type == "cuda",
            opened=opened,
            cost=pack_cost(experiment.model, experiment.optim.freeze),
        )
        self._opened = opened
        self._counts = WorkCounts()
        self._ids: list[str] = []
        self._complete = complete
        self._record = output / CONSUMED.format(replica)

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    @property
    def ends_step(self) -> bool:
        """Whether the last batch was the last one of an optimiser step."""
        return self.loader.ends_step

    def __next__(self) -> PackedBatch:
        batch = next(self.loader)
        self._counts += WorkCounts.of(batch)
        self._ids += batch.sample_ids
        return self._complete(batch) if self._complete else batch

    def judge(self, found: Iterable[tuple[PackPlan, Rejection]]) -> str:
        """Counts what decoding found bad on all replicas; returns the verdict on the share, empty if it is small enough."""
        bad_rows = self.loader.bad_rows
        for plan, rejection in found:
            bad_rows.add(plan.epoch, plan.window, rejection)
        verdict = bad_rows.verdict()
        bad_rows.forget_before(self.loader.state().epoch)
        return f"too many bad rows: {verdict}\n{self.quarantine.advice()}" if verdict else ""

    def data_state(self) -> dict[str, Any]:
        """Gives the data that the position depends on, for a checkpoint."""
        loader = self.loader
        return self._opened.state(loader.state(), loader.rows_left, loader.bad_rows.state())

    def take(self, step: int) -> WorkCounts:
        """Counts the batches handed out since the last call; records their sample ids under ``step``."""
        append_lines(self._record, [json.dumps({"step": step, "ids": self._ids}, ensure_ascii=False)])
        counts, self._counts, self._ids = self._counts, WorkCounts(), []
        return counts


def open_data(
    experiment: Experiment,
    topology: Topology,
    start: Mapping[str, int] | None = None,
    saved: Mapping[str, Any] | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> OpenRows | None:
    """Opens the data sets on ranks that load, and compares them with those of the checkpoint, if there is one. Collective.

    Args:
        start: the position in the checkpoint; None where a run begins.
        saved: what it holds of the data.
        notice: shows a line to the user.

    Raises:
        ConfigError: they cannot be opened, or their index would take too long to build. On all ranks, as is
        CheckpointError: they are not what they were.
        MachineError: the index cannot be written.
    """
    share_index(experiment, topology, notice)
    opened: OpenRows | None = None
    failure: object = None
    if topology.loads_data:
        try:
            index = open_index(experiment)
            opened = (
                reopen_rows(experiment, LoaderState(**start), saved or {}, index)
                if start
                else open_rows(experiment, index)
            )
        except ConfigError as error:
            failure = error.problems
        except CheckpointError as error:
            failure = str(error)
    found = first_failure(topology, failure)
    if isinstance(found, list):
        raise ConfigError(found)
    if found is not None:
        raise CheckpointError(str(found))
    return opened


class Feed:
    """Batches of one optimiser step for this rank, equal on all ranks of a replica.

    Args:
        opened: of ``open_data``; None on ranks that do not load.
        first_step: that will be asked for.
        complete: see CountingLoader.
    """

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        opened: OpenRows | None,
        first_step: int,
        complete: Complete | None = None,
    ):
        if topology.is_main:
            # What an interrupted run recorded from here on will be recorded again, maybe by fewer replicas.
            for record in Path(experiment.output).glob(CONSUMED.format("*")):
                drop_steps_from(record, first_step)
        self.source: CountingLoader | None = None
        if topology.loads_data:
            assert opened is not None, "a rank that loads has opened the data"
            self.source = CountingLoader(experiment, topology, opened, complete)
        self._topology = topology
        self._batches = BatchDistributor(topology, BatchSpec.of(experiment), self.source)

    def next_step(self) -> list[PackedBatch]:
        """This replica's share of the next global batch, one packed sequence per micro-batch. Collective.

        The batches are in host memory; step.py brings each to the device while the one before runs.

        Raises:
            DataError: on every rank, with one message, if the loader of any failed or too many rows are bad.
        """
        batches: list[PackedBatch] = []
        failure: DataError | None = None
        try:
            batches.append(next(self._batches))
            while not self._batches.ends_step:
                batches.append(next(self._batches))
        except DataError as error:
            failure = error
        self._agree(failure)
        return batches

    def _agree(self, failure: DataError | None) -> None:
        """One small sum in a step where nothing is wrong, so that no rank stops, or goes on, without the others."""
        topology = self._topology
        found, texts = (self.source.loader.found if self.source else []), []
        flags = torch.tensor([failure is not None, len(found)], dtype=torch.int64, device=topology.device)
        failed, num_found = topology.sum_over_world(flags).tolist()
        if failed:
            text = None if failure is None or isinstance(failure, PeerError) else str(failure)
            texts = topology.gather_objects(text)
        elif num_found:
            everywhere = [one for part in topology.gather_objects(list(found)) for one in part]
            texts = topology.gather_objects(self.source.judge(everywhere) if self.source else "")
        elif self.source:
            self.source.judge(())  # planning has judged; passes that are over are forgotten
        found.clear()
        if messages := [text for text in dict.fromkeys(texts) if text]:
            raise DataError("\n".join(messages)) if topology.is_main else PeerError("another rank reports why")

    def take(self, step: int) -> WorkCounts:
        """Counts the work this replica consumed since the last call; zeros on ranks that do not load."""
        return self.source.take(step) if self.source else WorkCounts()

    @property
    def num_rows(self) -> int:
        """Rows of all data sets; 0 on ranks that do not load."""
        return self.source.loader.num_rows if self.source else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Lists notes on the data to print before the start; none on ranks that do not load."""
        return self.source.loader.notes if self.source else ()

    @property
    def wait_s(self) -> float:
        """Seconds this rank waited for decoded batches so far."""
        return self.source.loader.wait_s if self.source else 0.0

    @property
    def num_quarantined(self) -> int:
        return self.source.quarantine.num_bad if self.source else 0

    @property
    def num_truncated(self) -> int:
        return self.source.quarantine.num_truncated if self.source else 0

    def state(self) -> Mapping[str, int]:
        """Where the next step starts; empty on ranks that do not load."""
        return asdict(self.source.loader.state()) if self.source else {}

    def data_state(self) -> Mapping[str, Any]:
        """Gives the data that the position depends on; empty on ranks that do not load."""
        return self.source.data_state() if self.source else {}

    def close(self) -> None:
        if self.source:
            self.source.loader.close()
