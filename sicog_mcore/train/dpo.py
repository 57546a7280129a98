"""Preference losses over pairs of answers: sigmoid (DPO), hinge, IPO, and KTO's for pairs.

In: losses of supervised positions, reference log-probabilities   Out: (sum over pairs, pairs)   Next: step.py
A pair is a group of two answer segments, first the chosen one. Its log-ratios are log p(answer) of the model minus the same
of the reference model (reference.py), summed over tokens.
The loss of a step is the mean over the pairs of the global batch, plus ``sft_weight`` times the mean cross entropy over the
tokens of all chosen answers of the global batch: both are exact for any packing and any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sicog_mcore.config import DpoConfig
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.model.loss import owners, supervised_rows
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.train.metrics import PreferenceStats
from sicog_mcore.train.reference import FrozenReference, answer_log_probs
from sicog_mcore.train.step import SUMS, Log, LossFunction, run_schedule, sum_logs


@dataclass(frozen=True)
class GlobalTerms:
    """Terms of the whole global batch that the loss of one pair depends on.

    Attributes:
        sft_factor: on the summed cross entropy of chosen answers, so that dividing by pairs makes it a mean over tokens.
        chosen_drift: how far the model left the reference on chosen answers, an estimate of their divergence (KTO's z).
        rejected_drift: the same on rejected answers.
    """

    sft_factor: float = 0.0
    chosen_drift: float = 0.0
    rejected_drift: float = 0.0


def preference_losses(chosen: Tensor, rejected: Tensor, config: DpoConfig, terms: GlobalTerms) -> Tensor:
    """Loss of each pair.

    Args:
        chosen: [pairs] log-ratios of chosen answers.
        rejected: [pairs] log-ratios of rejected answers.
        config: form of the loss, beta, label smoothing.
        terms: KTO measures an answer against the drift on the other side's answers, through which no gradient flows.

    Returns:
        [pairs]
    """
    beta, smoothing = config.beta, config.label_smoothing
    margin = chosen - rejected
    if config.loss == "sigmoid":
        return -(1 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)
    if config.loss == "hinge":
        return F.relu(1 - beta * margin)
    if config.loss == "ipo":
        return (margin - 1 / (2 * beta)).square()
    chosen_value = torch.sigmoid(beta * (chosen - terms.rejected_drift))
    rejected_value = torch.sigmoid(beta * (terms.chosen_drift - rejected))
    return 1 - (chosen_value + rejected_value) / 2


@dataclass(frozen=True)
class Preferences:
    """The objective of preference training.

    Args:
        config: the loss.
        frozen: a copy of the model to ask for reference log-probabilities; None where the batches bring them.
    """

    config: DpoConfig
    frozen: FrozenReference | None = None
    num_sums = 5  # loss, pairs, pairs judged rightly, chosen rewards, rejected rewards

    def prepare(self, model: TrainableModel, batches: Sequence[PackedBatch]) -> tuple[list[PackedBatch], LossFunction]:
        require_pairs(batches)
        complete = self.frozen.complete(batches) if self.frozen else list(batches)
        drifts = self._drifts(model, complete) if self.config.loss == "kto_pair" else (0.0, 0.0)
        return complete, partial(self.loss, terms=GlobalTerms(self._sft_factor(model.topology, complete), *drifts))

    def loss(self, batch: PackedBatch, losses: Tensor, terms: GlobalTerms) -> tuple[Tensor, Tensor, Log]:
        """Sum over the pairs of a batch, and their number."""
        log_probs = answer_log_probs(batch, losses)  # [segments]
        chosen, rejected = _log_ratios(batch, log_probs)
        total = preference_losses(chosen, rejected, self.config, terms).sum() - terms.sft_factor * log_probs[::2].sum()
        count = torch.tensor(len(batch.group_sizes), dtype=torch.int, device=losses.device)
        rewards = [self.config.beta * ratios.detach().sum() for ratios in (chosen, rejected)]
        sums = torch.stack([total.detach(), count.double(), (chosen > rejected).double().sum(), *rewards])
        return total.float(), count, {SUMS: sums}

    def total_weight(self, sums: Sequence[float]) -> float:
        return sums[1]

    def describe(self, sums: Sequence[float]) -> PreferenceStats:
        """Accuracy and mean rewards over the pairs of the global batch."""
        _, pairs, right, chosen, rejected = sums
        return PreferenceStats(
            preference_accuracy=right / pairs,
            reward_margin=(chosen - rejected) / pairs,
            chosen_reward=chosen / pairs,
            rejected_reward=rejected / pairs,
        )

    def _sft_factor(self, topology: Topology, batches: Sequence[PackedBatch]) -> float:
        if self.config.sft_weight == 0:
            return 0.0
        counts = torch.zeros(2, dtype=torch.float64, device=topology.device)
        if topology.loads_data:  # all ranks of a replica have the same batches
            for batch in batches:
                of_chosen = owners(batch, supervised_rows(batch.labels)) % 2 == 0
                counts += torch.tensor([len(batch.group_sizes), int(of_chosen.sum())]).to(counts)
        pairs, tokens = topology.sum_over_world(counts).tolist()
        return self.config.sft_weight * pairs / tokens if tokens else 0.0

    def _drifts(self, model: TrainableModel, batches: Sequence[PackedBatch]) -> tuple[float, float]:
        """Mean log-ratios over the global batch, at least 0; costs one forward pass, as they are needed by every pair."""
        logs = run_schedule(model.wrapped, model.config, model.topology, batches, _ratio_sums, forward_only=True)
        pairs, chosen, rejected = sum_logs(model.topology, logs, 3)
        return (max(0.0, chosen / pairs), max(0.0, rejected / pairs)) if pairs else (0.0, 0.0)


def require_pairs(batches: Sequence[PackedBatch]) -> None:
    """Makes sure that every group is a pair whose answers count the same.

    Raises:
        ValueError: a group has another number of answers than two, or an answer has a weight.
    """
    for batch in batches:
        sizes = batch.group_sizes.tolist()
        if any(size != 2 for size in sizes):
            found = f"samples {list(batch.sample_ids)} have {sizes} answers"
            raise ValueError(
                f"{found}, expected 2 each, a chosen and a rejected one; train on them with another objective"
            )
        if batch.is_weighted:
            found = f"samples {list(batch.sample_ids)} have weights {batch.segment_weights.tolist()}"
            raise ValueError(f"{found}, expected none: every pair counts the same; remove the weights")


def _log_ratios(batch: PackedBatch, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """[pairs] of chosen and of rejected answers."""
    ratios = log_probs - batch.segment_reference
    return ratios[::2], ratios[1::2]


def _ratio_sums(batch: PackedBatch, losses: Tensor) -> tuple[Tensor, Tensor, Log]:
    chosen, rejected = _log_ratios(batch, answer_log_probs(batch, losses))
    count = torch.tensor(len(batch.group_sizes), dtype=torch.int, device=losses.device)
    return losses.sum(), count, {SUMS: torch.stack([count.double(), chosen.sum(), rejected.sum()])}
