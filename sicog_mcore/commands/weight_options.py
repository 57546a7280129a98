"""The verb convert takes its options for weights from here: one dataclass for each of its words.

In: a command line   Out: options   Next: weight_steps.py (what is done)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sicog_mcore.commands.parser import to_words
from sicog_mcore.flags import flag

ExportedPart = Literal["vlm", "decoder", "tower"]
ExportedDtype = Literal["keep", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ImportFlags:
    """Options that ``convert import`` takes beside the fields of an experiment.

    Attributes:
        out: the new checkpoint, for --init.checkpoint.
        dry_run: print names and shapes on both sides, read no tensor.
        verify: compare with transformers on a seeded batch.
        tensor: tensor-parallel ranks, under torchrun.
        pipeline: pipeline stages, under torchrun.
    """

    out: Path | None = flag(None, metavar="FOLDER")
    dry_run: bool = False
    verify: bool = False
    tensor: int = 1
    pipeline: int = 1


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options that ``convert import`` takes.

    Attributes:
        flags: its own.
        experiment: words for the fields of an experiment, as training takes them: --preset, --init.tower ...
    """

    flags: ImportFlags = ImportFlags()
    experiment: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """Returns the words that stand for these options."""
        return [*self.experiment, *to_words(self.flags)]


@dataclass(frozen=True, kw_only=True)
class WeightExportOptions:
    """Options that ``convert export`` takes.

    Attributes:
        checkpoint: a run, or one checkpoint.
        out: must not exist.
        what: the whole model, or a part of it.
        dtype: of the weights that are written.
        tokenizer: where the run's own path no longer holds.
        fill_from: tower: take the layers we do not build from here.
        shard_gb: largest shard (GiB), held in memory.
        tensor: tensor-parallel ranks, under torchrun.
        pipeline: pipeline stages, under torchrun.
        verify: compare with transformers on a seeded batch.
    """

    checkpoint: Path = flag(metavar="FOLDER")
    out: Path = flag(metavar="FOLDER")
    what: ExportedPart = "vlm"
    dtype: ExportedDtype = "keep"
    tokenizer: str = flag("", metavar="FILE")
    fill_from: Path | None = flag(None, metavar="CLIP")
    shard_gb: float = 4.0
    tensor: int = 1
    pipeline: int = 1
    verify: bool = False


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options that ``convert inspect`` takes.

    Attributes:
        path: a file or folder of weights, or a checkpoint.
    """

    path: Path = flag(is_positional=True)


@dataclass(frozen=True, kw_only=True)
class UnpickleOptions:
    """Options that ``convert unpickle`` takes.

    Attributes:
        path: a file that torch.save wrote.
        out: safetensors file to write; must not exist.
    """

    path: Path = flag(is_positional=True)
    out: Path = flag(metavar="FILE.safetensors")
