"""Weights of other projects into our checkpoints, our checkpoints into folders for transformers, and what is in either.

    python tools/convert.py import --preset uhd_qwen2_7b --init.tower CLIP --init.decoder QWEN --out weights/start
    python tools/convert.py export --checkpoint runs/stage2 --out exported --what vlm
    python tools/convert.py inspect PATH
    python tools/convert.py unpickle mm_projector.bin --out projector.safetensors

Training imports by itself (the same --init fields); `import` is for checking beforehand, and for importing once for many
runs: its result is given as --init.checkpoint. `import --dry-run` reads headers only. Models larger than one machine's
memory: start it with torchrun, and give --tensor and --pipeline; what is written does not depend on them.
Exit code 0: done; 1: --verify found a difference; 2: something does not fit, and the message says what; 75: a full disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sicog_mcore.ranks import silence_megatron

silence_megatron("torch")

from sicog_mcore.build import build_chunks, plan_build
from sicog_mcore.checkpoint.commit import aside, write_tensors
from sicog_mcore.checkpoint.export import ExportOptions, What, export_hf
from sicog_mcore.checkpoint.hf import WeightFiles, require_free
from sicog_mcore.checkpoint.hf_folder import write_decoder_files, write_model_files
from sicog_mcore.checkpoint.part_reader import find_weights, load_parts, read_experiment, read_tensors
from sicog_mcore.checkpoint.part_writer import save_weights
from sicog_mcore.checkpoint.targets import PARTS, describe, part_of
from sicog_mcore.checkpoint.weights import MOST_LINES, import_init, inspect, left_aside, plan_import
from sicog_mcore.cli import load_experiment
from sicog_mcore.config import Experiment, ModelPart, ParallelConfig
from sicog_mcore.data.batch import EncodedSample
from sicog_mcore.data.collate import collate
from sicog_mcore.data.tokenizer_files import compare_tokenizers, tokenizer_notes
from sicog_mcore.errors import CheckpointError, MachineError, SicogError, exit_code, printable
from sicog_mcore.files import whole_file
from sicog_mcore.model.attention import packed_sequences
from sicog_mcore.model.initialise import initialise
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology

EXIT_DIFFERS = 1
FULL_BYTES = 16 << 20  # less is left on a disk that a tensor did not fit on
DTYPES: Mapping[str, torch.dtype | None] = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS, SEED = 64, 0  # of the batch that is compared
# Largest difference, relative to the largest value: rounding in fp32, and in bf16 over many layers.
TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options, rest = _parser().parse_known_args(arguments)
    try:
        if rest and options.command is not import_weights:
            raise CheckpointError(f"unknown arguments: {' '.join(rest)}")
        return int(options.command(options, rest))
    except SicogError as error:
        if options.is_main:
            print(printable(f"error: {error}"), file=sys.stderr)
        return exit_code(error)
    finally:
        stop_topology()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(is_main=True, verify=False)  # is_main: until the ranks know each other
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("import", help="other weights -> one of our checkpoints, without optimizer state")
    command.usage = (
        "%(prog)s --preset NAME --init.PART PATH ... [--config FILE.yaml] [--group.field VALUE] --out FOLDER"
    )
    command.add_argument("--out", type=Path, metavar="FOLDER", help="the new checkpoint, for --init.checkpoint")
    command.add_argument("--dry-run", action="store_true", help="print names and shapes on both sides, read no tensor")
    command.add_argument("--verify", action="store_true", help="compare with transformers on a seeded batch")
    _add_layout(command)
    command.set_defaults(command=import_weights)
    command = commands.add_parser("export", help="one of our checkpoints -> a folder for transformers")
    command.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="a run, or one checkpoint")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not exist")
    command.add_argument("--what", choices=("vlm", "decoder", "tower"), default="vlm")
    command.add_argument("--dtype", choices=tuple(DTYPES), default="keep")
    command.add_argument("--tokenizer", default="", metavar="FILE", help="where the run's own path no longer holds")
    command.add_argument(
        "--fill-from", type=Path, metavar="CLIP", help="tower: take the layers we do not build from here"
    )
    command.add_argument("--shard-gb", type=float, default=4.0, help="largest shard (GiB), held in memory (default 4)")
    _add_layout(command)
    command.add_argument("--verify", action="store_true", help="compare with transformers on a seeded batch")
    command.set_defaults(command=export_weights)
    command = commands.add_parser("inspect", help="family, names, shapes, dtypes, parameters per part")
    command.add_argument("path", type=Path)
    command.set_defaults(command=inspect_path)
    command = commands.add_parser("unpickle", help="an old .bin file -> safetensors; opened as tensors only")
    command.add_argument("path", type=Path)
    command.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    command.set_defaults(command=unpickle)
    return parser


def _add_layout(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks, under torchrun")
    command.add_argument("--pipeline", type=int, default=1, help="pipeline stages, under torchrun")


def _start(options: Any, parallel: ParallelConfig) -> Topology:
    topology = start_topology(parallel, SEED)
    options.is_main = topology.is_main
    if options.verify and topology.world_size > 1:  # said before anything is written
        raise CheckpointError("--verify compares whole models: run it on one rank")
    if options.verify and importlib.util.find_spec("transformers") is None:
        raise CheckpointError("transformers is missing, and --verify compares with it; pip install -e .[hf]")
    return topology


def import_weights(options: Any, rest: list[str]) -> int:
    # A recipe's layout is for training; this is another program on other ranks.
    layout = (f"tensor={options.tensor}", f"pipeline={options.pipeline}", "virtual_pipeline=1", "sequence=false")
    overrides = [*(f"--parallel.{value}" for value in layout), "--train.attention=auto"]
    experiment = load_experiment([*rest, *overrides], options.tensor * options.pipeline)
    if options.dry_run:
        return _print_plan(experiment, _start(options, experiment.parallel))
    if options.out is None:
        raise CheckpointError("nothing to write to; give --out FOLDER, or --dry-run")
    require_free(options.out)
    build = plan_build(experiment)
    topology = _start(options, experiment.parallel)
    chunks = build_chunks(build, topology)
    initialise(chunks, experiment.train.seed)
    _say(topology, *import_init(chunks, experiment, topology))
    differs = False
    for part in PARTS if options.verify else ():
        path = Path(vars(experiment.init)[part] or experiment.init.checkpoint or ".")
        if part != "resampler" and (path / "config.json").is_file():
            differs |= _verify(chunks, part, path)
    if differs:
        return EXIT_DIFFERS
    try:
        save_weights(chunks, experiment, topology, options.out)
    except CheckpointError as error:
        free = shutil.disk_usage(options.out.absolute().parent).free
        if topology.is_main:
            shutil.rmtree(aside(options.out), ignore_errors=True)
        if free < FULL_BYTES:  # what writes the tensors does not tell
            found = f"{options.out} cannot be written: no space left on device"
            raise MachineError(f"{found}; make room, then give the same command again") from error
        raise
    _say(topology, f"written: {options.out}; start from it with --init.checkpoint {options.out}")
    return 0


def export_weights(options: Any, rest: list[str]) -> int:
    require_free(options.out)
    topology = _start(options, ParallelConfig(tensor=options.tensor, pipeline=options.pipeline))
    folder = find_weights(options.checkpoint, topology)
    if folder is None:
        raise CheckpointError(
            f"{options.checkpoint} is no checkpoint of this project; expected a run or a step_N folder"
        )
    experiment = _for_export(read_experiment(folder), options, topology)
    chunks = build_chunks(plan_build(experiment), topology)
    _say(topology, *load_parts(chunks, PARTS, folder, experiment, topology))
    dtype = DTYPES[options.dtype] or describe(chunks, topology)[0].dtype
    write = {"vlm": write_model_files, "decoder": write_decoder_files}.get(options.what)
    has_tokenizer = os.path.exists(experiment.data.tokenizer)
    if has_tokenizer:  # refused here, on every rank, before anything is written
        _say(topology, *tokenizer_notes(experiment.data))
    if options.what == "vlm" and not has_tokenizer:
        raise CheckpointError(f"the tokenizer {experiment.data.tokenizer!r} is not there; give --tokenizer FILE")
    settings = ExportOptions(dtype=dtype, fill_from=options.fill_from, shard_bytes=int(options.shard_gb * 2**30))
    if write and has_tokenizer:
        name = str(dtype).removeprefix("torch.")
        settings = replace(settings, add_files=partial(write, experiment=experiment, dtype=name))
    export_hf(chunks, topology, options.out, options.what, settings)
    _say(topology, f"written: {options.out} ({options.what}, {str(dtype).removeprefix('torch.')})")
    if options.what == "decoder" and not has_tokenizer:
        _say(topology, "without a tokenizer; give --tokenizer FILE to have it in the folder")
    return EXIT_DIFFERS if options.verify and _verify(chunks, options.what, options.out) else 0


def _for_export(experiment: Experiment, options: Any, topology: Topology) -> Experiment:
    """The run's model, on the ranks at hand."""
    data = replace(experiment.data, tokenizer=options.tokenizer or experiment.data.tokenizer)
    train = replace(experiment.train, attention="auto")
    return replace(experiment, parallel=topology.config, data=data, train=train)


