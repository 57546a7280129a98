"""Groups of any size cost what their samples cost one by one, with their weights, and their slices are encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sicog_mcore.build import build_model, plan_build
from sicog_mcore.config import DpoConfig, Experiment
from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample, PackedBatch, Segment
from sicog_mcore.data.collate import collate
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.topology import Topology, start_topology, stop_topology
from sicog_mcore.train.dpo import Preferences
from sicog_mcore.train.step import NextToken, StepResult, train_step
from tests.batches import SLICED, WIDE, random_sample
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks
from tests.tolerances import LAYOUT_GRAD_NORM, LAYOUT_LOSS, PACKED_GRADIENT, PACKED_LOSS

WEIGHTS = (1.0, 0.5, 2.0, 0.25)
HUGE = 1e9  # a gradient norm that clips nothing


@pytest.fixture(scope="module", autouse=True)
def topology() -> Iterator[Topology]:
    yield start_topology(tiny_experiment(Path("unused")).parallel, seed=0)
    stop_topology()


def experiment_with(**parallel: Any) -> Experiment:
    return tiny_experiment(
        Path("unused"), data={"token_budget": 1024}, optim={"clip_grad_norm": HUGE}, parallel=parallel
    )


EXPERIMENT = experiment_with()


def candidates(grids: list[tuple[int, int]], seed: int) -> list[EncodedSample]:
    """Four answers about the same slices, as samples of their own: texts and labels differ, patches do not."""
    drawn = [random_sample(EXPERIMENT, grids, 18 + 5 * i, seed + i) for i in range(len(WEIGHTS))]
    shared = {"patches": drawn[0].patches, "visual_rows": drawn[0].visual_rows}
    return [replace(sample, **shared) for sample in drawn]


def group(answers: Sequence[EncodedSample], weights: Sequence[float]) -> EncodedSample:
    """The same answers as one sample."""
    starts = [sum(len(answer.tokens) for answer in answers[:i]) for i in range(len(answers))]
    return EncodedSample(
        id="group",
        tokens=torch.cat([answer.tokens for answer in answers]),
        labels=torch.cat([answer.labels for answer in answers]),
        patches=answers[0].patches,
        grids=answers[0].grids,
        image_slots=torch.cat([answer.image_slots + start for answer, start in zip(answers, starts, strict=True)]),
        visual_rows=torch.cat([answer.visual_rows for answer in answers]),
        num_images=answers[0].num_images,
        segments=tuple(Segment(len(a.tokens), weight) for a, weight in zip(answers, weights, strict=True)),
    )


def pack(samples: Sequence[EncodedSample]) -> PackedBatch:
    model = EXPERIMENT.model
    queries, patch_dim = model.resampler.queries, model.tower.patch_dim
    return collate(samples, token_budget=1024, pad_id=0, queries=queries, patch_dim=patch_dim)


def trained(model: TrainableModel, batches: list[PackedBatch]) -> tuple[StepResult, torch.Tensor, list[int]]:
    """A step that changes no weight: its result, the whole gradient, and the slices of each pass through the tower."""
    chunk: Any = model.chunks[0]
    seen: list[int] = []
    hook = chunk.tower.register_forward_hook(lambda module, args, out: seen.append(int(args[1].shape[0])))
    result = train_step(model, batches, 0.0, NextToken())
    hook.remove()
    grads = [p.main_grad.clone().flatten() for p in chunk.parameters()]  # type: ignore[union-attr]
    return result, torch.cat(grads), seen


@pytest.fixture(scope="module")
def model(topology: Topology) -> TrainableModel:
    return build_model(plan_build(EXPERIMENT), topology)


def test_a_group_of_four_costs_what_its_samples_cost(model: TrainableModel) -> None:
    first, second = candidates(SLICED, 1), candidates(WIDE, 50)
    ones = [1.0] * 4
    together, gradient, seen = trained(model, [pack([group(first, ones), group(second, ones)])])
    alone, expected, passes = trained(model, [pack([sample]) for sample in [*first, *second]])
    assert together.count == alone.count > 50
    assert together.loss == pytest.approx(alone.loss, rel=PACKED_LOSS)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=PACKED_GRADIENT * float(expected.abs().max()))
    assert sum(seen) == len(SLICED) + len(WIDE) and sum(passes) == 4 * sum(seen)


def test_the_loss_is_the_weighted_mean_over_tokens(model: TrainableModel) -> None:
    answers = candidates(WIDE, 7)
    result, gradient, _ = trained(model, [pack([group(answers, WEIGHTS)])])
    each = [trained(model, [pack([answer])]) for answer in answers]
    total = sum(weight * one.count for weight, (one, _, _) in zip(WEIGHTS, each, strict=True))
    shares = [weight * one.count / total for weight, (one, _, _) in zip(WEIGHTS, each, strict=True)]
    assert result.count == sum(one.count for one, _, _ in each)  # tokens, whatever their weights
    expected = sum(share * one.loss for share, (one, _, _) in zip(shares, each, strict=True))
    assert result.loss == pytest.approx(expected, rel=PACKED_LOSS)
    assert result.loss != pytest.approx(sum(one.loss * one.count for one, _, _ in each) / result.count, rel=1e-3)
    mean = sum(share * grad for share, (_, grad, _) in zip(shares, each, strict=True))
    torch.testing.assert_close(gradient, mean, rtol=0, atol=PACKED_GRADIENT * float(gradient.abs().max()))
    assert result.grad_norm == pytest.approx(float(gradient.double().norm()), rel=PACKED_GRADIENT)


def test_equal_weights_are_no_weights(model: TrainableModel) -> None:
    answers = candidates(WIDE, 7)
    plain, gradient, _ = trained(model, [pack([group(answers, [1.0] * 4)])])
    batch = pack([group(answers, [1.0] * 4)])
    assert not batch.is_weighted
    same = trained(model, [replace(batch, segment_weights=torch.ones(4, dtype=torch.float64))])
    assert same[0].grad_norm == plain.grad_norm and torch.equal(same[1], gradient)
    fourfold = trained(model, [pack([group(answers, [4.0] * 4)])])
    assert fourfold[0].loss == pytest.approx(plain.loss, rel=PACKED_LOSS)
    assert fourfold[0].grad_norm == pytest.approx(plain.grad_norm, rel=PACKED_GRADIENT)


def _weighted_step(rank: Rank, experiments: list[Experiment]) -> list[tuple[float, float, int]]:
    """Of each layout: loss, gradient norm and count of two micro-batches, of which one has weights."""
    found = []
    for number, experiment in enumerate(experiments):
        topology = Rank(rank.rank, rank.world_size, f"{rank.init_method}-{number}").start(experiment.parallel)
        model = build_model(plan_build(experiment), topology)
        batches = [pack([group(candidates(SLICED, 1), WEIGHTS)]), pack(candidates(WIDE, 50))]
        result = train_step(model, batches[topology.data_rank :: topology.data_size], 0.0, NextToken())
        found.append((result.loss, result.grad_norm, result.count))
        stop_topology()
    return found


@pytest.mark.slow
def test_weights_count_over_the_global_batch_in_every_layout(model: TrainableModel) -> None:
    expected, *_ = trained(model, [pack([group(candidates(SLICED, 1), WEIGHTS)]), pack(candidates(WIDE, 50))])
    layouts: tuple[dict[str, Any], ...] = (
        {"overlap_grad_reduce": True},  # one replica alone has weights
        {"tensor": 2, "sequence": True},
        {"pipeline": 2, "virtual_pipeline": 2},
    )
    for results in run_ranks(_weighted_step, 2, [experiment_with(**layout) for layout in layouts]):
        for layout, (loss, norm, count) in zip(layouts, results, strict=True):
            assert count == expected.count, layout
            assert loss == pytest.approx(expected.loss, rel=LAYOUT_LOSS), layout
            assert norm == pytest.approx(expected.grad_norm, rel=LAYOUT_GRAD_NORM), layout


def test_groups_that_an_objective_is_not_made_for_are_refused(model: TrainableModel) -> None:
    answers = candidates(WIDE, 7)
    preferences = Preferences(DpoConfig())
    with pytest.raises(ValueError, match=r"samples \['group'\] have \[4\] answers, expected 2 each"):
        preferences.prepare(model, [pack([group(answers, [1.0] * 4)])])
    with pytest.raises(ValueError, match=r"have \[1, 1\] answers, expected 2 each"):
        preferences.prepare(model, [pack(answers[:2])])
    with pytest.raises(ValueError, match=r"have weights \[1.0, 2.0\], expected none"):
        preferences.prepare(model, [pack([group(answers[:2], [1.0, 2.0])])])
    with pytest.raises(ValueError, match=r"have weights \[1.0, -2.0\], expected positive ones"):
        NextToken().prepare(model, [pack([group(answers[:2], [1.0, -2.0])])])


def test_labels_stay_with_their_segments() -> None:
    batch = pack([group(candidates(WIDE, 7), WEIGHTS), *candidates(SLICED, 1)[:1]])
    assert batch.group_sizes.tolist() == [4, 1] and batch.segment_weights.tolist() == [*WEIGHTS, 1.0]
    ends = batch.cu_seqlens[1:6].tolist()
    learnt = [int((part != IGNORED_LABEL).sum()) for part in batch.labels.tensor_split(torch.tensor(ends))][:5]
    alone = [int((one.labels != IGNORED_LABEL).sum()) for one in [*candidates(WIDE, 7), *candidates(SLICED, 1)[:1]]]
    assert learnt == alone
