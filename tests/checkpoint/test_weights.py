"""Imported models compute what transformers computes; what does not fit is listed, and nothing is written then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sicog_mcore.config import ParallelConfig
from sicog_mcore.errors import CheckpointError
from tests.checkpoint.foreign import DECODERS, experiment_for, write_clip, write_decoder, write_released

pytestmark = pytest.mark.slow  # transformers and Megatron take seconds to import
LOGITS = 1e-5  # largest absolute difference, fp32


@pytest.fixture(scope="module")
def topology() -> Iterator[Any]:
    from sicog_mcore.parallel.topology import start_topology, stop_topology

    yield start_topology(ParallelConfig(), seed=0)
    stop_topology()


@pytest.fixture
def qwen2(tmp_path: Path) -> Path:
    return write_decoder(tmp_path / "qwen2", "qwen2")


def build(topology: Any, name: str = "qwen2", **init: str) -> Any:
    """The model with first weights, and what the import said."""
    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.checkpoint.weights import import_init
    from sicog_mcore.model.initialise import initialise

    experiment = experiment_for(name, **init)
    (chunk,) = build_chunks(plan_build(experiment), topology)
    initialise([chunk], seed=9)
    before = {key: value.clone() for key, value in chunk.named_parameters()}
    try:
        return chunk, import_init([chunk], experiment, topology)
    except CheckpointError:
        assert all(torch.equal(before[key], value) for key, value in chunk.named_parameters()), "half written"
        raise


def refusal(topology: Any, name: str = "qwen2", **init: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        build(topology, name, **init)
    return str(caught.value)


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (with None) removes tensors of a folder; ``__`` in a name stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name: str, topology: Any, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path, name)
    chunk, _ = build(topology, name, decoder=str(folder))
    from sicog_mcore.commands.weight_parity import compare_decoder

    ours, theirs = compare_decoder(chunk, folder)
    assert theirs.abs().max() > 0.1  # the bound means something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGITS)


@torch.no_grad()
def test_features_equal_those_of_transformers_on_square_and_other_grids(topology: Any, tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    chunk, _ = build(topology, tower=str(folder))
    from sicog_mcore.commands.weight_parity import compare_tower

    ours, theirs = compare_tower(chunk, folder)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGITS)


def test_each_part_comes_from_its_own_place_and_the_rest_stays_random(topology: Any, tmp_path: Path) -> None:
    clip, qwen2 = write_clip(tmp_path / "clip"), write_decoder(tmp_path / "qwen2", "qwen2")
    released = write_released(tmp_path / "released", clip, qwen2, width=64, queries=16)
    plain, notes = build(topology)
    assert notes == []
    mixed, notes = build(topology, tower=str(clip), checkpoint=str(released), decoder=str(qwen2))
    assert [note.partition(":")[0] for note in notes] == ["tower", "resampler", "decoder"]
    assert "37 tensors" in notes[0] and "F32 -> float32, 18 unused" in notes[0]
    some, _ = build(topology, resampler=str(released / "model.safetensors"))
    same = {name for name, value in some.named_parameters() if torch.equal(value, dict(plain.named_parameters())[name])}
    assert same == {name for name, _ in plain.named_parameters() if not name.startswith("resampler.")}
    assert torch.equal(some.resampler.query, mixed.resampler.query)


def test_released_weights_say_which_separators_they_know(topology: Any, tmp_path: Path) -> None:
    clip, qwen2 = write_clip(tmp_path / "clip"), write_decoder(tmp_path / "qwen2", "qwen2")
    released = write_released(tmp_path / "released", clip, qwen2, width=64, queries=16)
    _, notes = build(topology, decoder=str(released))
    assert notes[0].endswith("it was trained with model.slicing.separators=legacy, this run has real")


def test_low_precision_files_are_converted_and_the_line_says_so(topology: Any, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path, "qwen2", torch.bfloat16)
    chunk, notes = build(topology, decoder=str(folder))
    assert "BF16 -> float32" in notes[0]
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(chunk.language_model.decoder.final_layernorm.weight, norm.float())


def test_missing_extra_and_wrongly_shaped_tensors_are_listed_at_once(topology: Any, qwen2: Path) -> None:
    change(
        qwen2,
        model__norm__weight=None,
        model__layers__1__self_attn__k_proj__bias=torch.zeros(31),
        model__layers__2__mlp__up_proj__weight=torch.zeros(2, 2),
        model__layers__0__mlp__up_proj__weight=torch.zeros(96, 64, dtype=torch.int8),
    )
    lines = refusal(topology, decoder=str(qwen2)).splitlines()
    assert lines == [
        f"{qwen2} (Qwen2 or Qwen2.5 decoder) does not fit model.decoder:",
        "  - missing (1): model.norm.weight [64]",
        "  - unexpected (1): model.layers.2.mlp.up_proj.weight [2, 2]",
        "  - wrong shape (1): model.layers.1.self_attn.k_proj.bias is [31], expected [32]",
        "  - quantised, expected F64, F32, F16, BF16 (1): model.layers.0.mlp.up_proj.weight is I8",
    ]


def test_a_long_list_is_cut(topology: Any, qwen2: Path) -> None:
    change(qwen2, **{f"model__layers__{i}__x": torch.zeros(1) for i in range(5, 25)})
    assert "unexpected (20): " in refusal(topology, decoder=str(qwen2))
    assert "and 8 more" in refusal(topology, decoder=str(qwen2))


def test_a_tower_without_one_tensor_says_which(topology: Any, tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    change(folder, embeddings__class_embedding=None)
    assert "missing (1): embeddings.class_embedding [64]" in refusal(topology, tower=str(folder))


def test_a_part_that_is_not_there_is_an_error(topology: Any, qwen2: Path) -> None:
    message = refusal(topology, checkpoint=str(qwen2))
    assert "holds no tower: it is qwen2" in message


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"num_attention_heads": 2},
            "num_attention_heads is 2, model.decoder.num_heads is 4: set model.decoder.num_heads=2",
        ),
        ({"rms_norm_eps": 1e-5}, "set model.decoder.norm_eps=1e-05"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "set model.decoder.rope_base=1000000"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "set model.decoder.rope_scaling_factor=4.0"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "set model.decoder.tie_embeddings=True"),
    ],
)
def test_what_shapes_do_not_show_is_compared_with_config_json(
    changes: dict[str, Any], expected: str, topology: Any, qwen2: Path
) -> None:
    change_config(qwen2, **changes)
    assert expected in refusal(topology, decoder=str(qwen2))


def test_a_tower_with_another_activation_is_refused(topology: Any, tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    change_config(folder, hidden_act="gelu", num_attention_heads=2)
    message = refusal(topology, tower=str(folder))
    assert "hidden_act is 'gelu'" in message and "set model.tower.num_heads=2" in message


def test_a_second_table_must_equal_the_one_it_is_tied_to(topology: Any, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path, "smollm2")
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=table.clone())
    build(topology, "smollm2", decoder=str(folder))
    table[-1, -1] += 1
    change(folder, lm_head__weight=table)
    with pytest.raises(CheckpointError, match="differs from model.embed_tokens.weight"):
        build(topology, "smollm2", decoder=str(folder))


def test_the_optimizer_starts_from_the_imported_weights(topology: Any, qwen2: Path) -> None:
    """Import, then wrap: master weights of bf16 parameters are copies of what was imported."""
    from dataclasses import replace

    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.checkpoint.weights import import_init
    from sicog_mcore.model.initialise import initialise
    from sicog_mcore.parallel.ddp import wrap_model

    experiment = experiment_for("qwen2", decoder=str(qwen2))
    experiment = replace(experiment, train=replace(experiment.train, precision="bf16"))
    build_plan = plan_build(experiment)
    chunks = build_chunks(build_plan, topology)
    initialise(chunks, seed=9)
    import_init(chunks, experiment, topology)
    expected = {id(p): p.detach().clone() for p in chunks[0].parameters()}
    model = wrap_model(chunks, build_plan.decoder, experiment, topology)
    model.zero_grad()
    model.set_learning_rate(0.0)
    model.optimizer_step()
    assert all(torch.equal(expected[id(p)], p) for p in chunks[0].parameters())
    norm = load_file(qwen2 / "model.safetensors")["model.norm.weight"].bfloat16()
    assert torch.equal(chunks[0].language_model.decoder.final_layernorm.weight, norm)


def place_nan(folder: Path, name: str, value: float) -> None:
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[-1] = value
    change(folder, **{name.replace(".", "__"): tensor})


@pytest.mark.parametrize(
    "name, value",
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan")),
        ("model.layers.0.self_attn.k_proj.bias", float("inf")),
        ("model.embed_tokens.weight", float("-inf")),
        ("model.norm.weight", float("nan")),
    ],
)
def test_values_that_are_no_numbers_are_named_with_tensor_and_file(
    name: str, value: float, topology: Any, qwen2: Path
) -> None:
    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.checkpoint.weights import import_part

    place_nan(qwen2, name, value)
    chunks = build_chunks(plan_build(experiment_for("qwen2")), topology)
    with pytest.raises(CheckpointError) as caught:
        import_part(chunks, "decoder", qwen2, topology)
    message = str(caught.value)
    assert f"NaN or infinite values in 1 tensors: {name} in model.safetensors (1 values)" in message
    assert str(qwen2) in message and "take other weights" in message


def test_matrices_of_zeros_are_said_and_large_finite_values_are_no_fault(topology: Any, qwen2: Path) -> None:
    table = load_file(qwen2 / "model.safetensors")["lm_head.weight"]
    change(
        qwen2, model__layers__0__mlp__up_proj__weight=torch.zeros(96, 64), lm_head__weight=torch.full_like(table, 3e38)
    )
    _, notes = build(topology, decoder=str(qwen2))  # whose sum is infinite
    assert notes[1:] == [
        f"{qwen2}: 1 matrices are all zero: model.layers.0.mlp.up_proj.weight in model.safetensors",
    ]


def test_a_value_too_large_for_the_precision_of_the_run_is_a_fault(topology: Any, qwen2: Path) -> None:
    norm = torch.full((64,), 1e39, dtype=torch.float64)
    change(qwen2, model__norm__weight=norm)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in model\.safetensors \(64 values\)"):
        from sicog_mcore.build import build_chunks, plan_build
        from sicog_mcore.checkpoint.weights import import_part

        import_part(build_chunks(plan_build(experiment_for("qwen2")), topology), "decoder", qwen2, topology)


def test_rounding_is_said(topology: Any, qwen2: Path) -> None:
    from dataclasses import replace

    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.checkpoint.weights import import_part

    experiment = experiment_for("qwen2")
    experiment = replace(experiment, train=replace(experiment.train, precision="bf16"))
    chunks = build_chunks(plan_build(experiment), topology)
    assert "F32 -> bfloat16, rounded)" in import_part(chunks, "decoder", qwen2, topology)[0]


def test_a_folder_with_an_adapter_or_two_sets_is_refused_whole(topology: Any, qwen2: Path) -> None:
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, qwen2 / "adapter_model.safetensors")
    assert "an adapter that is not merged" in refusal(topology, decoder=str(qwen2))
    (qwen2 / "adapter_model.safetensors").rename(qwen2 / "model-00001-of-00002.safetensors")
    assert "two sets of weights" in refusal(topology, decoder=str(qwen2))
    _, notes = build(topology, decoder=str(qwen2 / "model.safetensors"))
    assert "is read, not 'model-00001-of-00002.safetensors'" in notes[1]
    assert "of an adapter (LoRA)" in refusal(topology, decoder=str(_only(qwen2 / "model-00001-of-00002.safetensors")))


def _only(file: Path) -> Path:
    """The file alone in a folder, among names of a decoder."""
    folder = file.parent / "alone"
    folder.mkdir()
    save_file({**load_file(file), "model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    return folder


def test_packed_weights_are_refused_by_their_names(topology: Any, qwen2: Path) -> None:
    change(qwen2, model__layers__0__mlp__up_proj__qweight=torch.zeros(8, 8, dtype=torch.int32))
    assert "quantised weights; use the release that is not quantised" in refusal(topology, decoder=str(qwen2))


def test_the_decoder_of_another_project_is_taken_if_its_kind_is_ours(
    topology: Any, qwen2: Path, tmp_path: Path
) -> None:
    weights = {f"language_model.{name}": tensor for name, tensor in load_file(qwen2 / "model.safetensors").items()}
    weights |= {"multi_modal_projector.linear_1.weight": torch.ones(2, 2), "vision_tower.x": torch.ones(1)}
    folder = tmp_path / "vlm"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    inner = json.loads((qwen2 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "some_vlm", "text_config": inner}))
    chunk, (note,) = build(topology, decoder=str(folder))
    assert "vision-language model of another project" in note
    assert "2 of other parts left aside: multi_modal_projector (1), vision_tower (1)" in note
    norm = load_file(qwen2 / "model.safetensors")["model.norm.weight"]
    assert torch.equal(chunk.language_model.decoder.final_layernorm.weight, norm)
    for changed, expected in (
        ({"model_type": "gemma"}, "text_config.model_type is 'gemma'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "text_config.rope_type is 'dynamic'"),
    ):
        (folder / "config.json").write_text(json.dumps({"model_type": "some_vlm", "text_config": {**inner, **changed}}))
        assert expected in refusal(topology, decoder=str(folder))
    assert "holds no resampler" in refusal(topology, resampler=str(folder))
