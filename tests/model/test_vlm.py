"""The whole model on one rank: samples in a pack do not see each other, and its sizes are those of sizes.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.config import Experiment, ModelPart
from sicog_mcore.data.batch import EncodedSample, PackedBatch
from sicog_mcore.data.collate import collate
from sicog_mcore.model.loss import supervised_rows
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.sizes import decoder_params, model_params, resampler_params, tower_params
from tests.batches import SLICED, TEXT_ONLY, WIDE, random_sample
from tests.builders import tiny_experiment
from tests.tolerances import PACKED_LOSS

EXPERIMENT = tiny_experiment(Path("unused"), data={"token_budget": 512})
SAMPLES = [random_sample(EXPERIMENT, grids, 20 + 9 * i, seed=i) for i, grids in enumerate((SLICED, TEXT_ONLY, WIDE))]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_topology(EXPERIMENT.parallel, seed=0)
    stop_topology()


def build(experiment: Experiment, topology: Topology) -> VisionLanguageModel:
    (chunk,) = build_model(plan_build(experiment), topology).chunks
    assert isinstance(chunk, VisionLanguageModel)
    return chunk


@pytest.fixture(scope="module")
def model(topology: Topology) -> VisionLanguageModel:
    return build(EXPERIMENT, topology)


def pack(samples: list[EncodedSample], length: int = EXPERIMENT.data.token_budget) -> PackedBatch:
    queries, patch_dim = EXPERIMENT.model.resampler.queries, EXPERIMENT.model.tower.patch_dim
    return collate(samples, token_budget=length, pad_id=0, queries=queries, patch_dim=patch_dim)


def test_packed_losses_equal_those_of_each_sample_alone(model: VisionLanguageModel) -> None:
    with torch.no_grad():
        packed = model(pack(SAMPLES))
        alone = torch.cat([model(pack([sample], length=len(sample.tokens))) for sample in SAMPLES])
    assert len(packed) == sum(len(supervised_rows(sample.labels)) for sample in SAMPLES)
    torch.testing.assert_close(packed, alone, rtol=PACKED_LOSS, atol=0)


def test_losses_do_not_depend_on_the_order_in_the_pack(model: VisionLanguageModel) -> None:
    with torch.no_grad():
        first, last = model(pack(SAMPLES)), model(pack(SAMPLES[::-1]))
    lengths = [len(supervised_rows(sample.labels)) for sample in SAMPLES]
    turned = torch.cat(last.split(lengths[::-1])[::-1])
    torch.testing.assert_close(first, turned, rtol=PACKED_LOSS, atol=0)


def test_an_image_changes_the_losses_of_its_own_sample_only(model: VisionLanguageModel) -> None:
    batch = pack(SAMPLES)
    with torch.no_grad():
        before = model(batch)
        batch.patches[: 8 * 8] = 255 - batch.patches[: 8 * 8]  # the first slice, which is the first sample's
        changed = (model(batch) != before).nonzero().squeeze(-1)
    assert 0 < len(changed) <= len(supervised_rows(SAMPLES[0].labels))
    assert int(changed.max()) < len(supervised_rows(SAMPLES[0].labels))


@pytest.mark.parametrize("samples", [[], SAMPLES[1:2]], ids=["padding only", "no image"])
def test_batches_without_images_go_forward_and_backward(samples: list[EncodedSample], topology: Topology) -> None:
    model = build(EXPERIMENT, topology)
    losses = model(pack(samples))
    assert losses.shape == (sum(len(supervised_rows(sample.labels)) for sample in samples),)
    losses.sum().backward()
    assert model.tower is not None
    grad = vars(model.tower.patch_embedding.weight)["main_grad"]
    assert grad.shape == model.tower.patch_embedding.weight.shape and not grad.any()


def test_the_head_sees_supervised_rows_only(model: VisionLanguageModel) -> None:
    batch, shapes = pack(SAMPLES), []
    hook = model.language_model.output_layer.register_forward_hook(
        lambda module, inputs, output: shapes.append((tuple(inputs[0].shape), tuple(output[0].shape)))
    )
    with torch.no_grad():
        model(batch)
    hook.remove()
    rows, decoder = len(supervised_rows(batch.labels)), EXPERIMENT.model.decoder
    assert rows < batch.num_tokens / 2
    assert shapes == [((rows, 1, decoder.hidden), (rows, 1, decoder.vocab_size))]


@pytest.mark.parametrize("decoder", [{}, {"tie_embeddings": True, "vocab_size": 1000, "qkv_bias": False}])
def test_built_parameters_are_those_of_the_arithmetic(decoder: dict[str, Any], topology: Topology) -> None:
    experiment = tiny_experiment(Path("unused"), model={"decoder": decoder})
    sizes, model = experiment.model, build(experiment, topology)
    expected = {
        "tower": tower_params(sizes.tower),
        "resampler": resampler_params(sizes.resampler, sizes.tower.hidden, sizes.decoder.hidden),
        "decoder": decoder_params(sizes.decoder),
    }
    parts: tuple[ModelPart, ...] = get_args(ModelPart)
    assert {part: sum(p.numel() for p in model.parameters_of(part)) for part in parts} == expected
    assert sum(p.numel() for p in model.parameters()) == model_params(sizes)
