"""Packed batches with random content and real slice geometry, for tests that need no files."""

from __future__ import annotations

import torch

from sicog_mcore.config import Experiment
from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample, PackedBatch
from sicog_mcore.data.collate import collate


def random_sample(experiment: Experiment, grids: list[tuple[int, int]], text: int, seed: int) -> EncodedSample:
    """One sample: ``text`` random tokens around the visual tokens of slices with these grids (height, width)."""
    g = torch.Generator().manual_seed(seed)
    queries, vocab = experiment.model.resampler.queries, experiment.model.decoder.vocab_size
    visual = len(grids) * queries
    tokens = torch.randint(8, vocab, (text + visual,), generator=g)
    slots = torch.arange(2, 2 + visual)
    labels = torch.cat([tokens[1:], torch.tensor([1])])
    labels[: 2 + visual + text // 3] = IGNORED_LABEL
    tokens[slots] = 0
    rows = sum(h * w for h, w in grids)
    patch_dim = experiment.model.tower.patch_dim
    return EncodedSample(
        id=f"random-{seed}",
        tokens=tokens,
        labels=labels,
        patches=torch.randint(0, 256, (rows, patch_dim), generator=g, dtype=torch.uint8),
        grids=torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
        image_slots=slots,
        visual_rows=torch.randperm(visual, generator=g),
        num_images=1 if grids else 0,
    )


SLICED = [(8, 8), (8, 8), (8, 8), (8, 8), (8, 7)]
WIDE = [(5, 12)]
TEXT_ONLY: list[tuple[int, int]] = []


def random_batches(experiment: Experiment, count: int, seed: int = 0) -> list[PackedBatch]:
    """Micro-batches of three samples each, the third without an image; the fifth is padding only, with no sample at all."""
    kinds = ([SLICED, TEXT_ONLY, WIDE], [WIDE, SLICED, SLICED], [TEXT_ONLY] * 3, [WIDE, TEXT_ONLY, TEXT_ONLY], [])
    return [
        collate(
            [
                random_sample(experiment, grids, 20 + 7 * ((i + j) % 5), seed + 10 * i + j)
                for j, grids in enumerate(kinds[i % 5])
            ],
            token_budget=experiment.data.token_budget,
            pad_id=0,
            queries=experiment.model.resampler.queries,
            patch_dim=experiment.model.tower.patch_dim,
        )
        for i in range(count)
    ]