def inspect_path(options: Any, rest: list[str]) -> int:
    topology = _start(options, ParallelConfig())
    folder = find_weights(options.path, topology)
    if folder is not None:
        experiment = read_experiment(folder)
        rows = [(part_of(name), name, shape, dtype) for name, shape, dtype in read_tensors(folder)]
        _print_rows(f"{folder}: a checkpoint of this project, preset {experiment.preset}", rows)
        return 0
    contents = inspect(options.path)
    _print_rows(f"{options.path}: {contents.family.name}, {contents.family.about}", contents.rows)
    _say(topology, *contents.verdict.notes[:MOST_LINES])
    if contents.verdict.problems:
        listed = "\n".join(f"  - {problem}" for problem in contents.verdict.problems)
        raise CheckpointError(f"{options.path} cannot be imported:\n{listed}")
    return 0


def _print_rows(title: str, rows: Sequence[tuple[ModelPart | None, str, tuple[int, ...], str]]) -> None:
    print(printable(title))
    for part, name, shape, dtype in rows:
        print(printable(f"  {part or '-':10} {name:80} {str(list(shape)):22} {dtype}"))
    parameters: Counter[str] = Counter()
    for part, _, shape, _ in rows:
        parameters[part or "not used"] += torch.Size(shape).numel()
    _print_counts(parameters)


