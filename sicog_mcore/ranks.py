"""Reads this process's rank from the launcher's environment, and judges it before anything heavy is imported.

In: RANK, WORLD_SIZE and their like   Out: Place, or every problem in one message   Next: launcher.py
Standard library only. A process that belongs to several but was not told which it is would train alone, beside its like.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from sicog_mcore.errors import ConfigError, ConfigProblem

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LARGEST_PORT = 65_535
# Names that other launchers give to the number of processes they start; the first that is set counts. A step of SLURM may
# have fewer tasks than its job.
TASK_COUNTS = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_SIZE",),
    ("MV2_COMM_WORLD_SIZE",),
    ("PMI_SIZE",),
)
TASK_NUMBERS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK")
USE_TORCHRUN = "start the ranks with torchrun, e.g. torchrun --nproc-per-node 8 launch/..."
ONE_IS_MEANT = "or set RANK=0 WORLD_SIZE=1 if one process is meant"
MAX_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
ALLOCATOR, ALLOCATOR_BEFORE = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # the second is the older name
SEGMENTS = "expandable_segments:True"


@dataclass(frozen=True)
class Place:
    """The place of this process among those that were started together.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
        ranks_per_node: how many on this machine; 0 if the launcher did not say.
        by_torchrun: whether torchrun started it, so that it must not outlive its parent.
    """

    rank: int = 0
    world_size: int = 1
    ranks_per_node: int = 0
    by_torchrun: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_place(environment: Mapping[str, str], has_gpus: bool = False) -> Place:
    """Reads the place of this process.

    Args:
        environment: of the process.
        has_gpus: whether this machine has some, so that each rank must know which one is its own.

    Raises:
        ConfigError: every variable that is missing, empty, no number, or contradicts another.
    """
    problems: list[ConfigProblem] = []
    numbers = {name: _number(name, environment[name], problems) for name in NUMBERS if name in environment}
    # Numbers that cannot be read contradict everything; one message about them is enough.
    if not problems:
        problems += _lonely(environment, numbers) or _contradictions(numbers)
    if not problems and numbers.get("WORLD_SIZE", 1) > 1:
        problems += _meeting_point(environment)
        if has_gpus and "LOCAL_RANK" not in numbers:
            fix = "export LOCAL_RANK, the number of this rank on its machine (SLURM calls it SLURM_LOCALID)"
            problems.append(
                ConfigProblem("LOCAL_RANK", None, "is missing, so which GPU is this rank's cannot be known", fix)
            )
    if problems:
        raise ConfigError(problems)
    return Place(
        rank=numbers.get("RANK", 0),
        world_size=numbers.get("WORLD_SIZE", 1),
        ranks_per_node=numbers.get("LOCAL_WORLD_SIZE", 0),
        by_torchrun="TORCHELASTIC_RUN_ID" in environment,
    )


def is_first_task(environment: Mapping[str, str]) -> bool:
    """Whether this is the process that speaks, where RANK cannot be trusted."""
    return all(environment.get(name, "0") == "0" for name in (*TASK_NUMBERS, "RANK") if environment.get(name, ""))


def machine_has_gpus(environment: Mapping[str, str]) -> bool:
    """Whether there are NVIDIA devices that this process may use, asked without CUDA."""
    return Path("/dev/nvidiactl").exists() and environment.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")


def prepare_environment(environment: MutableMapping[str, str], tensor: int) -> list[str]:
    """Sets what Megatron and torch read when CUDA starts, where the user has not; returns warnings, one a line.

    Args:
        environment: of this process; changed in place.
        tensor: ranks that share a layer. Their communication is started before the product that it overlaps with, and
            only a single connection keeps that order on the device.
    """
    notes = []
    if tensor > 1 and environment.setdefault(MAX_CONNECTIONS, "1") != "1":
        found = f"{MAX_CONNECTIONS}={environment[MAX_CONNECTIONS]}"
        notes.append(f"warning: {found}: with parallel.tensor={tensor}, Megatron expects 1; unset it to get that")
    if not environment.get(ALLOCATOR_BEFORE):
        environment.setdefault(ALLOCATOR, SEGMENTS)
    return notes


def _number(name: str, text: str, problems: list[ConfigProblem]) -> int:
    least = 1 if name.endswith("SIZE") else 0
    if text.isascii() and text.isdecimal() and int(text) >= least:
        return int(text)
    problem = "is empty" if not text.strip() else f"is not a whole number from {least} on"
    fix = f"unset it, or {USE_TORCHRUN}, which sets it; {ONE_IS_MEANT}"
    problems.append(ConfigProblem(name, text, problem, fix))
    return least


def _lonely(environment: Mapping[str, str], numbers: Mapping[str, int]) -> list[ConfigProblem]:
    """Finds the problems of a process that is one of several, and was not told which."""
    if "RANK" in numbers:
        if "WORLD_SIZE" in numbers:
            return []
        fix = f"set WORLD_SIZE too, or {USE_TORCHRUN}"
        return [ConfigProblem("WORLD_SIZE", None, f"is missing, but RANK={numbers['RANK']}", fix)]
    fix = f"{USE_TORCHRUN}, {ONE_IS_MEANT}"
    # Without RANK, any sign that this process is one of several must end it: each would train alone, into the same
    # folder.
    if (size := numbers.get("WORLD_SIZE", 1)) > 1:
        return [
            ConfigProblem(
                "RANK", None, f"is missing, but WORLD_SIZE={size}, so which of them this is cannot be known", fix
            )
        ]
    for name, least in (("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2)):
        if numbers.get(name, 0) >= least:
            problem = f"is missing, but {name}={numbers[name]}: this is one of several processes"
            return [ConfigProblem("RANK", None, problem, fix)]
    for names in TASK_COUNTS:
        name = next((name for name in names if environment.get(name)), "")
        count = environment.get(name, "")
        if count.isdecimal() and int(count) > 1:
            problem = f"is missing, but {name}={count}: {count} processes would each train alone into the same folder"
            return [ConfigProblem("RANK", None, problem, fix)]
    return []


def _contradictions(numbers: Mapping[str, int]) -> list[ConfigProblem]:
    found = []
    for small, large in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if small in numbers and large in numbers and numbers[small] >= numbers[large]:
            fix = f"expected 0 to {numbers[large] - 1}; {USE_TORCHRUN}, which numbers them"
            found.append(ConfigProblem(small, numbers[small], f"is not below {large}={numbers[large]}", fix))
    if (here := numbers.get("LOCAL_WORLD_SIZE", 1)) > (all_ranks := numbers.get("WORLD_SIZE", here)):
        problem = f"is more than WORLD_SIZE={all_ranks}"
        found.append(ConfigProblem("LOCAL_WORLD_SIZE", here, problem, f"{USE_TORCHRUN}, which counts them"))
    return found


def _meeting_point(environment: Mapping[str, str]) -> list[ConfigProblem]:
    """Finds the problems of the address at which the ranks meet."""
    found = []
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not (host or "").strip():
        fix = f"set it to the machine of rank 0, or {USE_TORCHRUN}"
        found.append(ConfigProblem("MASTER_ADDR", host, "is empty" if host is not None else "is missing", fix))
    if not (port or "").strip():
        fix = f"set it to a free port of that machine, the same for all ranks, or {USE_TORCHRUN}"
        found.append(ConfigProblem("MASTER_PORT", port, "is empty" if port is not None else "is missing", fix))
    elif not (port and port.isascii() and port.isdecimal() and 0 < int(port) <= LARGEST_PORT):
        fix = f"use a free port of the machine of rank 0, 1 to {LARGEST_PORT}"
        found.append(ConfigProblem("MASTER_PORT", port, "is no port", fix))
    return found


def silence_megatron(*others: str) -> None:
    """Hides Megatron's warnings: of every package that is missing (tools/doctor.py explains them), and of its own plans.

    To be called before Megatron is imported, since it warns while it is.

    Args:
        others: names of further loggers of which only errors are shown.
    """
    warnings.simplefilter("ignore")
    for name in ("megatron", *others):
        logging.getLogger(name).setLevel(logging.ERROR)
