"""Loads first weights, foreign ones or our own, into a model under any layout, one tensor at a time.

In: a safetensors folder or file   Out: parameters filled in place   Next: export.py, the way back
Every source name is used once and every parameter is written once; otherwise one error lists all differences before
anything is written. Import before the model is wrapped: the optimizer copies its fp32 master weights from the parameters
it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sicog_mcore.checkpoint.finite import FiniteWatch
from sicog_mcore.checkpoint.hf import FLOATS, WeightFiles, read_config, shortened
from sicog_mcore.checkpoint.hf_beside import judge_configs, judge_folder, judge_names
from sicog_mcore.checkpoint.hf_config import ConfigVerdict, judge, judge_kinds
from sicog_mcore.checkpoint.mapping import Ignored, MappingTable, Shape, Target, Tied, Transfer, bind, matches
from sicog_mcore.checkpoint.part_reader import find_weights, load_parts
from sicog_mcore.checkpoint.tables import RELEASED, Family, part_table, recognise
from sicog_mcore.checkpoint.targets import PARTS, describe, local_parameters, part_of
from sicog_mcore.config import Experiment, ModelConfig, ModelPart
from sicog_mcore.data.tokenizer_files import compare_tokenizers
from sicog_mcore.errors import CheckpointError
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.gather import on_all
from sicog_mcore.parallel.topology import Topology

LEGACY = "legacy"  # separators of released weights
MOST_LINES = 20  # about the files of one folder
COMPARED_ROWS = 4096  # of two tables that must be equal, at a time


@dataclass(frozen=True)
class Plan:
    """The way in which one part is read from a checkpoint that is known to fit.

    Attributes:
        tied: (name, the name it must equal) of tables that the source holds twice.
        ignored: names of this part that our model has no use for.
        dtypes: of the sources.
        notes: lines for the user on what is not used or cannot be compared.
    """

    part: ModelPart
    family: Family
    transfers: tuple[Transfer, ...]
    tied: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    dtypes: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightContents:
    """The contents of a checkpoint, by its headers.

    Attributes:
        rows: part (None for what is not ours), name, shape and dtype of every tensor.
        verdict: refusals and notes of an import that do not depend on the model.
    """

    family: Family
    rows: tuple[tuple[ModelPart | None, str, Shape, str], ...]
    verdict: ConfigVerdict


def inspect(path: Path) -> WeightContents:
    """Lists the contents of a checkpoint; headers alone are read."""
    with WeightFiles(path) as files:
        family = family_of(files)
        rows = sorted((name, entry) for name, entry in files.entries.items())
        found = tuple((family.part_of(name), name, entry.shape, entry.dtype) for name, entry in rows)
        return WeightContents(
            family, found, _judge_files(files) + judge_kinds(read_config(path), family.kinds, list(family.prefixes))
        )


def family_of(files: WeightFiles) -> Family:
    """Returns the family of opened files, by the names of their tensors and by config.json, never by their path."""
    return recognise(files.entries, str(read_config(files.path).get("model_type", "")), str(files.path))


def plan_import(part: ModelPart, targets: Sequence[Target], files: WeightFiles, model: ModelConfig) -> Plan:
    """Finds family and prefix, and compares names, shapes and config.json; reads no tensor.

    Raises:
        CheckpointError: lists all that is missing, unexpected, of another shape, or configured differently.
    """
    family = family_of(files)
    if part not in family.prefixes:
        raise CheckpointError(
            f"{files.path} holds no {part}: it is {family.name}, {family.about}, with {', '.join(family.prefixes)}"
        )
    table = part_table(part, model)
    prefix, transfers = choose_prefix(family, part, targets, files, model)
    here = {name for name in files.entries if family.part_of(name) == part}
    twins = {prefix + row.source: prefix + row.of for row in table if isinstance(row, Tied)}
    # A tied twin may be there or not: it is neither missing nor unexpected, and _fill compares it with its partner.
    tied = tuple((name, of) for name, of in twins.items() if name in here)
    ignored = tuple(sorted(name for name in here if is_ignored(name, table, prefix)))
    # All that speaks against an import is collected first; a list of one problem at a time would cost a start for each.
    verdict = _judge_files(files) + judge(read_config(files.path), part, family.kinds[part], model)
    verdict += judge_configs(files.path, part, model)
    problems = [*verdict.problems, *_differences(transfers, files, here - {name for name, _ in tied} - set(ignored))]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(f"{files.path} ({family.about}) does not fit model.{part}:\n{listed}")
    dtypes = {files.entries[name].dtype for name in _sources(transfers)}
    return Plan(part, family, transfers, tied, ignored, tuple(sorted(dtypes)), verdict.notes)


def _judge_files(files: WeightFiles) -> ConfigVerdict:
    """Judges the files by the names of their tensors and by what stands beside them, whatever the part is."""
    read = {entry.file for entry in files.entries.values()}
    return judge_folder(files.path, read) + ConfigVerdict(tuple(judge_names(files.entries)))


def left_aside(files: WeightFiles, family: Family, parts: Collection[ModelPart]) -> str:
    """Counts tensors of parts that are not read, by the beginning of their names; empty if there are none."""
    aside = [name for name in files.entries if family.part_of(name) not in parts]
    starts = Counter(".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in aside)
    listed = shortened([f"{name} ({count})" for name, count in starts.most_common()], most=6)
    return f"{len(aside)} of other parts left aside: {listed}" if aside else ""


def choose_prefix(
    family: Family, part: ModelPart, targets: Sequence[Target], files: WeightFiles, model: ModelConfig
) -> tuple[str, tuple[Transfer, ...]]:
    """Returns the prefix of the family with which most names are there, and the transfers with it."""
    wanted = [target for target in targets if part_of(target.name) == part]
    # Not the first that fits whole: a checkpoint that lacks a tensor must be told what it lacks under its own prefix.
    choices = {prefix: bind(part_table(part, model), wanted, prefix) for prefix in family.prefixes[part]}
    prefix = max(choices, key=lambda p: sum(name in files.entries for name in _sources(choices[p])))
    return prefix, choices[prefix]


def is_ignored(name: str, table: MappingTable, prefix: str) -> bool:
    """Tells whether a table says that a source is not used."""
    return any(matches(prefix + row.source, name) for row in table if isinstance(row, Ignored))


def _sources(transfers: Sequence[Transfer]) -> Iterator[str]:
    for transfer in transfers:
        yield from transfer.sources


def _differences(transfers: Sequence[Transfer], files: WeightFiles, here: Collection[str]) -> Iterator[str]:
    """Yields one line for each kind of difference between needed sources and those ``here`` for this part."""
    needed = {name: shape for t in transfers for name, shape in zip(t.sources, t.shapes, strict=True)}
    missing = [f"{name} {list(shape)}" for name, shape in needed.items() if name not in here]
    unexpected = [f"{name} {list(files.entries[name].shape)}" for name in sorted(here) if name not in needed]
    found = {name: files.entries[name] for name in needed if name in here}
    shapes = [
        f"{name} is {list(entry.shape)}, expected {list(needed[name])}"
        for name, entry in found.items()
        if entry.shape != needed[name]
    ]
    dtypes = [f"{name} is {entry.dtype}" for name, entry in found.items() if entry.dtype not in FLOATS]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": shapes,
        f"quantised, expected {', '.join(FLOATS)}": dtypes,
    }
    return (f"{kind} ({len(names)}): {shortened(names)}" for kind, names in kinds.items() if names)


def import_part(
    chunks: Sequence[VisionLanguageModel],
    part: ModelPart,
    path: Path,
    topology: Topology,
    parts: Sequence[ModelPart] = (),
) -> list[str]:
    """Fills one part of the model from foreign weights. Collective; each rank reads only the rows it holds.

    Args:
        parts: all that are read from there; what is of none of them is said with the first.

    Returns:
        lines for the user: where the weights came from, and what of the folder is not used.

    Raises:
        CheckpointError: on every rank alike; the model must not be used after it.
    """
    targets = describe(chunks, topology)
    watch = FiniteWatch()
    # A file may be unreadable on one machine only; the others must not go on without it.
    notes = on_all(topology, partial(_fill, chunks, (part, parts or (part,)), path, targets, topology, watch))
    return notes + watch.settle(topology, str(path))


def _fill(
    chunks: Sequence[VisionLanguageModel],
    wanted: tuple[ModelPart, Sequence[ModelPart]],
    path: Path,
    targets: Sequence[Target],
    topology: Topology,
    watch: FiniteWatch,
) -> list[str]:
    part, parts = wanted
    warning = ""
    with WeightFiles(path) as files:
        plan = plan_import(part, targets, files, chunks[0].model_config)
        # Whole tables are compared, so one rank does it for all; its error reaches the others in import_part.
        for name, twin in plan.tied if topology.is_main else ():
            _require_equal(files, name, twin)
        transfers = {transfer.target.name: transfer for transfer in plan.transfers}
        for name, parameter in local_parameters(chunks):
            if part_of(name) == part:
                transfer = transfers[name]
                # A parameter that is not sharded has one shard, number 0, on every tensor-parallel rank.
                shard = topology.tensor_rank if transfer.target.shards > 1 else 0
                with torch.no_grad():
                    transfer.fill(parameter, shard, partial(_watched, files, watch, parameter.dtype))
        aside = left_aside(files, plan.family, parts) if part == parts[0] else ""
    separators = chunks[0].model_config.slicing.separators
    if plan.family is RELEASED and part == "decoder" and separators != LEGACY:
        warning = f"; it was trained with model.slicing.separators={LEGACY}, this run has {separators}"
    ours = plan.transfers[0].target.dtype
    dtype = str(ours).removeprefix("torch.")
    if ours == torch.bfloat16 and set(plan.dtypes) - {"BF16"}:
        dtype += ", rounded"
    ignored = f", {len(plan.ignored)} unused" if plan.ignored else ""
    ignored += f", {aside}" if aside else ""
    count = sum(len(transfer.sources) for transfer in plan.transfers)
    return [
        f"{part}: {count} tensors of {path} ({plan.family.about}; {'/'.join(plan.dtypes)} -> {dtype}{ignored}){warning}",
        *(f"{part}: {note}" for note in plan.notes),
    ]


def _watched(
    files: WeightFiles, watch: FiniteWatch, dtype: torch.dtype, name: str, axis: int, start: int, length: int
) -> Tensor:
    """Reads rows of a source in the dtype of the parameter, and looks for NaN on the way."""
    rows = files.read(name, axis, start, length).to(dtype)
    # After the conversion: a number that is finite in the file may be infinite in the dtype of the parameter.
    watch.see(f"{name} in {files.entries[name].file.name}", rows)
    return rows


def _require_equal(files: WeightFiles, name: str, twin: str) -> None:
    # In runs of rows: two whole tables of 152,064 x 3,584 in fp32 would be 4 GiB.
    rows, expected = files.entries[name].shape[0], files.entries[twin].shape
    same = files.entries[name].shape == expected and all(
        torch.equal(files.read(name, 0, start, COMPARED_ROWS), files.read(twin, 0, start, COMPARED_ROWS))
        for start in range(0, rows, COMPARED_ROWS)
    )
    if not same:
        raise CheckpointError(
            f"{name} in {files.path} differs from {twin}, but model.decoder.tie_embeddings=true makes them one; "
            "set it to false"
        )


def import_init(chunks: Sequence[VisionLanguageModel], experiment: Experiment, topology: Topology) -> list[str]:
    """Fills the parts that ``experiment.init`` names; the others stay as they are. Collective, before wrapping.

    Returns:
        lines for the user: one per part, and what of the files is not used; a long list is cut.

    Raises:
        CheckpointError: on every rank alike.
    """
    init = experiment.init
    places = {part: vars(init)[part] or init.checkpoint for part in PARTS}
    notes = []
    # Each place once, in order: parts that come from one checkpoint are read together, and its notes are said once.
    for path in dict.fromkeys(place for place in places.values() if place):
        parts = [part for part in PARTS if places[part] == path]
        if folder := find_weights(Path(path), topology):
            notes += load_parts(chunks, parts, folder, experiment, topology)
        else:
            notes += _few([line for part in parts for line in import_part(chunks, part, Path(path), topology, parts)])
            if "decoder" in parts and topology.is_main:
                notes += compare_tokenizers(experiment.data.tokenizer, Path(path))
    return notes


def _few(lines: Sequence[str]) -> list[str]:
    """Returns each line once, and no more lines than a reader takes in."""
    once = list(dict.fromkeys(lines))
    return once[:MOST_LINES] + ([f"and {len(once) - MOST_LINES} more lines"] if len(once) > MOST_LINES else [])