def _print_counts(parameters: Counter[str]) -> None:
    for part, count in parameters.items():
        print(f"{part}: {count:,} parameters")


def _print_plan(experiment: Experiment, topology: Topology) -> int:
    """Both sides of every tensor. The model is built without memory: only its names and shapes are looked at."""
    with torch.device("meta"):
        chunks = build_chunks(plan_build(experiment), topology)
    targets = describe(chunks, topology)
    places = {part: vars(experiment.init)[part] or experiment.init.checkpoint for part in PARTS}
    for part, path in places.items():
        if not path or find_weights(Path(path), topology) is not None:
            _say(topology, f"{part}: {f'{path}, a checkpoint of this project' if path else 'drawn at random'}")
            continue
        with WeightFiles(Path(path)) as files:
            plan = plan_import(part, targets, files, experiment.model)
            aside = left_aside(files, plan.family, [each for each in PARTS if places[each] == path])
        lines = [f"{part}: {path}, {plan.family.name} ({plan.family.about}), {'/'.join(plan.dtypes)}"]
        for transfer in plan.transfers:
            for name, shape in zip(transfer.sources, transfer.shapes, strict=True):
                target = transfer.target
                lines.append(f"  {name:70} {str(list(shape)):22} -> {target.name:70} {list(target.shape)}")
        lines += [f"  {name:70} equals {of}" for name, of in plan.tied]
        lines += [f"  {name:70} not used" for name in plan.ignored]
        lines += [f"{part}: {note}" for note in plan.notes[:MOST_LINES]] + ([f"{part}: {aside}"] if aside else [])
        lines += compare_tokenizers(experiment.data.tokenizer, Path(path)) if part == "decoder" else []
        _say(topology, *lines)
    if any(places.values()):
        _say(topology, "only headers were read: whether values are numbers shows at the import itself")
    if topology.is_main:
        parameters: Counter[str] = Counter()
        for target in targets:
            parameters[part_of(target.name)] += torch.Size(target.shape).numel()
        _print_counts(parameters)
    return 0


def unpickle(options: Any, rest: list[str]) -> int:
    """Reads tensors only: torch refuses a file that holds anything else."""
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
    print(printable(f"written: {options.out} ({len(tensors)} tensors)"))
    return 0


def _say(topology: Topology, *lines: str) -> None:
    if topology.is_main and lines:
        print(printable("\n".join(lines)))


# ---- comparison with transformers


