"""Files beside weights: a folder that could mean two models is refused, and files that are not read are named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sicog_mcore import presets
from sicog_mcore.checkpoint.hf_beside import judge_configs, judge_folder, judge_names
from sicog_mcore.checkpoint.hf_config import ConfigVerdict
from sicog_mcore.model.vision_tower import CLIP_MEAN, CLIP_STD

MODEL = presets.uhd_qwen2_7b().model
SINGLE = "model.safetensors"


def folder_with(folder: Path, *names: str) -> Path:
    for name in (SINGLE, *names):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (1, 1))
    return folder


def judged(folder: Path, *read: str) -> ConfigVerdict:
    return judge_folder(folder, [folder / name for name in read or (SINGLE,)])


@pytest.mark.parametrize(
    "names",
    [
        ("adapter_config.json", "adapter_model.safetensors"),
        ("adapter_model.bin",),
        ("adapter_config.json",),
        ("non_lora_trainables.bin",),
    ],
)
def test_an_adapter_beside_the_weights_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    (problem,) = judged(folder_with(tmp_path, *names)).problems
    assert names[0] in problem and "merge it into the weights first" in problem
    verdict = judge_folder(tmp_path / SINGLE, [tmp_path / SINGLE])  # the user named the file
    assert verdict.problems == () and "it is left out here" in verdict.notes[0]


@pytest.mark.parametrize("other", ["model-00001-of-00002.safetensors", "model-00003-of-00003.safetensors"])
def test_two_sets_of_the_same_kind_are_refused_unless_one_is_named(other: str, tmp_path: Path) -> None:
    folder_with(tmp_path, other)
    (problem,) = judged(tmp_path).problems
    assert "two sets of weights" in problem and other in problem
    (problem,) = judged(tmp_path, other).problems  # an index names the shards and not model.safetensors
    assert f"{other!r} and {SINGLE!r}" in problem
    verdict = judge_folder(tmp_path / SINGLE, [tmp_path / SINGLE])
    assert verdict.problems == () and f"{SINGLE!r} is read, not {other!r}" in verdict.notes[0]


@pytest.mark.parametrize(
    "other", ["consolidated.safetensors", "pytorch_model.bin", "ema.safetensors", "tf_model.h5", "x.gguf"]
)
def test_other_weights_are_said_and_whether_they_are_newer(other: str, tmp_path: Path) -> None:
    folder_with(tmp_path, other)
    (note,) = judged(tmp_path).notes
    assert f"{SINGLE!r} is read, not {other!r}" in note and "newer" not in note
    os.utime(tmp_path / other, (9, 9))
    (note,) = judged(tmp_path).notes
    assert f"({other!r} newer than it)" in note
    assert judged(tmp_path).problems == ()


def test_what_a_trainer_leaves_behind_is_no_second_model(tmp_path: Path) -> None:
    folder_with(
        tmp_path, "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "README.md", "merges.txt"
    )
    assert judged(tmp_path) == ConfigVerdict()


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_signs_of_packing_are_refused(name: str, tmp_path: Path) -> None:
    (problem,) = judged(folder_with(tmp_path, name)).problems
    assert name in problem and "packed" in problem


@pytest.mark.parametrize(
    "name, expected",
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "adapter"),
        ("model.layers.0.self_attn.q_proj.lora_B.default.weight", "adapter"),
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector", "adapter"),
        ("model.layers.0.mlp.up_proj.qweight", "quantised"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "quantised"),
        ("language_model.model.layers.0.mlp.up_proj.scales", "quantised"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "quantised"),
        ("model.layers.0.mlp.up_proj.weight", ""),
        ("vision_model.embeddings.class_embedding", ""),
    ],
)
def test_names_that_only_adapters_and_packed_weights_have(name: str, expected: str) -> None:
    problems = judge_names([name, "model.norm.weight"])
    assert [expected in problem for problem in problems] == [True] * bool(expected)


def write(folder: Path, name: str, **values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_pixels_are_what_the_tower_was_trained_on(tmp_path: Path) -> None:
    name = "preprocessor_config.json"
    clip = {
        "image_mean": [round(x, 5) for x in CLIP_MEAN],
        "image_std": list(CLIP_STD),
        "crop_size": 336,
        "do_resize": True,
    }
    write(tmp_path, name, **clip, rescale_factor=0.00392156862745098, image_processor_type="CLIPImageProcessor")
    assert judge_configs(tmp_path, "tower", MODEL) == ConfigVerdict()
    for changes, expected in (
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is [0.5, 0.5, 0.5], our tower has CLIP's"),
        ({"image_std": [0.229, 0.224, 0.225]}, "image_std is"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is"),
        ({"image_mean": "clip"}, "image_mean is 'clip'"),
    ):
        write(tmp_path, name, **{**clip, **changes})
        (problem,) = judge_configs(tmp_path, "tower", MODEL).problems
        assert expected in problem
    assert judge_configs(tmp_path, "decoder", MODEL) == ConfigVerdict()  # a decoder sees no pixels


def test_other_slices_and_unknown_keys_are_said(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", max_slices=9, layout="stitched", glow=1)
    notes = judge_configs(tmp_path, "tower", MODEL).notes
    assert notes == (
        "preprocessor_config.json: 'glow' = 1 is unknown here and not used",
        "preprocessor_config.json: max_slices is 9, model.slicing.max_slices is 7",
    )
    write(tmp_path, "generation_config.json", do_sample=True, temperature=0.7, top_k=20, spark=2)
    assert judge_configs(tmp_path, "decoder", MODEL).notes == (
        "generation_config.json: 'spark' = 2 is unknown here and not used",
    )


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_broken_file_that_no_run_needs_is_said_and_not_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    verdict = judge_configs(tmp_path, "decoder", MODEL)
    assert verdict.problems == () and "cannot be read" in verdict.notes[0]
