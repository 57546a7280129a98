"""The data as the training loop sees it: the batches of one step, and what they held.

In: Experiment, LoaderState   Out: this rank's PackedBatches of a step, Counts   Next: trainer.py
On ranks that load, every consumed sample id is written to ``consumed-R.jsonl``: the proof of what a run was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.data.loader import Loader, LoaderState
from sicog_mcore.data.quarantine import Quarantine
from sicog_mcore.errors import writing
from sicog_mcore.parallel.distribute import BatchDistributor, BatchSpec
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.train.flops import Counts
from sicog_mcore.train.metrics import drop_steps_from

CONSUMED = "consumed-{}.jsonl"

Complete = Callable[[PackedBatch], PackedBatch]


class CountingLoader:
    """A loader that remembers what it handed out since ``take``; one per model copy.

    Args:
        start: where to begin in the stream of packs.
        complete: adds what the loader cannot know (reference log-probabilities); None adds nothing.
    """

    def __init__(self, experiment: Experiment, topology: Topology, start: LoaderState, complete: Complete | None):
        output, replica = Path(experiment.output), topology.data_rank
        self.quarantine = Quarantine(
            output / f"quarantine-{replica}.jsonl", experiment.data.max_bad_rate, experiment.data.bad_window
        )
        self.loader = Loader(
            experiment,
            replica,
            topology.data_size,
            self.quarantine,
            start,
            pin_memory=topology.device.type == "cuda",
        )
        self._counts = Counts()
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
        self._counts += Counts.of(batch)
        self._ids += batch.sample_ids
        return self._complete(batch) if self._complete else batch

    def take(self, step: int) -> Counts:
        """What was handed out since the last call; records its sample ids under ``step``."""
        with writing(self._record), self._record.open("a", encoding="utf-8") as record:
            record.write(json.dumps({"step": step, "ids": self._ids}, ensure_ascii=False) + "\n")
        counts, self._counts, self._ids = self._counts, Counts(), []
        return counts


class Feed:
    """Batches of one optimiser step for this rank, equal on all ranks of a model copy."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        start: Mapping[str, int],
        first_step: int,
        complete: Complete | None = None,
    ):
        if topology.is_main:
            # What an interrupted run recorded from here on will be recorded again, maybe by fewer replicas.
            for record in Path(experiment.output).glob(CONSUMED.format("*")):
                drop_steps_from(record, first_step)
        self.source: CountingLoader | None = None
        if topology.loads_data:
            self.source = CountingLoader(experiment, topology, LoaderState(**start), complete)
        self._batches = BatchDistributor(topology, BatchSpec(experiment.model.tower.patch_dim), self.source)

    def next_step(self) -> list[PackedBatch]:
        """This model copy's share of the next global batch, one packed sequence per micro-batch."""
        batches = [next(self._batches)]
        while not self._batches.ends_step:
            batches.append(next(self._batches))
        return batches

    def take(self, step: int) -> Counts:
        """What this model copy consumed since the last call; zeros on ranks that do not load."""
        return self.source.take(step) if self.source else Counts()

    @property
    def num_rows(self) -> int:
        """Rows of all data sets; 0 on ranks that do not load."""
        return self.source.loader.num_rows if self.source else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the data before the start; nothing on ranks that do not load."""
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

    def close(self) -> None:
        if self.source:
            self.source.loader.close()
