"""Every rank of a replica gets the batch that its loader made, or the error that it met."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.errors import DataError, PeerError
from sicog_mcore.parallel.ahead import DeviceBatches
from sicog_mcore.parallel.distribute import BatchDistributor, BatchSpec
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from tests.batches import random_batches
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks

EXPERIMENT = tiny_experiment(Path("unused"), data={"token_budget": 512})
COUNT = 5  # the third has no image, the fifth no sample
LAYOUTS = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}}
MESSAGE = "3 of 10 samples are bad"
ERROR_S = 20.0  # gloo itself would wait for minutes


class FailingLoader:
    """COUNT batches, one step each, then an error."""

    ends_step = True

    def __init__(self, experiment: Experiment) -> None:
        self._batches = iter(random_batches(experiment, COUNT))

    def __next__(self) -> PackedBatch:
        try:
            return next(self._batches)
        except StopIteration:
            raise DataError(MESSAGE) from None


def plain(batch: PackedBatch) -> dict[str, Any]:
    """A batch as arrays and numbers, which can leave the process."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: v.numpy().copy() if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def count_broadcasts() -> list[int]:
    """Counts this rank's calls of ``dist.broadcast`` from now on, in a list of one number."""
    count, broadcast = [0], dist.broadcast

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return broadcast(*args, **kwargs)

    dist.broadcast = counted
    return count


def on_device(topology: Topology, batches: list[PackedBatch]) -> list[PackedBatch]:
    return list(DeviceBatches(topology, batches, 1).reader())


def _receive(
    rank: Rank, experiments: list[Experiment]
) -> list[tuple[list[dict[str, Any]], list[int], str, str, float]]:
    """For each layout: the batches and the broadcasts of each, type and text of the error, the seconds until it came."""
    results = []
    count = count_broadcasts()
    for i, experiment in enumerate(experiments):
        topology = Rank(rank.rank, rank.world_size, f"{rank.init_method}-{i}").start(experiment.parallel)
        loader = FailingLoader(experiment) if topology.loads_data else None
        batches = BatchDistributor(topology, BatchSpec.of(experiment), loader)
        received, counts = [], []
        for _ in range(COUNT):
            count[0] = 0
            (batch,) = on_device(topology, [next(batches)])
            received.append(plain(batch))
            counts.append(count[0])
        start = time.monotonic()
        try:
            next(batches)
            raise AssertionError("the loader's error did not arrive")
        except DataError as error:
            results.append((received, counts, type(error).__name__, str(error), time.monotonic() - start))
        stop_topology()
    return results


@pytest.mark.slow
def test_every_rank_gets_equal_batches_and_the_loaders_error() -> None:
    experiments = [tiny_experiment(Path("unused"), data={"token_budget": 512}, parallel=p) for p in LAYOUTS.values()]
    expected = [plain(batch) for batch in random_batches(EXPERIMENT, COUNT)]
    assert len(expected[2]["grids"]) == 0 == len(expected[4]["sample_ids"])  # both odd kinds are among them
    for rank, results in enumerate(run_ranks(_receive, 2, experiments)):
        for layout, (received, counts, error, message, seconds) in zip(LAYOUTS, results, strict=True):
            assert len(received) == COUNT
            for ours, theirs in zip(received, expected, strict=True):
                assert_equal(ours, theirs, loads=rank == 0, has_pixels=rank == 0 or layout == "TP2")
            # Everything but pixels, then pixels where there are some and another rank needs them; ten broadcasts before.
            assert counts == ([2, 2, 1, 2, 1] if layout == "TP2" else [1] * COUNT)
            assert error == ("DataError" if rank == 0 else "PeerError") and seconds < ERROR_S
            assert (MESSAGE in message) == (rank == 0)


SLOW = {"parallel": {"tensor": 2, "timeout_s": 2}, "data": {"token_budget": 512}}


class SlowLoader(FailingLoader):
    """Its batches take longer than any collective may."""

    def __next__(self) -> PackedBatch:
        time.sleep(7)
        return super().__next__()


def _receive_late(rank: Rank, experiment: Experiment) -> dict[str, Any]:
    topology = rank.start(experiment.parallel)
    loader = SlowLoader(experiment) if topology.loads_data else None
    return plain(on_device(topology, [next(BatchDistributor(topology, BatchSpec.of(experiment), loader))])[0])


@pytest.mark.slow
def test_a_slow_loader_is_no_collective_that_hangs() -> None:
    expected = plain(random_batches(EXPERIMENT, COUNT)[0])
    for rank, received in enumerate(run_ranks(_receive_late, 2, tiny_experiment(Path("unused"), **SLOW))):
        assert_equal(received, expected, loads=rank == 0, has_pixels=True)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], loads: bool, has_pixels: bool) -> None:
    for name, expected in theirs.items():
        if name == "sample_ids":
            expected = expected if loads else ()
        if name == "patches" and not has_pixels:
            expected = expected[:0]
        if isinstance(expected, int | tuple):
            assert ours[name] == expected, name
        else:
            assert (ours[name].dtype, ours[name].shape) == (expected.dtype, expected.shape), name
            assert (ours[name] == expected).all(), name


def test_one_rank_gets_the_loaders_batches_and_its_error() -> None:
    topology = start_topology(EXPERIMENT.parallel, seed=0)
    try:
        batches = BatchDistributor(topology, BatchSpec.of(EXPERIMENT), FailingLoader(EXPERIMENT))
        for expected in random_batches(EXPERIMENT, COUNT):
            assert_equal(plain(next(batches)), plain(expected), loads=True, has_pixels=True)
        with pytest.raises(DataError, match=MESSAGE) as error:
            next(batches)
        assert not isinstance(error.value, PeerError)
    finally:
        stop_topology()
