"""Who stands where: first and last stages, who loads, and which ranks share a replica."""

from __future__ import annotations

import datetime
import os
import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sicog_mcore.config import ParallelConfig
from sicog_mcore.errors import ConfigError, MachineError
from sicog_mcore.parallel import topology as topology_module
from sicog_mcore.parallel.topology import PipelineChunk, start_topology, stop_topology
from tests.dist import Rank, run_ranks

LAYOUTS = {
    "TP2": ParallelConfig(tensor=2),
    "PP2 interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "DP2": ParallelConfig(),
}


def test_a_single_process_is_a_world_of_its_own_and_can_start_again() -> None:
    for seed in (1, 1):
        topology = start_topology(ParallelConfig(), seed)
        assert (topology.rank, topology.world_size, topology.data_size) == (0, 1, 1)
        assert topology.is_main and topology.loads_data and topology.is_first_stage
        assert (
            topology.stages == (PipelineChunk(0, 1, is_first=True, is_last=True),)
            and topology.stages[0].vp_stage is None
        )
        assert topology.gather_objects("x") == ["x"] and topology.broadcast_object({"a": 1}) == {"a": 1}
        drawn = torch.rand(2).tolist()
        stop_topology()
    stop_topology()  # nothing to leave
    torch.manual_seed(1)
    assert drawn == torch.rand(2).tolist()


def _describe(rank: Rank) -> list[dict[str, Any]]:
    places = []
    for i, parallel in enumerate(LAYOUTS.values()):
        topology = Rank(rank.rank, rank.world_size, f"{rank.init_method}-{i}").start(parallel)
        number = torch.tensor([float(rank.rank + 1)])
        places.append(
            {
                "ranks": (topology.tensor_rank, topology.pipeline_rank, topology.data_rank),
                "loads": topology.loads_data,
                "stages": [(s.vp_stage, s.is_first, s.is_last) for s in topology.stages],
                "sizes": (topology.groups.mp.size(), topology.data_size, topology.tower_groups.tp.size()),
                "sum, max": (
                    topology.sum_over_world(number.clone()).item(),
                    topology.max_over_world(number.clone()).item(),
                ),
                "objects": (topology.broadcast_object(rank.rank), topology.gather_objects(rank.rank)),
            }
        )
        stop_topology()
    return places


@pytest.mark.slow
def test_places_of_two_ranks() -> None:
    first, second = run_ranks(_describe, 2)
    whole = [(None, True, True)]
    columns = ("ranks", "loads", "stages", "sizes")
    expected = {
        "TP2": [((0, 0, 0), True, whole, (2, 1, 1)), ((1, 0, 0), False, whole, (2, 1, 1))],
        "PP2 interleaved": [
            ((0, 0, 0), True, [(0, True, False), (1, False, False)], (2, 1, 1)),
            ((0, 1, 0), False, [(0, False, False), (1, False, True)], (2, 1, 1)),
        ],
        "DP2": [((0, 0, 0), True, whole, (1, 2, 1)), ((0, 0, 1), True, whole, (1, 2, 1))],
    }
    for name, *places in zip(LAYOUTS, first, second, strict=True):
        assert [tuple(place[column] for column in columns) for place in places] == expected[name]
        assert all(place["sum, max"] == (3, 2) and place["objects"] == (0, [0, 1]) for place in places)


TIMEOUT_S = 2


def _wait_in_vain(rank: Rank, config: ParallelConfig, in_world: bool) -> tuple[set[float], str, float]:
    """The timeouts of all groups in seconds; then the message of a collective that rank 1 never joins, and its wait."""
    topology = rank.start(config)
    timeouts = {
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group in dist.distributed_c10d._world.pg_map
    }
    said, began = "", time.monotonic()
    if rank.rank == 0:
        try:
            with topology.watch.explaining():
                dist.all_reduce(torch.ones(1), group=None if in_world else topology.groups.mp)
        except MachineError as error:
            said = str(error)
    else:
        time.sleep(4 * TIMEOUT_S)
    return timeouts, said, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "in_world"), [({"tensor": 2}, False), ({"pipeline": 2, "virtual_pipeline": 2}, True)]
)
def test_the_timeout_reaches_every_group(layout: dict[str, int], in_world: bool) -> None:
    config = ParallelConfig(**layout, timeout_s=TIMEOUT_S)
    (timeouts, said, seconds), other = run_ranks(_wait_in_vain, 2, config, in_world)
    assert timeouts == other[0] == {TIMEOUT_S}
    assert said.startswith("rank 0 lost another rank in start: all ranks live") and "gloo" in said
    assert TIMEOUT_S <= seconds < TIMEOUT_S + 20  # less than what ranks may start apart


def test_a_rank_without_a_number_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="RANK = None: is missing, but WORLD_SIZE=2"):
        start_topology(ParallelConfig(), seed=0)
    assert not dist.is_initialized()


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "PMI_SIZE"])
def test_one_process_can_be_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (("RANK", "0"), ("WORLD_SIZE", "1"), (name, "4")):
        monkeypatch.setenv(variable, value)
    assert "MASTER_ADDR" not in os.environ  # nor is one needed
    assert start_topology(ParallelConfig(), seed=0).world_size == 1
    stop_topology()


def _first_of_two(_: Rank, port: int) -> str:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place)
    topology_module.STARTS_APART = datetime.timedelta(seconds=0)
    try:
        start_topology(ParallelConfig(timeout_s=TIMEOUT_S), seed=0)
    except MachineError as error:
        return str(error)
    return "started"


@pytest.mark.slow
def test_a_rank_that_nobody_joins_is_one_message() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (text,) = run_ranks(_first_of_two, 1, port)
    assert "did not find each other" in text or text.startswith("rank 1 of 2 did not start within 2 s"), text
    assert "the same command resumes" in text
