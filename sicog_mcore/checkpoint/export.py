"""Exports the model, from any layout and one tensor at a time, into a folder that transformers loads.

In: the model's chunks   Out: safetensors shards with an index, and config.json   The way in: weights.py
Rank 0 writes; every other rank sends it what it holds. Padding of the vocabulary is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sicog_mcore.checkpoint.hf import CONFIG, SHARD_BYTES, ShardWriter, WeightFiles, read_config
from sicog_mcore.checkpoint.hf_config import decoder_config, tower_config
from sicog_mcore.checkpoint.mapping import Target, Transfer, bind
from sicog_mcore.checkpoint.store import WRITE_ERRORS
from sicog_mcore.checkpoint.tables import CLIP, OWN, QWEN2, Family, part_table
from sicog_mcore.checkpoint.targets import PARTS, describe, local_parameters, part_of
from sicog_mcore.checkpoint.weights import choose_prefix, family_of, is_ignored
from sicog_mcore.config import ModelConfig, ModelPart
from sicog_mcore.errors import CheckpointError
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.gather import gather_shards, on_main
from sicog_mcore.parallel.topology import Topology

What = Literal["vlm", "decoder", "tower"]
LAYOUTS: Mapping[What, tuple[Family, tuple[ModelPart, ...]]] = {
    "vlm": (OWN, PARTS),
    "decoder": (QWEN2, ("decoder",)),  # Qwen3 and Llama have the same names
    "tower": (CLIP, ("tower",)),
}


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export.

    Attributes:
        dtype: of the tensors; None keeps the model's.
        fill_from: for "tower", the CLIP weights that layers come from which our tower does not have: those behind the
            layer whose output is used, the last norm, and the text model if there is one. Without it they are left out.
        add_files: adds files to the folder before it appears; called on rank 0.
        shard_bytes: largest shard; rank 0 holds one in memory.
    """

    dtype: torch.dtype | None = None
    fill_from: Path | None = None
    add_files: Callable[[Path], None] = field(default=lambda folder: None)
    shard_bytes: int = SHARD_BYTES


def export_hf(
    chunks: Sequence[VisionLanguageModel],
    topology: Topology,
    folder: Path,
    what: What,
    options: ExportOptions = ExportOptions(),  # noqa: B008  (frozen)
) -> None:
    """Writes the folder; it appears when it is complete. Collective.

    Args:
        what: "vlm" for the whole model in this project's layout, whose configuration and code ``options.add_files`` adds;
            "decoder" for a plain causal language model, "tower" for a plain CLIP vision model, each with its config.json.

    Raises:
        CheckpointError: on every rank: the folder exists, it cannot be written, or transformers has no such model.
    """
    targets = [target for target in describe(chunks, topology) if part_of(target.name) in LAYOUTS[what][1]]
    own = dict(local_parameters(chunks))
    export = _Export(folder, what, chunks[0].model_config, targets, options)
    try:
        on_main(topology, export.begin, WRITE_ERRORS)
        # One tensor at a time: no process ever holds the whole model, whatever its size.
        for target in targets:
            dtype = options.dtype or target.dtype
            shards = gather_shards(own.get(target.name), target.owners, target.shard_shape, dtype, topology)
            on_main(topology, partial(export.write, target, shards), WRITE_ERRORS)
        on_main(topology, export.finish, WRITE_ERRORS)
    except CheckpointError:
        export.abandon()
        raise


class _Export:
    """The work of rank 0; on other ranks nothing of it is called but ``abandon``."""

    def __init__(self, folder: Path, what: What, model: ModelConfig, targets: Sequence[Target], options: ExportOptions):
        self.folder, self.what, self.model, self.targets, self.options = folder, what, model, targets, options
        self.transfers: dict[str, Transfer] = {}
        self.config: dict[str, Any] = {}
        self.writer: ShardWriter | None = None

    def begin(self) -> None:
        family, parts = LAYOUTS[self.what]
        for part in parts:
            mine = [target for target in self.targets if part_of(target.name) == part]
            transfers = bind(part_table(part, self.model), mine, family.prefixes[part][0])
            self.transfers |= {transfer.target.name: transfer for transfer in transfers}
        dtype = str(self.options.dtype or self.targets[0].dtype).removeprefix("torch.")
        if self.what == "decoder":
            self.config = decoder_config(self.model.decoder, dtype)
        elif self.what == "tower":
            self.config = tower_config(self.model.tower, dtype) | {"num_hidden_layers": self.model.tower.layers_used}
        if self.options.fill_from is not None:
            self._take_layout(self.options.fill_from, dtype)
        self.writer = ShardWriter(self.folder, self.options.shard_bytes)

    def write(self, target: Target, shards: Sequence[Tensor]) -> None:
        for name, tensor in self.transfers[target.name].assemble(shards).items():
            self._opened.add(name, tensor)

    def finish(self) -> None:
        if self.options.fill_from is not None:
            self._fill(self.options.fill_from)
        if self.config:
            (self._opened.temporary / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        self.options.add_files(self._opened.temporary)
        self._opened.finish()

    def abandon(self) -> None:
        if self.writer is not None:
            self.writer.abandon()

    @property
    def _opened(self) -> ShardWriter:
        assert self.writer is not None, "begin() comes first"
        return self.writer

    def _take_layout(self, path: Path, dtype: str) -> None:
        """Takes names and config.json from the file that completes the export."""
        if self.what != "tower":
            raise CheckpointError(
                f"only an export of the tower is completed from other weights, not of the {self.what}"
            )
        with WeightFiles(path) as files:
            if family_of(files) is not CLIP:
                raise CheckpointError(
                    f"{path} is no CLIP; the tower can be completed from the CLIP it was imported from"
                )
            _, transfers = choose_prefix(CLIP, "tower", self.targets, files, self.model)
        self.transfers = {transfer.target.name: transfer for transfer in transfers}
        if config := read_config(path):
            self.config = {**config, "torch_dtype": dtype}
            self.config.pop("dtype", None)  # the newer name of the same

    def _fill(self, path: Path) -> None:
        with WeightFiles(path) as files:
            prefix, _ = choose_prefix(CLIP, "tower", self.targets, files, self.model)
            table = part_table("tower", self.model)
            # In the order of names, so that two exports of equal weights have equal bytes.
            for name in sorted(files.entries):
                if CLIP.part_of(name) is None or is_ignored(name, table, prefix):
                    tensor = files.whole(name)
                    is_float = tensor.is_floating_point()
                    self._opened.add(name, tensor.to(self.options.dtype) if self.options.dtype and is_float else tensor)
