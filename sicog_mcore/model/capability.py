"""Capabilities of this machine, and the path that each feature takes because of them, with the reason.

In: installed packages, the CUDA device   Out: Capabilities   Next: layers.py, attention.py; tools/doctor.py prints it
A package counts as present only where it can be used: Transformer Engine and other GPU packages are never imported on a
machine without CUDA, where importing them fails or even breaks megatron.core.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch

from sicog_mcore.errors import ConfigError, ConfigProblem

AttentionBackend = Literal["te", "flash", "varlen", "sdpa"]
LayerKind = Literal["te", "local"]
ATTENTION_ORDER: tuple[AttentionBackend, ...] = ("te", "flash", "varlen", "sdpa")
MIN_COMPUTE_CAPABILITY = (8, 0)  # flash kernels start at Ampere
# Below Hopper, cuDNN has no kernel for packed sequences. Without flash-attn, Transformer Engine then unpacks them and
# builds all scores in memory, without a word.
TE_PACKED_COMPUTE_CAPABILITY = (9, 0)
OLDER_ATTENTION_ORDER: tuple[AttentionBackend, ...] = ("flash", "varlen", "te", "sdpa")
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class CapabilityItem:
    """One package or device: usable here or not, its version, and why not (or which device)."""

    present: bool
    version: str
    note: str


@dataclass(frozen=True)
class LayerChoice:
    """The kind of transformer layers that is built, and why."""

    name: LayerKind
    why: str


@dataclass(frozen=True)
class AttentionChoice:
    """The back end that packed attention uses, and why."""

    name: AttentionBackend
    why: str


@dataclass(frozen=True)
class Capabilities:
    """All packages and devices that matter here. ``compute_capability`` is (0, 0) without a CUDA device."""

    torch: CapabilityItem
    cuda: CapabilityItem
    nccl: CapabilityItem
    transformer_engine: CapabilityItem
    apex: CapabilityItem
    flash_attn: CapabilityItem
    varlen: CapabilityItem
    triton: CapabilityItem
    dali: CapabilityItem
    compute_capability: tuple[int, int]

    @property
    def layers(self) -> LayerChoice:
        """Transformer Engine's layers (fused norm and linear) where they run, Megatron's local ones elsewhere."""
        if self.transformer_engine.present:
            return LayerChoice("te", f"Transformer Engine {self.transformer_engine.version} on a CUDA device")
        return LayerChoice("local", f"Transformer Engine: {self.transformer_engine.note}")

    def attention(self, requested: str, head_dim: int, precision: Literal["bf16", "fp32"]) -> AttentionChoice:
        """Chooses the back end of packed attention.

        Args:
            requested: "auto" for the first of te, flash, varlen, sdpa that runs here (below compute capability 9.0: flash,
                varlen, te, sdpa), or one of them.
            head_dim: width of an attention head.
            precision: dtype of queries, keys and values.

        Raises:
            ConfigError: the requested back end cannot run here.
        """
        if requested == "auto":
            # One order for all GPUs would be wrong: below Hopper, Transformer Engine runs, but may build all scores.
            is_older = self.cuda.present and self.compute_capability < TE_PACKED_COMPUTE_CAPABILITY
            order = OLDER_ATTENTION_ORDER if is_older else ATTENTION_ORDER
            obstacles = {name: self._obstacle(name, head_dim, precision) for name in order}
            first = next(name for name, obstacle in obstacles.items() if not obstacle)
            skipped = order[: order.index(first)]
            preferred = (
                f"preferred on compute capability {_dotted(self.compute_capability)}" if is_older else "preferred"
            )
            return AttentionChoice(first, _grouped({name: obstacles[name] for name in skipped}) or preferred)
        for name in ATTENTION_ORDER:  # a loop instead of a lookup: mypy then knows that ``name`` is one of the four
            if name == requested:
                obstacle = self._obstacle(name, head_dim, precision)
                if not obstacle:
                    return AttentionChoice(name, "requested")
                break
        else:
            obstacle = f"expected auto or one of {', '.join(ATTENTION_ORDER)}"
        raise ConfigError(
            [ConfigProblem("train.attention", requested, obstacle, "use auto, or sdpa, which runs anywhere")]
        )

    def _obstacle(self, backend: AttentionBackend, head_dim: int, precision: str) -> str:
        """Returns why a back end cannot run here; empty if it can."""
        if backend == "sdpa":
            return ""
        package = {"te": self.transformer_engine, "flash": self.flash_attn, "varlen": self.varlen}[backend]
        # In the order in which a user can do something about them: the first that fails is said.
        have, need = _dotted(self.compute_capability), _dotted(MIN_COMPUTE_CAPABILITY)
        checks = (
            (self.cuda.present, f"no CUDA device ({self.cuda.note})"),
            (package.present, package.note),
            (self.compute_capability >= MIN_COMPUTE_CAPABILITY, f"compute capability {have}, needs {need}"),
            (
                backend != "te" or self.flash_attn.present or self.compute_capability >= TE_PACKED_COMPUTE_CAPABILITY,
                f"compute capability {have} has no fused kernel of its own for packed sequences, and flash-attn is missing "
                f"({self.flash_attn.note}): all scores of a row would be built in memory",
            ),
            (precision == "bf16", f"computes in bf16, not in {precision}"),
            (
                head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM,
                f"head dimension {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}",
            ),
        )
        return next((reason for holds, reason in checks if not holds), "")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _grouped(reasons: Mapping[AttentionBackend, str]) -> str:
    """Joins names that have the same reason: "te, flash: no CUDA device"."""
    names = {reason: [name for name in reasons if reasons[name] == reason] for reason in reasons.values()}
    return "; ".join(f"{', '.join(names[reason])}: {reason}" for reason in names)


def _version(*distributions: str) -> str:
    """Returns the version of the first distribution that is installed; empty if none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _gpu_package(module: str, *distributions: str, verify: bool = False) -> CapabilityItem:
    """Looks for a package that only helps with CUDA. ``verify`` imports it there: extensions may not fit this torch."""
    # Looked for, not imported: without a CUDA device, importing a GPU package may fail, or break megatron.core.
    version = _version(*distributions)
    if not _is_installed(module):
        return CapabilityItem(False, "", "not installed")
    if not torch.cuda.is_available():
        return CapabilityItem(False, version, "installed, but not used without a CUDA device")
    if verify:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            return CapabilityItem(False, version, f"installed, but its import fails: {error}")
    return CapabilityItem(True, version, "")