@torch.no_grad()
def _verify(chunks: Sequence[VisionLanguageModel], what: ModelPart | What, path: Path) -> bool:
    """Prints the largest difference on a seeded batch; True if it is too large."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    compare = {"decoder": compare_decoder, "tower": compare_tower, "vlm": compare_model}[what]
    ours, theirs = compare(chunks[0], path)
    difference = float((ours - theirs).abs().max())
    relative = difference / float(theirs.abs().max())
    dtype = chunks[0].config.params_dtype
    good = relative <= TOLERANCES[dtype]  # false for NaN
    kind = "features" if what == "tower" else "logits"
    print(f"{what}: {kind} of {path} in {dtype}: largest difference {difference:.3g} ({relative:.3g} of the largest)")
    print(f"{what}: {'verified' if good else f'DIFFERS, more than {TOLERANCES[dtype]:g} of the largest'}")
    return not good


def compare_decoder(chunk: VisionLanguageModel, path: Path) -> tuple[Tensor, Tensor]:
    """Our logits [t, v] of random tokens, and those of the causal language model in a folder."""
    from transformers import AutoModelForCausalLM

    decoder, vocab = chunk.language_model, chunk.model_config.decoder.vocab_size
    tokens = torch.randint(vocab, (TOKENS,), generator=torch.Generator().manual_seed(SEED))
    positions = torch.arange(TOKENS)
    borders = packed_sequences(torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS)
    hidden = decoder(decoder.embedding(tokens[None], positions[None]), positions, borders)
    ours = decoder.project(hidden, positions)[:, 0, :vocab]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=ours.dtype).eval()
    return ours.float(), model(tokens[None]).logits[0].float()


def compare_tower(chunk: VisionLanguageModel, path: Path) -> tuple[Tensor, Tensor]:
    """Our features [p, c] of slices of three grids, and those of the CLIP in a folder."""
    from transformers import CLIPVisionModel

    assert chunk.tower is not None, "one rank has the tower"
    tower, config = chunk.tower, chunk.model_config.tower
    side = config.grid
    grids = [(side, side), (max(1, side - 2), side + 1), (side, max(1, side // 2))]
    patches = _random_patches(grids, config.patch_dim)
    ours = tower(torch.cat(patches), torch.tensor(grids))
    model = CLIPVisionModel.from_pretrained(path, dtype=ours.dtype).eval()
    theirs = []
    for rows, (height, width) in zip(patches, grids, strict=True):
        pixels = _image(rows, height, width, config.patch_px).to(ours.dtype)
        outputs = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        theirs.append(outputs.hidden_states[config.layers_used][0, 1:])
    return ours.float(), torch.cat(theirs).float()


def compare_model(chunk: VisionLanguageModel, path: Path) -> tuple[Tensor, Tensor]:
    """Our logits [t, v] of random tokens around two slices, and those of the exported model in a folder."""
    from sicog_mcore.hf import SicogForConditionalGeneration

    model_config = chunk.model_config
    grids, queries, vocab = [(3, 5), (4, 4)], model_config.resampler.queries, model_config.decoder.vocab_size
    visual = len(grids) * queries
    tokens = torch.randint(vocab, (TOKENS + visual,), generator=torch.Generator().manual_seed(SEED))
    sample = EncodedSample(
        id="verify",
        tokens=tokens,
        labels=torch.full_like(tokens, -100),
        patches=torch.cat(_random_patches(grids, model_config.tower.patch_dim)),
        grids=torch.tensor(grids),
        image_slots=torch.arange(visual) + TOKENS // 2,
        visual_rows=torch.arange(visual),
        num_images=1,
    )
    patch_dim = model_config.tower.patch_dim
    batch = collate([sample], token_budget=len(tokens), pad_id=0, queries=queries, patch_dim=patch_dim)
    hidden = chunk.hidden_states(batch)
    ours = chunk.language_model.project(hidden, torch.arange(len(tokens)))[:, 0, :vocab]
    rows = torch.full_like(tokens, -1).index_copy(0, sample.image_slots, sample.visual_rows)
    model = SicogForConditionalGeneration.from_pretrained(path, dtype=ours.dtype).eval()
    theirs = model(tokens[None], visual_rows=rows[None], patches=sample.patches, grids=sample.grids).logits[0]
    return ours.float(), theirs.float()


def _random_patches(grids: Sequence[tuple[int, int]], patch_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(0, 256, (h * w, patch_dim), generator=generator, dtype=torch.uint8) for h, w in grids]


def _image(rows: Tensor, height: int, width: int, side: int) -> Tensor:
    """Patch rows of one slice as the normalised image [1, 3, height * side, width * side] that CLIP takes."""
    from sicog_mcore.model.vision_tower import CLIP_MEAN, CLIP_STD

    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    image = rows.reshape(height, width, 3, side, side).permute(2, 0, 3, 1, 4).reshape(3, height * side, width * side)
    return ((image / 255 - mean) / std)[None]


if __name__ == "__main__":
    sys.exit(main())
