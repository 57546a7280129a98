"""Steps on weights: import those of other projects, export ours for transformers, list what is in either, undo a pickle.

In: options, a voice that speaks on rank 0   Out: what was written, compared or found   Next: convert.py (the verb)
Every function that takes several ranks is collective. Nothing appears under its name before it is whole.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from sicog_mcore.build import build_chunks, plan_build
from sicog_mcore.checkpoint.commit import temporary_folder, write_tensors
from sicog_mcore.checkpoint.export import ExportOptions, export_hf
from sicog_mcore.checkpoint.hf import WeightFiles, require_free
from sicog_mcore.checkpoint.hf_folder import write_decoder_files, write_model_files
from sicog_mcore.checkpoint.part_reader import find_weights, load_parts, read_experiment, read_tensors
from sicog_mcore.checkpoint.part_writer import save_weights
from sicog_mcore.checkpoint.targets import PARTS, describe, part_of
from sicog_mcore.checkpoint.weights import MOST_LINES, import_init, inspect, left_aside, plan_import
from sicog_mcore.cli import load_experiment
from sicog_mcore.commands.weight_options import ImportOptions, InspectOptions, UnpickleOptions, WeightExportOptions
from sicog_mcore.commands.weight_parity import SEED, WeightComparison, compare_weights
from sicog_mcore.config import Experiment, ModelPart, ParallelConfig
from sicog_mcore.data.tokenizer_files import compare_tokenizers, tokenizer_notes
from sicog_mcore.errors import CheckpointError, MachineError, printable
from sicog_mcore.files import whole_file
from sicog_mcore.model.initialise import initialise
from sicog_mcore.parallel.topology import Topology, start_topology

FULL_BYTES = 16 << 20  # less is left on a disk that a tensor did not fit on
DTYPES: Mapping[str, torch.dtype | None] = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16}


class RankVoice:
    """Prints on rank 0 alone. Until the ranks know each other, each of them speaks."""

    def __init__(self) -> None:
        self.is_main = True

    def say(self, *lines: str) -> None:
        """Prints the lines on standard output."""
        if self.is_main and lines:
            print(printable("\n".join(lines)))

    def count(self, parameters: Mapping[str, int]) -> None:
        """Prints a number of parameters for each part."""
        self.say(*(f"{part}: {count:,} parameters" for part, count in parameters.items()))


@dataclass(frozen=True)
class WrittenWeights:
    """Weights that a step wrote, and how they compare with transformers.

    Attributes:
        out: folder that was written; None where a comparison failed before, or nothing was to be written.
        comparisons: in the order in which they were made; empty without ``verify``.
    """

    out: Path | None
    comparisons: tuple[WeightComparison, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether a comparison found more than rounding explains."""
        return not all(comparison.is_good for comparison in self.comparisons)


@dataclass(frozen=True)
class WeightListing:
    """Tensors that a checkpoint, or a file or folder of weights, holds.

    Attributes:
        title: path and family.
        rows: part of our model that a tensor belongs to, its name, shape and dtype.
        notes: what is to be said of them.
        problems: why they cannot be imported; empty if they can be.
    """

    title: str
    rows: Sequence[tuple[ModelPart | None, str, tuple[int, ...], str]]
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()

    def parameters(self) -> Counter[str]:
        """Returns the number of parameters by part."""
        counts: Counter[str] = Counter()
        for part, _, shape, _ in self.rows:
            counts[part or "not used"] += torch.Size(shape).numel()
        return counts


def join_ranks(parallel: ParallelConfig, voice: RankVoice, verify: bool = False) -> Topology:
    """Starts the topology; from now on only rank 0 speaks.

    Raises:
        CheckpointError: a comparison is wanted, and several ranks or no transformers are here.
    """
    topology = start_topology(parallel, SEED)
    voice.is_main = topology.is_main
    if verify and topology.world_size > 1:  # said before anything is written
        raise CheckpointError("--verify compares whole models: run it on one rank")
    if verify and importlib.util.find_spec("transformers") is None:
        raise CheckpointError("transformers is missing, and --verify compares with it; pip install -e .[hf]")
    return topology


