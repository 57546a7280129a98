"""The memory estimate: independent figures, what fits 80 GB, and what is said where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sicog_mcore import stages
from sicog_mcore.cli import load_experiment
from sicog_mcore.config import Experiment, ParallelConfig
from sicog_mcore.errors import ConfigError
from sicog_mcore.memory import GIB, RESERVED_GIB, estimate_memory, estimate_text, fitting
from sicog_mcore.presets import PRESETS
from tests.tolerances import MEMORY_ESTIMATE

EXAMPLES = Path(__file__).parents[1] / "examples"
STAGES = {"stage1": stages.ALIGN, "dpo": stages.DPO}
GB_80 = 80 * 10**9  # the label; the devices have a little more
NODE = 8
SHARED = ParallelConfig(tensor=2, sequence=True)

# Derived apart from this code: layout, ranks, recomputation, GiB of the stage that needs most without what is reserved.
# 8,192 tokens a pack, a quarter of them supervised, about 28 slices, the tower recomputed.
DERIVED = [
    ("uhd_qwen2_7b", ParallelConfig(), 8, "none", 96.0),
    ("uhd_qwen2_7b", ParallelConfig(), 8, "full", 63.1),
    ("uhd_qwen2_7b", SHARED, 8, "none", 55.1),
    ("uhd_qwen2_7b", ParallelConfig(tensor=4, pipeline=2, sequence=True), 8, "none", 32.0),
    ("uhd_qwen2_72b", ParallelConfig(tensor=8, pipeline=4, sequence=True), 32, "none", 74.4),
    ("uhd_qwen2_72b", ParallelConfig(tensor=8, pipeline=4, sequence=True), 64, "none", 57.7),
    ("uhd_qwen2_72b", ParallelConfig(tensor=8, pipeline=4, sequence=True), 32, "full", 53.0),
]


def changed(experiment: Experiment, **sections: dict[str, Any]) -> Experiment:
    """With fields of some sections replaced."""
    return replace(experiment, **{name: replace(vars(experiment)[name], **new) for name, new in sections.items()})


@pytest.mark.parametrize(("preset", "parallel", "ranks", "recompute", "expected"), DERIVED)
def test_the_estimate_equals_an_independent_derivation(
    preset: str, parallel: ParallelConfig, ranks: int, recompute: str, expected: float
) -> None:
    base = changed(PRESETS[preset](), data={"token_budget": 8192}, train={"recompute_decoder": recompute})
    found = estimate_memory(replace(base, parallel=parallel), ranks)
    assert found.total / GIB == pytest.approx(expected, rel=MEMORY_ESTIMATE)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_80_gb_on_its_smallest_node(name: str) -> None:
    experiment = PRESETS[name]()
    assert fitting(experiment, max(NODE, experiment.parallel.model_size), GB_80) == []


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*_qwen2_7b.yaml")), ids=lambda path: path.stem)
def test_every_7b_recipe_fits_eight_devices_of_80_gb(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["preset"] == "uhd_qwen2_7b"
    stage = STAGES.get(file.stem.partition("_")[0], {})
    experiment = load_experiment(["--config", str(file)], NODE, stage=stage)
    assert fitting(experiment, NODE, GB_80) == []


def test_what_cannot_fit_is_refused_and_what_may_not_fit_is_said_with_the_smallest_remedy() -> None:
    seven = changed(PRESETS["uhd_qwen2_7b"](), data={"token_budget": 8192}, parallel={"tensor": 1, "sequence": False})
    with pytest.raises(ConfigError, match=r"states take 133\.\d GiB a device, of which 71\.5 GiB are usable"):
        fitting(seven, 1, GB_80)
    (doubt,) = fitting(seven, 8, GB_80)
    layers = int(doubt.partition("recompute_layers=")[2].split()[0])
    room = GB_80 - RESERVED_GIB * GIB

    def total(count: int) -> int:
        return estimate_memory(changed(seven, train={"recompute_decoder": "block", "recompute_layers": count}), 8).total

    assert total(layers) <= room < total(layers - 1)
    assert 1 < layers < 28


def test_a_frozen_reference_holds_the_weights_once_more() -> None:
    seven = replace(PRESETS["uhd_qwen2_7b"](), objective="dpo")
    frozen = changed(seven, dpo={"reference": "frozen"})
    one, two = (estimate_memory(experiment, 8) for experiment in (seven, frozen))
    assert (two.weights, two.gradients, two.optimizer) == (2 * one.weights, one.gradients, one.optimizer)


def test_frozen_parts_have_neither_gradients_nor_optimizer_states() -> None:
    whole = PRESETS["uhd_qwen2_7b"]()
    aligned = changed(whole, optim={"freeze": ("tower", "decoder")})
    found, full = estimate_memory(aligned, 8), estimate_memory(whole, 8)
    assert found.weights == full.weights
    assert found.gradients == 4 * 68_963_328
    assert found.optimizer == 12 * 68_963_328 // 4


def test_the_text_names_what_counts_and_leaves_out_what_does_not() -> None:
    text = estimate_text(estimate_memory(PRESETS["uhd_qwen2_72b"](), 32))
    assert text.startswith("about ") and "optimizer 33.4" in text and "logits" not in text
