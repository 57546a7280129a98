"""Preference losses against the same formulas written out in fp64, on a batch of four pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sicog_mcore.config import DpoConfig, Experiment
from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample, PackedBatch, Segment
from sicog_mcore.data.collate import collate
from sicog_mcore.data.resume import open_rows
from sicog_mcore.train.dpo import GlobalTerms, Preferences, preference_losses
from sicog_mcore.train.reference import ReferenceTable, answer_log_probs
from sicog_mcore.train.reference_key import fingerprint
from sicog_mcore.train.step import SUMS
from tests.pairs import pair_experiment, write_pairs
from tests.tolerances import PACKED_LOSS

LENGTHS = ((9, 12), (15, 5), (7, 7), (4, 20))
LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair")


def pair(number: int) -> EncodedSample:
    total = sum(LENGTHS[number])
    labels = torch.arange(total) + 1
    for start in (0, LENGTHS[number][0]):
        labels[start : start + 2] = IGNORED_LABEL  # the question
    no_rows = torch.empty(0, dtype=torch.int64)
    return EncodedSample(
        id=f"p{number}",
        tokens=torch.arange(total),
        labels=labels,
        patches=torch.empty(0, 12, dtype=torch.uint8),
        grids=torch.empty(0, 2, dtype=torch.int64),
        image_slots=no_rows,
        visual_rows=no_rows,
        num_images=0,
        segments=tuple(Segment(length) for length in LENGTHS[number]),
    )


def four_pairs() -> tuple[PackedBatch, Tensor]:
    """The batch, and random fp32 losses of its supervised positions."""
    batch = collate([pair(i) for i in range(4)], token_budget=100, pad_id=0, queries=1, patch_dim=12)
    g = torch.Generator().manual_seed(3)
    losses = torch.rand(int((batch.labels != IGNORED_LABEL).sum()), generator=g) * 5
    log_probs = answer_log_probs(batch, losses)
    return replace(
        batch, segment_reference=log_probs + torch.randn(8, generator=g, dtype=torch.float64) * 4 - 5
    ), losses


def per_token(losses: Tensor) -> list[list[float]]:
    """Losses of each conversation's answer, by the lengths alone."""
    counts = [length - 2 for lengths in LENGTHS for length in lengths]
    return [part.tolist() for part in losses.double().split(counts)]


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def written_out(config: DpoConfig, losses: Tensor, reference: list[float]) -> float:
    """Mean over four pairs plus the mean over all chosen tokens, in Python floats."""
    answers = per_token(losses)
    ratios = [-sum(tokens) - r for tokens, r in zip(answers, reference, strict=True)]
    chosen, rejected = ratios[::2], ratios[1::2]
    drift_chosen, drift_rejected = (max(0.0, sum(side) / 4) for side in (chosen, rejected))
    beta, total = config.beta, 0.0
    for c, r in zip(chosen, rejected, strict=True):
        x = beta * (c - r)
        if config.loss == "sigmoid":
            total += (1 - config.label_smoothing) * softplus(-x) + config.label_smoothing * softplus(x)
        elif config.loss == "hinge":
            total += max(0.0, 1 - x)
        elif config.loss == "ipo":
            total += (c - r - 0.5 / beta) ** 2
        else:
            total += 0.5 / (1 + math.exp(beta * (c - drift_rejected)))
            total += 0.5 / (1 + math.exp(beta * (drift_chosen - r)))
    tokens = [loss for answer in answers[::2] for loss in answer]
    return total / 4 + config.sft_weight * sum(tokens) / len(tokens)


