"""Log-probabilities of answers under the reference model: the model with the first weights of the run.

In: batches   Out: fp64 [segments] for each, one for every answer   Next: dpo.py
Precomputed, they stand in ``<output>/reference/log_probs.jsonl`` by sample id, with a fingerprint of what they depend on: no
second model is in memory, and a resumed run reads them again. A pass that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.data.resume import OpenRows
from sicog_mcore.errors import DataError
from sicog_mcore.files import append_lines, move, whole_file, writing
from sicog_mcore.model.loss import owners, supervised_rows
from sicog_mcore.parallel.ddp import TrainableModel
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.train.feed import Feed
from sicog_mcore.train.reference_key import fingerprint
from sicog_mcore.train.step import Log, run_schedule

FOLDER = "reference"
FILE = "log_probs.jsonl"
UNFINISHED = ".part"
STAMP = "fingerprint"
NOTICE_EVERY_S = 60

Entries = Mapping[str, tuple[float, float]]  # sample id to (chosen, rejected)


def answer_log_probs(batch: PackedBatch, losses: Tensor) -> Tensor:
    """Summed log-probabilities of the supervised tokens of each answer segment.

    Args:
        losses: fp32 [t_s] of the supervised positions.

    Returns:
        fp64 [segments]
    """
    segments = torch.arange(batch.num_segments, device=losses.device)
    belongs = owners(batch, supervised_rows(batch.labels)) == segments[:, None]  # [segments, t_s]
    return -(losses.double() * belongs).sum(-1)  # a scatter would add in random order on a GPU


def score_answers(chunks: Sequence[Any], model: TrainableModel, batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Log-probabilities of each batch's answers, on all ranks of the replica. Collective.

    Args:
        chunks: with the weights to ask; bare or wrapped.
        model: whose configuration and layout they have.
    """
    topology, sizes = model.topology, [batch.num_segments for batch in batches]
    logs = run_schedule(chunks, model.config, topology, batches, _log_probs, forward_only=True)
    flat = torch.zeros(sum(sizes), dtype=torch.float64, device=topology.device)
    if logs and topology.tensor_rank == 0:  # only the last stage has logs
        flat += torch.cat([log["log_probs"] for log in logs])
    return list((topology.sum_over_copy(flat) if sum(sizes) else flat).split(sizes))


def _log_probs(batch: PackedBatch, losses: Tensor) -> tuple[Tensor, Tensor, Log]:
    count = torch.tensor(batch.num_segments, dtype=torch.int, device=losses.device)
    return losses.sum(), count, {"log_probs": answer_log_probs(batch, losses)}


class FrozenReference:
    """A second copy of the model, without gradients, asked for every step's batches.

    Args:
        chunks: built like the model's.
        model: whose weights, as they are now, they get. Collective.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], model: TrainableModel):
        for chunk, source in zip(chunks, model.chunks, strict=True):
            chunk.load_state_dict(source.state_dict())
            chunk.requires_grad_(False)
        self._chunks = chunks
        self._model = model

    def complete(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches with reference log-probabilities. Collective."""
        scores = score_answers(self._chunks, self._model, batches)
        return [replace(batch, segment_reference=score) for batch, score in zip(batches, scores, strict=True)]


@dataclass(frozen=True)
class ReferenceTable:
    """Precomputed log-probabilities of all pairs."""

    entries: Entries
    path: Path

    def complete(self, batch: PackedBatch) -> PackedBatch:
        """The batch with the log-probabilities of its pairs.

        Raises:
            DataError: the file lacks a pair.
        """
        if missing := [name for name in batch.sample_ids if name not in self.entries]:
            found = f"{self.path} has no log-probabilities of {', '.join(missing[:3])}"
            raise DataError(f"{found}; was an image unreadable when it was written? Remove it to compute them again")
        values = [value for name in batch.sample_ids for value in self.entries[name]]
        return replace(batch, segment_reference=torch.tensor(values, dtype=torch.float64))


