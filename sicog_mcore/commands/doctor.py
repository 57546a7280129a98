"""Says what this machine can run: packages, the path each feature takes and why, and the facts of the machine.

In: sicog_mcore.model.capability, the operating system   Out: tables, or JSON with --json
Next: check_conformance.py, gpu_report.py. Exit code 0; 1 if a run cannot start here. A warning leaves the exit code alone.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.errors import EXIT_CRASH, EXIT_OK, ConfigError, printable
from sicog_mcore.ranks import ALLOCATOR, ALLOCATOR_BEFORE, MAX_CONNECTIONS, SEGMENTS, read_place

if TYPE_CHECKING:
    from sicog_mcore.model.capability import Capabilities  # imports torch

TESTED_PYTHON = ("3.11", "3.12")
TESTED: Mapping[str, tuple[str, ...]] = {"torch": ("2.11", "2.12", "2.13"), "megatron-core": ("0.16", "0.19")}
ESSENTIAL = ("torch", "megatron.core", "tokenizers", "PIL", "xxhash", "jsonargparse", "safetensors")
SMALL_SHM_GIB = 1.0
USUAL_HEAD_DIM = 128  # of the decoders from 1.5 B parameters on
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
GIB = 2**30


@dataclass(frozen=True)
class PackageState:
    """A package or a device is usable here or not; it has a version, and maybe a remark."""

    name: str
    present: bool
    version: str
    note: str


@dataclass(frozen=True)
class FeaturePath:
    """A feature takes this path here, for this reason."""

    name: str
    path: str
    why: str


@dataclass
class MachineReport:
    """All that is printed stands here. A problem keeps a run from starting; a warning does not."""

    machine: dict[str, str]
    packages: list[PackageState] = field(default_factory=list)
    features: list[FeaturePath] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def gib(number: float) -> str:
    """Returns a number of bytes as text in GiB."""
    return f"{number / GIB:.1f} GiB"


def machine_facts() -> dict[str, str]:
    """Returns what the operating system says of this machine, by name."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    shm = Path("/dev/shm")
    return {
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "memory": f"{gib(memory.available)} free of {gib(memory.total)}",
        "disk": f"{gib(disk.free)} free of {gib(disk.total)} at {Path.cwd()}",
        "/dev/shm": f"{gib(shutil.disk_usage(shm).free)} free" if shm.exists() else "absent",
    }


def import_problems() -> list[str]:
    """Tries the packages that a run imports first and cannot do without."""
    problems = []
    for module in ESSENTIAL:
        try:
            with warnings.catch_warnings(
                action="ignore", category=UserWarning
            ):  # of packages that the tables show missing
                importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            problems.append(f"{module} cannot be imported ({error}); install the project: pip install -e .")
    return problems


def version_warnings(python: str, versions: Mapping[str, str]) -> list[str]:
    """Versions that nobody tried together with this project.

    Args:
        python: "major.minor".
        versions: of the installed distributions, by name.
    """
    untested = []
    for name, found, tested in (
        ("Python", python, TESTED_PYTHON),
        *((name, versions[name], TESTED[name]) for name in TESTED if name in versions),
    ):
        if not any(found == version or found.startswith(f"{version}.") for version in tested):
            untested.append(f"{name} {found} is untested; tested are {', '.join(tested)} (see constraints.txt)")
    return untested


def machine_warnings() -> list[str]:
    """Facts that make a run fail late, with a message that names another cause."""
    shm = Path("/dev/shm")
    if shm.exists() and shutil.disk_usage(shm).total < SMALL_SHM_GIB * GIB:
        return [
            f"/dev/shm holds {gib(shutil.disk_usage(shm).total)}: loader workers may die with 'Bus error';"
            " enlarge it (docker run --shm-size=8g) or set data.workers=0"
        ]
    return []


