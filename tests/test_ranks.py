"""A process that was not told which rank it is says so at once, and what Megatron relies on is in the environment."""

from __future__ import annotations

import pytest

from sicog_mcore.errors import ConfigError
from sicog_mcore.ranks import Place, is_first_task, prepare_environment, read_place

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {"RANK": "1", "WORLD_SIZE": "2", **MEET}

ALONE: dict[str, dict[str, str]] = {
    "nothing": {},
    "a world of one without a rank": {"WORLD_SIZE": "1"},
    "one is meant": {"RANK": "0", "WORLD_SIZE": "1"},
    "one is meant inside a job of four": {"RANK": "0", "WORLD_SIZE": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    "a step of one task in a job of four": {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
    "srun -n 1": {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    "alone on its machine": {"LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    "a count that is no number": {"PMI_SIZE": "many"},
}
REFUSED: dict[str, tuple[dict[str, str], list[str]]] = {
    "empty rank": ({"RANK": "", "WORLD_SIZE": ""}, ["RANK = '': is empty", "WORLD_SIZE = '': is empty"]),
    "blank rank": ({"RANK": " ", "WORLD_SIZE": "2"}, ["RANK = ' ': is empty"]),
    "rank in words": ({"RANK": "one", "WORLD_SIZE": "2", **MEET}, ["RANK = 'one': is not a whole number from 0 on"]),
    "negative rank": ({"RANK": "-1", "WORLD_SIZE": "2", **MEET}, ["RANK = '-1': is not a whole number from 0 on"]),
    "other digits": ({"RANK": "１", "WORLD_SIZE": "2", **MEET}, ["RANK = '１': is not a whole number"]),
    "no ranks": ({"WORLD_SIZE": "0"}, ["WORLD_SIZE = '0': is not a whole number from 1 on"]),
    "fraction": ({**TWO, "LOCAL_RANK": "0.5"}, ["LOCAL_RANK = '0.5': is not a whole number from 0 on"]),
    "empty local size": ({**TWO, "LOCAL_WORLD_SIZE": ""}, ["LOCAL_WORLD_SIZE = '': is empty"]),
    "world without rank": ({"WORLD_SIZE": "2"}, ["RANK = None: is missing, but WORLD_SIZE=2"]),
    "second on its machine without rank": ({"LOCAL_RANK": "1"}, ["RANK = None: is missing, but LOCAL_RANK=1"]),
    "two on its machine without rank": (
        {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "1"},
        ["RANK = None: is missing, but LOCAL_WORLD_SIZE=2"],
    ),
    "rank without world": ({"RANK": "0"}, ["WORLD_SIZE = None: is missing, but RANK=0"]),
    "two tasks of srun": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, ["RANK = None: is missing, but SLURM_NTASKS=2"]),
    "a step of two": ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, ["but SLURM_STEP_NUM_TASKS=2"]),
    "two tasks of mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, ["but OMPI_COMM_WORLD_SIZE=2"]),
    "two tasks of hydra": ({"PMI_SIZE": "2", "WORLD_SIZE": "1"}, ["but PMI_SIZE=2"]),
    "rank beyond the world": ({"RANK": "2", "WORLD_SIZE": "2", **MEET}, ["RANK = 2: is not below WORLD_SIZE=2"]),
    "local beyond the node": (
        {**TWO, "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "2"},
        ["LOCAL_RANK = 4: is not below LOCAL_WORLD_SIZE=2"],
    ),
    "node larger than the world": (
        {**TWO, "LOCAL_WORLD_SIZE": "8"},
        ["LOCAL_WORLD_SIZE = 8: is more than WORLD_SIZE=2"],
    ),
    "nowhere to meet": (
        {"RANK": "0", "WORLD_SIZE": "2"},
        ["MASTER_ADDR = None: is missing", "MASTER_PORT = None: is missing"],
    ),
    "empty meeting point": (
        {**TWO, "MASTER_ADDR": "", "MASTER_PORT": ""},
        ["MASTER_ADDR = '': is empty", "MASTER_PORT"],
    ),
    "no port": ({**TWO, "MASTER_PORT": "http"}, ["MASTER_PORT = 'http': is no port"]),
    "port too large": ({**TWO, "MASTER_PORT": "70000"}, ["MASTER_PORT = '70000': is no port"]),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_single_process_is_rank_0_of_1(name: str) -> None:
    assert read_place(ALONE[name], has_gpus=True) == Place()


def test_torchruns_environment_is_read() -> None:
    environment = {
        **TWO,
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "none",
        "SLURM_NTASKS": "4",
    }
    assert read_place(environment, has_gpus=True) == Place(1, 2, 2, by_torchrun=True)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_place_is_named_with_a_remedy(name: str) -> None:
    environment, expected = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        read_place(environment)
    assert len(caught.value.problems) == len(expected)
    for problem, words in zip(caught.value.problems, expected, strict=True):
        assert words in str(problem) and len(problem.fix) > 10


def test_ranks_with_gpus_must_know_their_own() -> None:
    assert read_place(TWO) == Place(1, 2)
    with pytest.raises(ConfigError, match=r"LOCAL_RANK = None: is missing.*SLURM_LOCALID"):
        read_place(TWO, has_gpus=True)


def test_of_several_lonely_processes_one_speaks() -> None:
    assert is_first_task({}) and is_first_task({"SLURM_PROCID": "0"}) and is_first_task({"RANK": ""})
    assert not is_first_task({"SLURM_PROCID": "1"}) and not is_first_task({"RANK": "3"})


def test_what_megatron_relies_on_is_set_where_the_user_did_not() -> None:
    environment: dict[str, str] = {}
    assert prepare_environment(environment, tensor=2) == []
    assert environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    one_rank: dict[str, str] = {}
    assert prepare_environment(one_rank, tensor=1) == [] and "CUDA_DEVICE_MAX_CONNECTIONS" not in one_rank


def test_what_the_user_set_stays_and_a_harmful_value_is_told() -> None:
    for own in ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}):
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", **own}
        before = dict(environment)
        (note,) = prepare_environment(environment, tensor=2)
        assert environment == before and "CUDA_DEVICE_MAX_CONNECTIONS=32" in note and "expects 1" in note
        assert prepare_environment(environment, tensor=1) == []