def precompute_reference(
    experiment: Experiment, model: TrainableModel, opened: OpenRows | None, notice: Callable[[str], None]
) -> ReferenceTable:
    """Asks the model, with its weights as they are now, for all pairs, unless that was done before. Collective.

    Args:
        opened: the data sets, on ranks that load.

    Returns:
        all pairs on ranks that load data, none on others.
    """
    topology, path = model.topology, Path(experiment.output) / FOLDER / FILE
    stamp = ""
    is_done = False
    if topology.is_main:
        assert opened is not None, "rank 0 loads data"
        stamp = fingerprint(experiment, opened.mark)
        is_done = _fits(path, stamp)
    stamp, is_done = topology.broadcast_object((stamp, is_done))  # type: ignore[misc]  # what was put in
    if is_done:
        notice(f"reference log-probabilities: {path} fits this run")
    else:
        notice(f"reference log-probabilities: one forward pass over all pairs, into {path}")
        _compute(experiment, model, path, stamp, opened, notice)
    return ReferenceTable(_read(path, stamp) if topology.loads_data else {}, path)


def _compute(
    experiment: Experiment,
    model: TrainableModel,
    path: Path,
    stamp: str,
    opened: OpenRows | None,
    notice: Callable[[str], None],
) -> None:
    """One pass over the first epoch of the run's own stream of batches, which holds every usable pair."""
    topology, unfinished = model.topology, path.with_suffix(UNFINISHED)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    known = dict(_read(unfinished, stamp)) if topology.loads_data else {}
    topology.gather_objects(None)  # all have read before anything is written
    if topology.is_main:
        with whole_file(unfinished) as temporary:
            append_lines(temporary, _lines(known, stamp))
    # Its own folder: pairs that are refused here will be refused, and reported, in training too.
    begun = opened.from_the_start() if opened else None
    feed = Feed(replace(experiment, output=str(path.parent)), topology, begun, first_step=1)
    num_written, told_at = len(known), time.monotonic()
    try:
        is_last = False
        while not is_last:
            batches = feed.next_step()
            ids = [name for batch in batches for name in batch.sample_ids]
            is_new = any(name not in known for name in ids)
            is_last, is_new = _anywhere(topology, feed.state().get("epoch", 0) > 0, is_new)
            if is_new:
                scores = torch.cat(score_answers(model.wrapped, model, batches)).view(-1, 2).tolist()
                mine = {name: (chosen, rejected) for name, (chosen, rejected) in zip(ids, scores, strict=False)}
                gathered = topology.gather_objects({name: pair for name, pair in mine.items() if name not in known})
                known |= mine
                if topology.is_main:
                    append_lines(unfinished, [line for part in gathered for line in _lines(part)], is_synced=True)
                num_written += sum(map(len, gathered))
                if time.monotonic() - told_at > NOTICE_EVERY_S:
                    told_at = time.monotonic()
                    notice(f"reference log-probabilities: {num_written:,} of {feed.num_rows:,} pairs")
    except DataError:
        for note in feed.notes:  # the run ends before it says them
            notice(f"data: {note}")
        raise
    finally:
        feed.close()
    if topology.is_main:
        with writing(path):
            move(unfinished, path)
    topology.gather_objects(None)  # nobody reads before that


def _anywhere(topology: Topology, *facts: bool) -> list[bool]:
    """Whether each fact holds on any rank."""
    found = topology.sum_over_world(torch.tensor(facts, dtype=torch.int64, device=topology.device))
    return [count > 0 for count in found.tolist()]


def _lines(entries: Entries, stamp: str = "") -> Iterable[str]:
    """The entries as they stand in the file; with a stamp, as the whole file."""
    if stamp:
        yield json.dumps({STAMP: stamp})
    for name, (chosen, rejected) in entries.items():
        yield json.dumps({"id": name, "chosen": chosen, "rejected": rejected})


def _fits(path: Path, stamp: str) -> bool:
    """Whether there is a file that belongs to these data and weights."""
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as file:
        return file.readline() == json.dumps({STAMP: stamp}) + "\n"


def _read(path: Path, stamp: str) -> dict[str, tuple[float, float]]:
    """Reads the entries of a file that fits; of any other none. A torn last line is left out."""
    entries: dict[str, tuple[float, float]] = {}
    if not _fits(path, stamp):
        return entries
    with path.open(encoding="utf-8") as file:
        next(file)
        for line in file:
            if line.endswith("\n"):
                entry = json.loads(line)
                entries[entry["id"]] = (entry["chosen"], entry["rejected"])
    return entries
