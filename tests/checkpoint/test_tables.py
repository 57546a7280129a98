"""Families are told apart by names and model type, and the tables name every tensor of the real sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sicog_mcore import presets
from sicog_mcore.checkpoint.mapping import Ignored, bind, matches
from sicog_mcore.checkpoint.tables import (
    CLIP,
    LLAMA,
    OWN,
    QWEN2,
    QWEN3,
    RELEASED,
    RESAMPLER,
    RESAMPLER_NAMES,
    Family,
    part_table,
    recognise,
)
from sicog_mcore.config import Experiment, ModelPart, ParallelConfig
from sicog_mcore.errors import CheckpointError

LAYER = "model.layers.0.self_attn."


@pytest.mark.parametrize(
    "names, model_type, family",
    [
        (("model.embed_tokens.weight", LAYER + "q_proj.weight", LAYER + "q_proj.bias"), "", QWEN2),
        (("model.embed_tokens.weight", LAYER + "q_norm.weight"), "", QWEN3),
        (("model.embed_tokens.weight", LAYER + "q_proj.weight"), "", LLAMA),
        (("model.embed_tokens.weight", LAYER + "q_proj.weight"), "qwen2", QWEN2),
        (("vision_model.embeddings.class_embedding", "text_model.x", "logit_scale"), "clip", CLIP),
        (("embeddings.class_embedding",), "clip_vision_model", CLIP),
        (("model.embed_tokens.weight", "model.mm_projector.query"), "llava_qwen", RELEASED),
        (("model.mm_projector.query",), "", RELEASED),
        (("language_model.lm_head.weight", "resampler.query"), "sicog_uhd", OWN),
        (RESAMPLER_NAMES, "", RESAMPLER),
    ],
)
def test_a_family_is_known_by_its_names(names: tuple[str, ...], model_type: str, family: Family) -> None:
    assert recognise(names, model_type, "/a/path/with/llama/qwen/yi/clip") is family


def test_a_decoder_with_familiar_names_that_computes_something_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match="model_type 'gemma2'"):
        recognise((LAYER + "q_proj.weight",), "gemma2", "x")


def test_unknown_names_are_refused_with_a_list_of_what_is_known() -> None:
    with pytest.raises(CheckpointError, match=r"no known family \(it has transformer\.h\.0.*qwen2: .*llava_uhd: "):
        recognise(("transformer.h.0.attn",), "gpt2", "x")


@pytest.mark.parametrize(
    "family, name, part",
    [
        (CLIP, "vision_model.post_layernorm.weight", "tower"),
        (CLIP, "embeddings.class_embedding", "tower"),
        (CLIP, "text_model.embeddings.token_embedding.weight", None),
        (RELEASED, "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias", "tower"),
        (RELEASED, "model.vision_tower.vision_model.pre_layrnorm.bias", "tower"),
        (RELEASED, "model.mm_projector.query", "resampler"),
        (RELEASED, "model.layers.0.mlp.up_proj.weight", "decoder"),
        (OWN, "language_model.model.norm.weight", "decoder"),
        (OWN, "vision_tower.vision_model.embeddings.class_embedding", "tower"),
        (OWN, "something.else", None),
    ],
)
def test_a_name_belongs_to_one_part(family: Family, name: str, part: ModelPart | None) -> None:
    assert family.part_of(name) == part


@pytest.fixture(scope="module")
def topology() -> Iterator[Any]:
    from sicog_mcore.parallel.topology import start_topology, stop_topology

    yield start_topology(ParallelConfig(), seed=0)
    stop_topology()


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def our_shapes(experiment: Experiment, part: ModelPart, topology: Any) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Returns the tensors expected in a file for one part, and the patterns we ignore; the model takes no memory."""
    from sicog_mcore.build import build_chunks, plan_build
    from sicog_mcore.checkpoint.targets import describe, part_of

    with torch.device("meta"):
        targets = describe(build_chunks(plan_build(experiment), topology), topology)
    table = part_table(part, experiment.model)
    transfers = bind(table, [target for target in targets if part_of(target.name) == part], "")
    expected = {name: shape for t in transfers for name, shape in zip(t.sources, t.shapes, strict=True)}
    assert len(expected) == sum(len(t.sources) for t in transfers)
    return expected, [row.source for row in table if isinstance(row, Ignored)]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["uhd_qwen2_0_5b", "uhd_qwen2_7b", "uhd_llama3_1_8b"])
def test_names_and_shapes_of_real_decoders_are_those_of_transformers(preset: str, topology: Any) -> None:
    import transformers

    from sicog_mcore.checkpoint.hf_config import decoder_config

    experiment = presets.PRESETS[preset]()
    values = decoder_config(experiment.model.decoder, "bfloat16")
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        theirs = shapes_of(transformers.AutoModelForCausalLM.from_config(config))
    assert our_shapes(experiment, "decoder", topology)[0] == theirs


@pytest.mark.slow
def test_names_and_shapes_of_clip_are_those_of_transformers(topology: Any) -> None:
    import transformers

    from sicog_mcore.checkpoint.hf_config import tower_config

    experiment = presets.uhd_qwen2_0_5b()
    with torch.device("meta"):
        config = transformers.CLIPVisionConfig(**tower_config(experiment.model.tower, "float32"))
        theirs = shapes_of(transformers.CLIPVisionModel(config))
    expected, ignored = our_shapes(experiment, "tower", topology)
    unused = {name for name in theirs if any(matches(pattern, name) for pattern in ignored)}
    assert expected == {name: shape for name, shape in theirs.items() if name not in unused}
    assert len(unused) == 16 + 2  # layer 24 and the last norm
