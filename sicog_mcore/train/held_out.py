"""How well a checkpoint predicts given answers: the loss of training, forward only, per sample.

In: an Experiment whose ``init`` names the weights, its rows   Out: per sample the loss and the tokens it was taken over
Next: held_out_check.py (during training), launch/perplexity.py
Packing, forward pass and loss are the trainer's own, under any tensor and pipeline layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sicog_mcore.build import build_chunks, plan_build
from sicog_mcore.checkpoint.weights import import_init
from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.measure_rows import measure_rows
from sicog_mcore.data.packing import PackBudgets
from sicog_mcore.data.plan import PackPlan, make_packs
from sicog_mcore.data.quarantine import Rejection
from sicog_mcore.data.resume import EpochRows
from sicog_mcore.data.row_sizes import USABLE
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.data.tokenizer_files import tokenizer_notes
from sicog_mcore.data.workers import PackBuilder
from sicog_mcore.errors import ConfigError
from sicog_mcore.model.loss import owners, supervised_rows
from sicog_mcore.parallel.distribute import BatchDistributor, BatchSpec
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.train.step import Log, run_schedule

PACKS_AT_ONCE = 8  # micro-batches of one pass through the pipeline
SUMS = "segment_sums"


@dataclass(frozen=True)
class SampleLoss:
    """The loss that one sample has.

    Attributes:
        loss_sum: cross entropy summed over the tokens of its answers, in nats.
        tokens: supervised ones, the end of each answer among them.
    """

    id: str
    loss_sum: float
    tokens: int


@dataclass(frozen=True)
class Losses:
    """All rows: measured, or refused with a reason; both by id. ``notes`` say what of files and rows is not used."""

    samples: tuple[SampleLoss, ...]
    refused: tuple[Rejection, ...]
    notes: tuple[str, ...] = ()


def segment_sums(batch: PackedBatch, losses: Tensor) -> Tensor:
    """Loss and number of supervised tokens of each segment of a batch, padding included.

    Args:
        losses: fp32 [t_s] of the supervised positions.

    Returns:
        fp64 [2, n]
    """
    segments = torch.arange(len(batch.cu_seqlens) - 1, device=losses.device)
    belongs = owners(batch, supervised_rows(batch.labels)) == segments[:, None]  # [n, t_s]
    return torch.stack([(losses.double() * belongs).sum(-1), belongs.double().sum(-1)])


def measure_losses(experiment: Experiment, topology: Topology) -> Losses:
    """Asks the model that ``experiment.init`` names for every row, each exactly once. Collective; equal on all ranks.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: the rows cannot be opened.
    """
    build = plan_build(experiment)
    chunks = build_chunks(build, topology)
    said = import_init(chunks, experiment, topology)
    said += tokenizer_notes(experiment.data) if topology.is_main else []
    rows = HeldOutRows(experiment, topology)
    losses = rows.measure(chunks, build.decoder)
    return replace(losses, notes=(*said, *(f"data: {note}" for note in rows.notes)))


class HeldOutRows:
    """The rows of ``experiment.data.sources``, opened and packed once, to be measured as often as is wanted. Collective.

    Attributes:
        notes: what is to be said of the data; nothing on ranks that do not load.
        refused: rows that planning found unusable, on all ranks.
        packs: of all replicas.
    """

    def __init__(self, experiment: Experiment, topology: Topology):
        """Opens the rows on ranks that load; rank 0 reads texts and image headers for all.

        Raises:
            ConfigError: they cannot be opened. On all ranks.
        """
        self._topology, self._spec = topology, BatchSpec.of(experiment)
        samples = _open_on_loaders(experiment, topology)
        encoder = Encoder(experiment.model, experiment.data)
        self._builder: PackBuilder | None = None
        self.notes: tuple[str, ...] = ()
        if samples is not None:
            self.notes = samples.notes
            self._builder = PackBuilder(EpochRows(samples), encoder, experiment.model, experiment.data)
        plan: Any = _plan(experiment, samples, encoder) if samples is not None and topology.is_main else None
        plan = topology.broadcast_object(plan)
        self.packs: list[PackPlan] = plan[0]
        self.refused: list[Rejection] = plan[1]
        mine = self.packs[topology.data_rank :: topology.data_size]
        # The interleaved schedule takes micro-batches in groups of as many as there are stages.
        group = topology.config.pipeline if topology.config.virtual_pipeline > 1 else 1
        self._mine = [*mine, *(replace(self.packs[0], members=()) for _ in range(-len(mine) % group))]
        self._at_once = -(-PACKS_AT_ONCE // group) * group

    def measure(self, chunks: Sequence[Any], config: Any) -> Losses:
        """Asks a model for every row, each exactly once. Collective; equal on all ranks.

        Args:
            chunks: of this rank, bare.
            config: TransformerConfig of the chunks.
        """
        topology, mine = self._topology, self._mine
        source = PackSource(self._builder, mine) if self._builder else None
        distributor = BatchDistributor(topology, self._spec, source)
        sums: list[Tensor] = []
        for start in range(0, len(mine), self._at_once):
            batches = [next(distributor) for _ in mine[start : start + self._at_once]]
            sums += _ask(chunks, config, topology, batches)
        measured = [
            SampleLoss(name, loss, int(tokens))
            for ids, batch_sums in zip(source.ids if source else (), sums, strict=False)
            for name, loss, tokens in zip(ids, *batch_sums.tolist(), strict=False)  # the padded tail has no id
        ]
        parts = topology.gather_objects((measured, source.refused if source else []))
        samples = sorted((sample for part, _ in parts for sample in part), key=lambda sample: sample.id)
        refused = [*self.refused, *(rejection for _, part in parts for rejection in part)]
        return Losses(tuple(samples), tuple(sorted(refused, key=lambda rejection: rejection.id)))


class PackSource:
    """The packs of one replica, decoded one after the other.

    Attributes:
        ids: sample ids of each pack that was handed out.
        refused: samples of these packs whose pixels turned out to be unusable.
    """

    ends_step = True

    def __init__(self, builder: PackBuilder, packs: Sequence[PackPlan]):
        self.ids: list[tuple[str, ...]] = []
        self.refused: list[Rejection] = []
        self._packs = iter(packs)
        self._builder = builder

    def __next__(self) -> PackedBatch:
        batch, refused = self._builder.build(next(self._packs))
        self.ids.append(batch.sample_ids)
        self.refused += refused
        return batch


def _open_on_loaders(experiment: Experiment, topology: Topology) -> SampleIndex | None:
    """The rows on ranks that load, None on others; all ranks fail together."""
    samples, failure = None, None
    if topology.loads_data:
        try:
            samples = open_sources(experiment.data.sources, experiment.data)
        except ConfigError as error:
            failure = error.problems
    for problems in topology.gather_objects(failure):
        if problems is not None:
            raise ConfigError(problems)
    return samples


def _plan(experiment: Experiment, samples: SampleIndex, encoder: Encoder) -> tuple[list[PackPlan], list[Rejection]]:
    """All packs, and the rows that cannot be used."""
    sizes, refused = measure_rows(samples, encoder)
    budgets = PackBudgets(experiment.data.token_budget, experiment.data.slice_budget)
    packs = make_packs(sizes, np.flatnonzero(sizes.reason == USABLE), budgets, (experiment.train.seed, 0, 0))
    return list(packs), refused


def _ask(chunks: Sequence[Any], config: Any, topology: Topology, batches: Sequence[PackedBatch]) -> list[Tensor]:
    """fp64 [2, n] of each batch, on all ranks of the replica."""
    sizes = [len(batch.cu_seqlens) - 1 for batch in batches]
    logs = run_schedule(chunks, config, topology, batches, _log_sums, forward_only=True)
    flat = torch.zeros(2, sum(sizes), dtype=torch.float64, device=topology.device)
    if logs and topology.tensor_rank == 0:  # only the last stage has logs
        flat += torch.cat([log[SUMS] for log in logs], dim=1)
    return list(topology.sum_over_copy(flat).cpu().split(sizes, dim=1))


def _log_sums(batch: PackedBatch, losses: Tensor) -> tuple[Tensor, Tensor, Log]:
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return losses.sum(), count, {SUMS: segment_sums(batch, losses)}