def import_weights(options: ImportOptions, voice: RankVoice) -> WrittenWeights:
    """Writes one of our checkpoints from weights of others; with ``dry_run`` only says what would become of them.

    Raises:
        SicogError: the experiment, the weights or the output folder cannot be used.
    """
    flags = options.flags
    # A recipe's layout is for training; this is another program on other ranks.
    layout = (f"tensor={flags.tensor}", f"pipeline={flags.pipeline}", "virtual_pipeline=1", "sequence=false")
    overrides = [*(f"--parallel.{value}" for value in layout), "--train.attention=auto"]
    experiment = load_experiment([*options.experiment, *overrides], flags.tensor * flags.pipeline)
    if flags.dry_run:
        say_plan(experiment, join_ranks(experiment.parallel, voice, flags.verify), voice)
        return WrittenWeights(None)
    if flags.out is None:
        raise CheckpointError("nothing to write to; give --out FOLDER, or --dry-run")
    require_free(flags.out)
    build = plan_build(experiment)
    topology = join_ranks(experiment.parallel, voice, flags.verify)
    chunks = build_chunks(build, topology)
    initialise(chunks, experiment.train.seed)
    voice.say(*import_init(chunks, experiment, topology))
    comparisons: list[WeightComparison] = []
    for part in PARTS if flags.verify else ():
        path = Path(vars(experiment.init)[part] or experiment.init.checkpoint or ".")
        if part != "resampler" and (path / "config.json").is_file():
            comparisons.append(compare_weights(chunks, part, path))
            voice.say(*comparisons[-1].lines())
    written = WrittenWeights(flags.out, tuple(comparisons))
    if written.differs:
        return replace(written, out=None)
    try:
        save_weights(chunks, experiment, topology, flags.out)
    except CheckpointError as error:
        free = shutil.disk_usage(flags.out.absolute().parent).free
        if topology.is_main:
            shutil.rmtree(temporary_folder(flags.out), ignore_errors=True)
        if free < FULL_BYTES:  # what writes the tensors does not tell
            found = f"{flags.out} cannot be written: no space left on device"
            raise MachineError(f"{found}; make room, then give the same command again") from error
        raise
    return written


def export_weights(options: WeightExportOptions, voice: RankVoice) -> WrittenWeights:
    """Writes a folder for transformers from one of our checkpoints.

    Raises:
        SicogError: the checkpoint, the tokenizer or the output folder cannot be used.
    """
    require_free(options.out)
    layout = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    topology = join_ranks(layout, voice, options.verify)
    folder = find_weights(options.checkpoint, topology)
    if folder is None:
        raise CheckpointError(
            f"{options.checkpoint} is no checkpoint of this project; expected a run or a step_N folder"
        )
    experiment = _for_export(read_experiment(folder), options, topology)
    chunks = build_chunks(plan_build(experiment), topology)
    voice.say(*load_parts(chunks, PARTS, folder, experiment, topology))
    dtype = DTYPES[options.dtype] or describe(chunks, topology)[0].dtype
    write = {"vlm": write_model_files, "decoder": write_decoder_files}.get(options.what)
    has_tokenizer = os.path.exists(experiment.data.tokenizer)
    if has_tokenizer:  # refused here, on every rank, before anything is written
        voice.say(*tokenizer_notes(experiment.data))
    if options.what == "vlm" and not has_tokenizer:
        raise CheckpointError(f"the tokenizer {experiment.data.tokenizer!r} is not there; give --tokenizer FILE")
    settings = ExportOptions(dtype=dtype, fill_from=options.fill_from, shard_bytes=int(options.shard_gb * 2**30))
    name = str(dtype).removeprefix("torch.")
    if write and has_tokenizer:
        settings = replace(settings, add_files=partial(write, experiment=experiment, dtype=name))
    export_hf(chunks, topology, options.out, options.what, settings)
    voice.say(f"written: {options.out} ({options.what}, {name})")
    if options.what == "decoder" and not has_tokenizer:
        voice.say("without a tokenizer; give --tokenizer FILE to have it in the folder")
    if not options.verify:
        return WrittenWeights(options.out)
    comparison = compare_weights(chunks, options.what, options.out)
    voice.say(*comparison.lines())
    return WrittenWeights(options.out, (comparison,))


