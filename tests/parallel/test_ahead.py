"""Each micro-batch is copied while the one before runs, and no host waits for a device on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sicog_mcore.data.batch import TENSORS, PackedBatch
from sicog_mcore.parallel.ahead import DeviceBatches
from sicog_mcore.parallel.distribute import BatchDistributor, BatchSpec
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from tests.batches import random_batches
from tests.builders import tiny_experiment

EXPERIMENT = tiny_experiment(Path("unused"), data={"token_budget": 512})
COUNT = 4


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(EXPERIMENT.parallel, seed=0)
    stop_topology()


class Script:
    """Stands for a CUDA stream and writes down what it is told."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said, self.events = name, said, 0

    def wait_stream(self, other: Script) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> int:
        self.events += 1
        self.said.append(f"{self.name} copied {self.events - 1}")
        return self.events - 1

    def wait_event(self, event: int) -> None:
        self.said.append(f"{self.name} waits for copy {event}")


def test_the_next_copy_is_begun_before_a_micro_batch_is_handed_out(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    copying, computing = Script("copying", said), Script("computing", said)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    batches = DeviceBatches(replace(topology, copy_stream=copying), random_batches(EXPERIMENT, 3), 1)
    for place, _ in enumerate(batches.reader()):
        said.append(f"computing runs {place}")
    assert said == [
        *("copying waits for computing", "copying copied 0", "copying waits for computing", "copying copied 1"),
        *("computing waits for copy 0", "computing runs 0"),
        *("copying waits for computing", "copying copied 2"),
        *("computing waits for copy 1", "computing runs 1"),
        *("computing waits for copy 2", "computing runs 2"),
    ]


def test_every_chunk_reads_the_same_copies_and_only_two_are_kept(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[PackedBatch] = []
    copy = PackedBatch.to

    def counted(batch: PackedBatch, device: torch.device) -> PackedBatch:
        copies.append(batch)
        return copy(batch, device)

    monkeypatch.setattr(PackedBatch, "to", counted)
    expected = random_batches(EXPERIMENT, COUNT)
    batches = DeviceBatches(topology, expected, num_readers=2)
    first, second = batches.reader(), batches.reader()
    for place in range(COUNT):
        one, other = next(first), next(second)
        assert one is other and len(copies) == min(place + 2, COUNT)
        assert all(torch.equal(getattr(one, name), getattr(expected[place], name)) for name in TENSORS)
        assert len(batches._copied) <= 1  # the one ahead; what both have read is let go
    assert list(first) == list(second) == []


class Loaded:
    """A loader of random batches, each the last one of a step."""

    ends_step = True

    def __init__(self) -> None:
        self._batches = iter(random_batches(EXPERIMENT, COUNT))

    def __next__(self) -> PackedBatch:
        return next(self._batches)


def test_no_device_is_asked_between_the_loader_and_the_model(topology: Topology) -> None:
    # Tensors of the meta device have no content: whoever reads one fails.
    blind: Any = replace(topology, device=torch.device("meta"))
    distributor = BatchDistributor(blind, BatchSpec.of(EXPERIMENT), Loaded())
    batches = [next(distributor) for _ in range(COUNT)]
    for batch, expected in zip(
        DeviceBatches(blind, batches, 1).reader(), random_batches(EXPERIMENT, COUNT), strict=True
    ):
        assert {name for name in TENSORS if getattr(batch, name).is_meta} == {
            name for name, wire in TENSORS.items() if not wire.on_host
        }
        assert (batch.max_seqlen, batch.num_slices, batch.num_segments, batch.is_weighted) == (
            expected.max_seqlen,
            expected.num_slices,
            len(expected.sample_ids),
            False,
        )
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch.cu_seqlens.diff().max().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch.tokens.cpu()