def environment_facts(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Collects the environment variables that a run depends on, and warnings about them.

    Args:
        environment: of the process that asks; a run from the same shell has it too.
    """
    connections = environment.get(MAX_CONNECTIONS)
    allocator = next((name for name in (ALLOCATOR, ALLOCATOR_BEFORE) if environment.get(name)), "")
    facts = {
        MAX_CONNECTIONS: connections or "unset; launchers set 1 where parallel.tensor is more than 1",
        "allocator": f"{allocator}={environment[allocator]}"
        if allocator
        else f"unset; launchers set {ALLOCATOR}={SEGMENTS}",
    }
    told = [f"{MAX_CONNECTIONS}={connections}: with parallel.tensor more than 1, Megatron expects 1; unset it"]
    told = told if connections not in (None, "", "1") else []
    try:
        read_place(environment)
    except ConfigError as error:
        told += [f"a run here would be refused: {printable(problem)}" for problem in error.problems]
    if "SLURM_JOB_ID" in environment:
        told.append(
            "this is a SLURM job: torchrun dies of USR1 and USR2, which sbatch --signal may send, and its ranks with it, "
            f"without a checkpoint, unless it is told {SIGNALS}"
        )
    return facts, told


def installed_versions() -> dict[str, str]:
    """Returns the versions of the distributions that TESTED names and that are installed here."""
    versions = {}
    for name in TESTED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def packages_and_features() -> tuple[list[PackageState], list[FeaturePath]]:
    """Reads the model's own capability report, which the training code follows too."""
    from sicog_mcore.model.capability import probe  # imports torch

    can = probe()
    named = {
        "torch": can.torch,
        "CUDA": can.cuda,
        "NCCL": can.nccl,
        "Transformer Engine": can.transformer_engine,
        "apex": can.apex,
        "flash-attn": can.flash_attn,
        "torch varlen": can.varlen,
        "Triton": can.triton,
        "DALI": can.dali,
    }
    packages = [PackageState(name, item.present, item.version, item.note) for name, item in named.items()]
    megatron = metadata.version("megatron-core")
    packages.insert(1, PackageState("Megatron-Core", True, megatron, ""))
    bf16, fp32 = (can.attention("auto", USUAL_HEAD_DIM, precision) for precision in ("bf16", "fp32"))
    te, apex, cuda = can.transformer_engine.present, can.apex.present, can.cuda.present
    device = "a CUDA device" if cuda else "no CUDA device"
    features = [
        FeaturePath("transformer layers", can.layers.name, can.layers.why),
        FeaturePath("attention, bf16", bf16.name, bf16.why),
        FeaturePath("attention, fp32", fp32.name, fp32.why),
        FeaturePath("attention te, by name", *named_te(can)),
        FeaturePath("rotary positions", "te" if te else "torch", can.layers.why),
        FeaturePath("SwiGLU", "fused" if cuda else "torch", device),
        FeaturePath(
            "AdamW", "te" if te else "apex" if apex else "torch", "Megatron takes te, apex, torch, in this order"
        ),
        FeaturePath("process groups", "nccl" if cuda else "gloo", device),
        FeaturePath("image decoding", "Pillow", "the only decoder so far; DALI is not used"),
        FeaturePath("our own kernels", "torch", "references; a Triton path enters with a measured gain"),
    ]
    return packages, features


def named_te(can: Capabilities) -> tuple[str, str]:
    """Tells the path of ``train.attention=te`` here: Transformer Engine has one nobody wants, and takes it in silence."""
    try:
        choice = can.attention("te", USUAL_HEAD_DIM, "bf16")
    except ConfigError as refused:
        return "refused", refused.problems[0].problem
    return choice.name, "NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=1 prints the kernel it takes"


def examine() -> MachineReport:
    """Looks at packages, features, machine and environment, and returns what it found."""
    python = ".".join(platform.python_version_tuple()[:2])
    report = MachineReport(machine_facts(), problems=import_problems())
    facts, told = environment_facts(psutil.Process().environ())
    report.machine |= facts
    report.warnings = version_warnings(python, installed_versions()) + machine_warnings() + told
    if not any(problem.startswith(("torch ", "megatron.core ")) for problem in report.problems):
        report.packages, report.features = packages_and_features()
    return report


def titled_table(title: str, *headings: str) -> Table:
    """Returns an empty table without lines."""
    table = Table(*headings, title=title, title_justify="left", title_style="bold", header_style="dim", box=None)
    table.columns[0].no_wrap = True
    return table


def show(report: MachineReport, screen: Console) -> None:
    """Prints the tables, then warnings and problems, then the verdict."""
    machine = titled_table("Machine", "", "")
    machine.show_header = False
    for name, fact in report.machine.items():
        machine.add_row(name, Text(printable(fact)))
    packages = titled_table("Packages and devices", "", "present", "version", "remark")
    for item in report.packages:
        mark = Text("yes", style="green") if item.present else Text("no", style="yellow")
        packages.add_row(item.name, mark, item.version, Text(item.note))
    features = titled_table("Which path each feature takes", "", "path", "why")
    for choice in report.features:
        features.add_row(choice.name, Text(choice.path, style="cyan"), Text(choice.why))
    for table in (machine, packages, features):
        if table.row_count:
            screen.print(table, "")
    for style, word, lines in (("yellow", "warning", report.warnings), ("red", "problem", report.problems)):
        for line in lines:
            screen.print(Text(f"{word}: ", style=style) + Text(printable(line)))
    verdict = ("green", "Ready: a run can start here.") if not report.problems else ("red", "A run cannot start here.")
    screen.print(Text(verdict[1], style=f"bold {verdict[0]}"))


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options that ``doctor`` takes.

    Attributes:
        json: print one JSON object instead of tables.
    """

    json: bool = False


def main(options: DoctorOptions, call: VerbCall) -> int:
    """Prints the report; returns the exit code."""
    report = examine()
    if options.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        show(report, Console(highlight=False))
    return EXIT_CRASH if report.problems else EXIT_OK


VERB = Verb((__doc__ or "").splitlines()[0], DoctorOptions, main)