def _for_export(experiment: Experiment, options: WeightExportOptions, topology: Topology) -> Experiment:
    """The run's model, on the ranks at hand."""
    data = replace(experiment.data, tokenizer=options.tokenizer or experiment.data.tokenizer)
    train = replace(experiment.train, attention="auto")
    return replace(experiment, parallel=topology.config, data=data, train=train)


def list_weights(options: InspectOptions, voice: RankVoice) -> WeightListing:
    """Returns names, shapes and dtypes of all tensors; headers alone are read.

    Raises:
        CheckpointError: there is nothing that can be read.
    """
    topology = join_ranks(ParallelConfig(), voice)
    folder = find_weights(options.path, topology)
    if folder is not None:
        experiment = read_experiment(folder)
        rows = [(part_of(name), name, shape, dtype) for name, shape, dtype in read_tensors(folder)]
        return WeightListing(f"{folder}: a checkpoint of this project, preset {experiment.preset}", rows)
    contents = inspect(options.path)
    title = f"{options.path}: {contents.family.name}, {contents.family.about}"
    return WeightListing(title, contents.rows, contents.verdict.notes[:MOST_LINES], contents.verdict.problems)


def say_plan(experiment: Experiment, topology: Topology, voice: RankVoice) -> None:
    """Says both sides of every tensor. The model is built without memory: only names and shapes are looked at."""
    with torch.device("meta"):
        chunks = build_chunks(plan_build(experiment), topology)
    targets = describe(chunks, topology)
    places = {part: vars(experiment.init)[part] or experiment.init.checkpoint for part in PARTS}
    for part, path in places.items():
        if not path or find_weights(Path(path), topology) is not None:
            voice.say(f"{part}: {f'{path}, a checkpoint of this project' if path else 'drawn at random'}")
            continue
        with WeightFiles(Path(path)) as files:
            plan = plan_import(part, targets, files, experiment.model)
            not_read = left_aside(files, plan.family, [each for each in PARTS if places[each] == path])
        lines = [f"{part}: {path}, {plan.family.name} ({plan.family.about}), {'/'.join(plan.dtypes)}"]
        for transfer in plan.transfers:
            for name, shape in zip(transfer.sources, transfer.shapes, strict=True):
                target = transfer.target
                lines.append(f"  {name:70} {str(list(shape)):22} -> {target.name:70} {list(target.shape)}")
        lines += [f"  {name:70} equals {of}" for name, of in plan.tied]
        lines += [f"  {name:70} not used" for name in plan.ignored]
        lines += [f"{part}: {note}" for note in plan.notes[:MOST_LINES]] + ([f"{part}: {not_read}"] if not_read else [])
        lines += compare_tokenizers(experiment.data.tokenizer, Path(path)) if part == "decoder" else []
        voice.say(*lines)
    if any(places.values()):
        voice.say("only headers were read: whether values are numbers shows at the import itself")
    parameters: Counter[str] = Counter()
    for target in targets:
        parameters[part_of(target.name)] += torch.Size(target.shape).numel()
    voice.count(parameters)


def unpickle(options: UnpickleOptions) -> int:
    """Writes the tensors of a pickle as safetensors and returns their number: torch refuses whatever else there is.

    Raises:
        CheckpointError: the file holds more than tensors by name, or the new one cannot be written.
    """
    if options.out.exists():
        raise CheckpointError(f"{options.out} exists already; choose another name, or remove it")
    try:
        tensors = torch.load(options.path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError(f"holds {type(tensors).__name__}")
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        # Not torch's own words: they advise to load it in the unsafe way.
        raise CheckpointError(
            f"{options.path} cannot be read as tensors by name alone ({type(error).__name__}); ask for a safetensors file"
        ) from error
    try:
        with whole_file(options.out) as new:
            write_tensors(new, tensors)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{options.out} cannot be written: {error}") from error
    return len(tensors)
