"""Judges files beside foreign weights: adapters, second sets of weights, signs of packing, other configurations.

In: a folder and the files that are read of it   Out: ConfigVerdict   Next: weights.py
A folder is refused where it could mean two models. One line names files that are merely not used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import Any

from sicog_mcore.checkpoint.hf_config import ConfigVerdict, brief
from sicog_mcore.checkpoint.hf_keys import Scope, fate
from sicog_mcore.config import ModelConfig, ModelPart
from sicog_mcore.errors import CheckpointError
from sicog_mcore.model.vision_tower import CLIP_MEAN, CLIP_STD

ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "gptq_config.json")
PREPROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"
SAME_NAMES = re.compile(r"model\.safetensors|model-\d+-of-\d+\.safetensors")  # as transformers names one whole model
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".npz", ".onnx", ".pkl")
TRAINING_STATE = re.compile(r"(optimizer|scheduler|scaler|rng_state\w*|training_args|trainer_state)\.\w+")
# Names of tensors that only adapters and packed weights have.
ADAPTER_NAMES = re.compile(
    r"(^base_model\.)|\.(lora_\w+|hada_w\w+|lokr_w\w+|oft_\w+|vera_\w+|modules_to_save|boft_\w+)(\.|$)"
)
PACKED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_scale|weight_scale_inv|input_scale|weight_packed|weight_shape|SCB|absmax|"
    r"quant_map|nested_absmax|nested_quant_map|weight_format|quant_state\S*|zero_point|weight_zero_point|wf)$"
)
CLIP_VALUE = 1 / 255  # of a pixel's unit
TOLERANCE = 1e-3  # files round mean and deviation
PREPROCESSOR_FIELDS = (
    ("resolution", "resolution_px"),
    ("max_slices", "max_slices"),
    ("layout", "layout"),
)


def judge_names(names: Collection[str]) -> list[str]:
    """Finds problems that the names of tensors show: an adapter that is not merged, or packed weights."""
    problems = []
    for pattern, meaning in (
        (
            ADAPTER_NAMES,
            "of an adapter (LoRA) that is not merged; merge it into its base first (merge_and_unload in peft)",
        ),
        (PACKED_NAMES, "of quantised weights; use the release that is not quantised"),
    ):
        if found := sorted(name for name in names if pattern.search(name)):
            problems.append(f"{len(found)} tensors are {meaning}: {', '.join(found[:3])}, ...")
    return problems


def judge_folder(path: Path, read: Collection[Path]) -> ConfigVerdict:
    """Finds adapters, other sets of weights and signs of quantisation beside the files that are read.

    Args:
        path: as the user gave it; a file that was named is meant, of a folder the right one must be clear.
        read: files with the tensors that are used.
    """
    folder = path if path.is_dir() else path.parent
    here = sorted(file for file in folder.iterdir() if file.is_file())
    used = {file.name for file in read}
    others = [file.name for file in here if file.name not in used and file.suffix in OTHER_WEIGHTS]
    names = {file.name for file in here}
    problems: list[str] = []
    notes: list[str] = []
    if adapters := [name for name in ADAPTERS if name in names and name not in used]:
        text = f"{' and '.join(adapters)} beside the weights: an adapter that is not merged; merge it into the weights first"
        (problems if path.is_dir() else notes).append(text + ("" if path.is_dir() else ", it is left out here"))
    problems += [f"{name} beside the weights: they are packed" for name in QUANTISED if name in names]
    # Two whole models in one folder: nothing tells which one is meant, so neither is taken.
    twins = [name for name in others if SAME_NAMES.fullmatch(name)]
    if twins and path.is_dir():
        problems.append(
            f"two sets of weights: {_listed(sorted(used))} and {_listed(twins)}; remove one, or give the file itself "
            "(model.safetensors, or the index)"
        )
    left = [name for name in others if name not in ADAPTERS and not TRAINING_STATE.fullmatch(name)]
    left = [name for name in left if not (name in twins and path.is_dir())]
    if left:
        # A second file that is newer is often the one that was meant, for example a fine-tuned copy; its age is said.
        newest = max((file.stat().st_mtime for file in read), default=0.0)
        newer = [name for name in left if (folder / name).stat().st_mtime > newest]
        also = f" ({_listed(newer)} newer than it)" if newer else ""
        notes.append(f"{folder}: {_listed(sorted(used))} is read, not {_listed(left)}{also}")
    return ConfigVerdict(tuple(problems), tuple(notes))


def judge_configs(path: Path, part: ModelPart, model: ModelConfig) -> ConfigVerdict:
    """Compares configurations of other steps: of pictures that become numbers, of answers that are generated."""
    folder = path if path.is_dir() else path.parent
    verdict = ConfigVerdict()
    files: tuple[tuple[str, Scope], ...] = ((PREPROCESSOR, "preprocessor"),) if part == "tower" else ()
    if part == "decoder":
        files = ((GENERATION, "generation"),)
    for name, scope in files:
        try:
            values = read_json(folder / name)
        except CheckpointError as error:  # of a file that no run needs
            verdict += ConfigVerdict(notes=(str(error),))
            continue
        notes = tuple(
            f"{name}: {key!r} = {brief(value)} is unknown here and not used"
            for key, value in values.items()
            if value is not None and fate(key, scope) == "unknown"
        )
        verdict += ConfigVerdict(notes=notes)
        if scope == "preprocessor":
            verdict += ConfigVerdict(tuple(_pixels(values)), tuple(_slicing(values, model)))
    return verdict


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; empty if there is no file.

    Raises:
        CheckpointError: the file cannot be read, or holds no object.
    """
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} cannot be read (it holds {type(values).__name__}, no object); copy it again")
    return values


def _pixels(values: Mapping[str, Any]) -> Iterator[str]:
    """Compares the normalisation of pixels that the tower was trained with; ours is CLIP's."""
    for name, ours in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        given = values.get(name)
        if given is not None and not _is_close(given, ours):
            yield f"{PREPROCESSOR}: {name} is {brief(given)}, our tower has CLIP's {list(ours)}"
    for name in ("do_normalize", "do_rescale"):
        if values.get(name) is False:
            yield f"{PREPROCESSOR}: {name} is false, our tower rescales and normalises every picture"
    factor = values.get("rescale_factor", CLIP_VALUE)
    if not _is_close([factor], (CLIP_VALUE,)):
        yield f"{PREPROCESSOR}: rescale_factor is {brief(factor)}, expected 1/255"


def _is_close(given: object, ours: tuple[float, ...]) -> bool:
    return (
        isinstance(given, list | tuple)
        and len(given) == len(ours)
        and all(
            isinstance(x, int | float) and isclose(x, y, rel_tol=TOLERANCE) for x, y in zip(given, ours, strict=True)
        )
    )


def _slicing(values: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    for name, field in PREPROCESSOR_FIELDS:
        here = vars(model.slicing)[field]
        if values.get(name) is not None and values[name] != here:
            yield f"{PREPROCESSOR}: {name} is {brief(values[name])}, model.slicing.{field} is {here!r}"
    for name, here in (("patch_size", model.tower.patch_px), ("query_grid", model.resampler.query_grid)):
        if values.get(name) is not None and values[name] != here:
            yield f"{PREPROCESSOR}: {name} is {brief(values[name])}, {here} here"


def _listed(names: Collection[str], most: int = 4) -> str:
    shown = ", ".join(map(repr, list(names)[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