def _cuda() -> CapabilityItem:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return CapabilityItem(
            True, str(torch.version.cuda), f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
        )
    if torch.version.cuda is None:
        return CapabilityItem(False, "", "torch is a CPU build")
    return CapabilityItem(False, str(torch.version.cuda), "torch is a CUDA build, but sees no device")


def _nccl() -> CapabilityItem:
    if not torch.cuda.is_available():
        return CapabilityItem(False, "", "no CUDA device; gloo is used")
    return CapabilityItem(True, ".".join(map(str, torch.cuda.nccl.version())), "")


@functools.cache
def probe() -> Capabilities:
    """Looks at this machine once per process."""
    # Cached: verified packages are imported here, which takes seconds, and the answer cannot change in a process.
    has_varlen = _is_installed("torch.nn.attention.varlen")
    return Capabilities(
        torch=CapabilityItem(True, str(torch.__version__), ""),
        cuda=_cuda(),
        nccl=_nccl(),
        transformer_engine=_gpu_package(
            "transformer_engine", "transformer-engine", "transformer_engine_torch", verify=True
        ),
        apex=_gpu_package("fused_weight_gradient_mlp_cuda", "apex", verify=True),
        flash_attn=_gpu_package("flash_attn", "flash-attn", verify=True),
        varlen=CapabilityItem(
            has_varlen, str(torch.__version__), "" if has_varlen else "this torch has no varlen attention"
        ),
        triton=_gpu_package("triton", "triton"),
        dali=_gpu_package("nvidia.dali", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        compute_capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0),
    )
