"""Each rule about what cannot work: the path it blames, and the remedy it names."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from sicog_mcore.config import Experiment
from sicog_mcore.presets import PRESETS
from sicog_mcore.validation import RULE_PATHS, find_problems
from tests.builders import with_values


def changed(**values: Any) -> Experiment:
    """The tiny preset with values set by path, dots written as two underscores."""
    return with_values(PRESETS["tiny"](), {path.replace("__", "."): value for path, value in values.items()})


ASKED = {"held_out__every_steps": 5, "held_out__benchmark": "b.tsv"}
# (ranks, values, path that is blamed, part of the message)
BROKEN = [
    (3, {"parallel__tensor": 3}, "parallel.tensor", "tensor=3 does not divide 4 attention heads"),
    (3, {"parallel__tensor": 3}, "parallel.tensor", "use 1 or 2"),
    (4, {"parallel__tensor": 4}, "parallel.tensor", "2 key/value heads"),
    (2, {"parallel__tensor": 2, "model__decoder__ffn": 383}, "parallel.tensor", "feed-forward width 383"),
    (512, {"parallel__tensor": 512, "model__decoder__vocab_size": 129}, "parallel.tensor", "vocabulary of 256"),
    (2, {"parallel__tensor": 2, "parallel__sequence": True, "data__token_budget": 1023}, "parallel.tensor", "1023"),
    (1, {"parallel__sequence": True}, "parallel.sequence", "parallel.tensor to 2 or more"),
    (3, {"parallel__tensor": 2}, "parallel.tensor", "torchrun --nproc-per-node 2, 4 or 6"),
    (1, {"parallel__pipeline": 2}, "parallel.tensor", "1 ranks cannot hold whole copies of tensor 1 x pipeline 2 = 2"),
    (3, {"parallel__pipeline": 3}, "parallel.pipeline", "use 1, 2 or 4"),
    (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3}, "parallel.virtual_pipeline", "use 1 or 2"),
    (1, {"parallel__virtual_pipeline": 2}, "parallel.virtual_pipeline", "needs several stages"),
    (3, {}, "train.packs_per_step", "multiple of 3, e.g. 3 or 6"),
    (
        4,
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__packs_per_step": 6},
        "train.packs_per_step",
        "3 packs per replica are not a multiple of 2 stages",
    ),
    (1, {"parallel__overlap_param_gather": True}, "parallel.overlap_param_gather", "overlap_grad_reduce=true"),
    (1, {"model__decoder__head_dim": 31}, "model.decoder.head_dim", "30 or 32"),
    (1, {"model__decoder__num_kv_heads": 3}, "model.decoder.num_kv_heads", "use 1, 2 or 4"),
    (1, {"model__resampler__num_heads": 5}, "model.resampler.num_heads", "hidden=128"),
    (1, {"model__decoder__hidden": 126}, "model.decoder.hidden", "124 or 128"),
    (1, {"model__tower__num_heads": 5}, "model.tower.num_heads", "use 1, 2, 4"),
    (1, {"model__tower__image_px": 113}, "model.tower.image_px", "112 or 126"),
    (1, {"model__slicing__resolution_px": 120}, "model.slicing.resolution_px", "multiple of 14"),
    (1, {"model__tower__feature_layer": -4}, "model.tower.feature_layer", "use -3 to -1"),
    (1, {"model__tower__feature_layer": 0}, "model.tower.feature_layer", "use -3 to -1"),
    (1, {"data__token_budget": 188}, "data.token_budget", "at least 189"),
    (1, {"data__slice_budget": 7}, "data.slice_budget", "at least 8"),
    (1, {"optim__freeze": ("tower", "resampler", "decoder")}, "optim.freeze", "nothing is left to train"),
    (1, {"train__recompute_decoder": "block"}, "train.recompute_layers", "use 1 to 4"),
    (1, {"train__recompute_decoder": "block", "train__recompute_layers": 5}, "train.recompute_layers", "use 1 to 4"),
    (
        2,
        {"train__recompute_decoder": "block", "train__recompute_layers": 3, "parallel__pipeline": 2},
        "train.recompute_layers",
        "use 1 to 2",
    ),
    (1, {"dpo__beta": 0.3, "dpo__loss": "ipo"}, "dpo.beta", "would be ignored: objective is next_token"),
    (1, {"objective": "dpo", "dpo__loss": "ipo", "dpo__label_smoothing": 0.1}, "dpo.label_smoothing", "ipo loss has"),
    (1, {"train__recompute_layers": 2}, "train.recompute_layers", "would be ignored"),
    (1, {"held_out__every_steps": 5}, "held_out.every_steps", "name held_out.sources"),
    (2, {**ASKED, "parallel__pipeline": 2}, "held_out.benchmark", "2 pipeline stages does not answer"),
    (
        2,
        {**ASKED, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
        "held_out.benchmark",
        "set parallel.pipeline=1",
    ),
    (
        2,
        {**ASKED, "parallel__tensor": 2, "parallel__sequence": True},
        "held_out.benchmark",
        "parallel.sequence=false",
    ),
    (1, {"train__recompute_decoder": "full", "train__recompute_layers": 2}, "train.recompute_layers", "be ignored"),
]


@pytest.mark.parametrize(("world_size", "values", "path", "words"), BROKEN)
def test_a_broken_rule_names_the_field_and_the_remedy(
    world_size: int, values: dict[str, Any], path: str, words: str
) -> None:
    problems = find_problems(changed(**values), world_size)
    assert any(words in str(problem) for problem in problems if problem.path == path), problems


OUT_OF_RANGE = {
    "at least 1": (0, -5),
    "at least 0": (-1,),
    "above 0": (0.0, -1.0, float("nan"), float("inf")),
    "from 0 to 1": (-0.1, 1.1),
    "from 0 to below 1": (1.0, -0.1),
}


@pytest.mark.parametrize(
    ("path", "value"),
    [(path, value) for rule, paths in RULE_PATHS.items() for path in paths for value in OUT_OF_RANGE[rule]],
)
def test_a_number_out_of_range_is_reported_once_under_its_path(path: str, value: float) -> None:
    problems = find_problems(changed(**{path.replace(".", "__"): value}), 1)
    assert [problem.path for problem in problems if problem.problem == "out of range"] == [path]


def test_every_number_of_the_configuration_has_a_range() -> None:
    ruled = {path for paths in RULE_PATHS.values() for path in paths} | {"model.tower.feature_layer"}
    assert set(_numbers(PRESETS["tiny"](), "")) == ruled


def _numbers(node: Any, prefix: str) -> list[str]:
    found = []
    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            found += _numbers(value, f"{prefix}{field.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"{prefix}{field.name}")
    return found


def test_all_problems_are_found_at_once() -> None:
    broken = changed(model__decoder__head_dim=31, optim__lr=0.0, parallel__tensor=3, data__slice_budget=1)
    paths = {problem.path for problem in find_problems(broken, 1)}
    assert paths == {"model.decoder.head_dim", "optim.lr", "parallel.tensor", "data.slice_budget"}


@pytest.mark.parametrize(
    ("ranks", "values"),
    [
        (2, {"parallel__tensor": 2, "parallel__sequence": True}),
        (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__sequence": True}),
        (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
        (4, {}),
        (1, {"optim__freeze": ("tower", "decoder")}),
        (1, {"data__token_budget": 189, "data__slice_budget": 8}),
        (2, {**ASKED, "parallel__tensor": 2}),
        (2, {**ASKED, "held_out__every_steps": 0, "parallel__pipeline": 2}),
    ],
)
def test_layouts_that_work_have_no_problem(ranks: int, values: dict[str, Any]) -> None:
    assert find_problems(changed(**values), ranks) == []