def terms_of(config: DpoConfig, batch: PackedBatch, losses: Tensor) -> GlobalTerms:
    """Terms that ``Preferences.prepare`` gathers over ranks, for a global batch of this one."""
    ratios = answer_log_probs(batch, losses) - batch.segment_reference
    tokens = sum(lengths[0] - 2 for lengths in LENGTHS)
    drifts = [max(0.0, float(side.mean())) for side in (ratios[::2], ratios[1::2])]
    return GlobalTerms(config.sft_weight * 4 / tokens, *drifts)


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_the_written_out_one(loss: str, smoothing: float, sft_weight: float) -> None:
    batch, losses = four_pairs()
    config = DpoConfig(loss=loss, beta=0.3, label_smoothing=smoothing, sft_weight=sft_weight)  # type: ignore[arg-type]
    total, count, log = Preferences(config).loss(batch, losses, terms_of(config, batch, losses))
    expected = written_out(config, losses, batch.segment_reference.tolist())
    assert int(count) == 4
    assert float(total) / 4 == pytest.approx(expected, rel=PACKED_LOSS)
    assert (log[SUMS][:2] / 4).tolist() == pytest.approx([expected, 1.0], rel=PACKED_LOSS)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_raises_chosen_and_lowers_rejected_answers(loss: str) -> None:
    batch, losses = four_pairs()
    losses.requires_grad_()
    config = DpoConfig(loss=loss, beta=0.01)  # type: ignore[arg-type]
    total, _, _ = Preferences(config).loss(batch, losses, GlobalTerms())
    total.backward()
    signs = [sorted({math.copysign(1, g) for g in part}) for part in per_token(losses.grad)]
    assert signs == [[1.0], [-1.0]] * 4  # a smaller loss of chosen tokens is a smaller total


def test_log_probabilities_are_sums_over_the_supervised_tokens_of_each_conversation() -> None:
    batch, losses = four_pairs()
    expected = [-sum(part) for part in per_token(losses)]
    assert answer_log_probs(batch, losses).tolist() == pytest.approx(expected, rel=1e-12)


def test_batch_without_pairs_has_no_loss_but_a_gradient() -> None:
    batch = collate([], token_budget=8, pad_id=0, queries=1, patch_dim=12)
    losses = torch.empty(0, requires_grad=True)
    total, count, log = Preferences(DpoConfig(sft_weight=1.0)).loss(batch, losses, GlobalTerms(sft_factor=0.5))
    total.backward()
    assert (float(total.detach()), int(count), log[SUMS].tolist()) == (0.0, 0, [0.0] * 5)


def test_accuracy_and_rewards_are_means_over_pairs() -> None:
    batch, losses = four_pairs()
    config = DpoConfig(beta=0.5)
    objective = Preferences(config)
    _, _, log = objective.loss(batch, losses, GlobalTerms())
    rewards = (0.5 * (answer_log_probs(batch, losses) - batch.segment_reference)).view(4, 2)
    stats = objective.describe(log[SUMS].tolist())
    assert stats.preference_accuracy == float((rewards[:, 0] > rewards[:, 1]).double().mean())
    assert [stats.chosen_reward, stats.rejected_reward] == pytest.approx(rewards.mean(0).tolist())
    assert stats.reward_margin == pytest.approx(stats.chosen_reward - stats.rejected_reward)


def test_smoothing_of_one_half_prefers_neither_side() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([-1.0, 2.0])
    losses = preference_losses(chosen, rejected, DpoConfig(label_smoothing=0.5), GlobalTerms())
    assert losses[0] == losses[1]


def test_table_completes_a_batch_in_the_order_of_its_pairs_and_names_what_it_lacks(tmp_path: Path) -> None:
    batch, _ = four_pairs()
    entries = {f"p{i}": (float(i), i + 0.5) for i in range(4)}
    completed = ReferenceTable(entries, tmp_path / "x").complete(batch)
    assert completed.segment_reference.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    del entries["p2"]
    with pytest.raises(Exception, match="no log-probabilities of p2; was an image"):
        ReferenceTable(entries, tmp_path / "x").complete(batch)


def _fingerprint(experiment: Experiment) -> str:
    return fingerprint(experiment, open_rows(experiment).mark)


def test_fingerprint_changes_with_what_scores_depend_on_and_with_nothing_else(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 3)
    (tmp_path / "weights").mkdir()
    weights = tmp_path / "weights" / "model.safetensors"
    weights.write_bytes(b"1")
    experiment = pair_experiment(tmp_path, init={"checkpoint": str(tmp_path / "weights")})
    first = _fingerprint(experiment)
    same = replace(experiment, output=str(tmp_path), parallel=replace(experiment.parallel, tensor=2))
    assert _fingerprint(replace(same, optim=replace(experiment.optim, lr=1.0))) == first
    found = {first, _fingerprint(replace(experiment, data=replace(experiment.data, system_prompt="Be kind.")))}
    path.write_text(path.read_text().replace("No.", "Yes."))
    found.add(_fingerprint(experiment))
    weights.write_bytes(b"22")
    found.add(_fingerprint(experiment))
    assert len(found) == 4
