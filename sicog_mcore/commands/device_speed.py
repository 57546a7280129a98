"""How fast one device trains: median step time, tokens/s, TFLOP/s, MFU and peak memory.

In: Experiment   Out: SpeedMeasurement   Next: gpu_report.py (the verb)
Weights, pixels and text are random; image sizes are those of photographs, cut into slices as in training.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib import metadata
from itertools import cycle
from statistics import median

import torch

from sicog_mcore.config import Experiment, ModelConfig
from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample, PackedBatch
from sicog_mcore.data.collate import collate
from sicog_mcore.data.sample import Size
from sicog_mcore.data.slicing import lay_out, plan_slices

IMAGES = (Size(768, 1024), Size(480, 640), Size(1080, 810), Size(336, 336))
PROMPT_TOKENS, ANSWER_TOKENS = 32, 160
WARM_UP_STEPS, TIMED_STEPS = 3, 10
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn")
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class SpeedMeasurement:
    """Speed that one device reached; the numbers mean nothing without its name and the versions."""

    device: str
    versions: dict[str, str]
    layers: str
    attention: str
    preset: str
    precision: str
    packs: int
    token_budget: int
    pack_fill: float
    step_s: list[float]
    tokens_per_s: float
    slices_per_s: float
    tflops: float
    mfu: float | None
    peak_memory_gib: float

    def line(self) -> str:
        """Returns everything in one line."""
        mfu = "MFU unknown" if self.mfu is None else f"MFU {self.mfu:.1%}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.preset}, {self.packs} packs of {self.token_budget:,} tokens ({self.pack_fill:.0%} full),"
            f" {self.precision}: median step {median(self.step_s):.4g} s (of {len(self.step_s)}),"
            f" {self.tokens_per_s:,.0f} tokens/s, {self.slices_per_s:,.1f} slices/s, {self.tflops:.4g} TFLOP/s, {mfu},"
            f" peak {self.peak_memory_gib:.2f} GiB"
            f" | {self.device}; {versions}; layers {self.layers}, attention {self.attention}"
        )


def random_sample(model: ModelConfig, image: Size, generator: torch.Generator) -> EncodedSample:
    """A question about one image and its answer: real geometry, random content."""
    plan = plan_slices(image, model.slicing, model.tower.patch_px)
    rows = torch.from_numpy(lay_out(plan, model.resampler.query_grid, model.slicing.layout).rows)
    num_tokens = PROMPT_TOKENS + len(rows) + ANSWER_TOKENS
    tokens = torch.randint(0, model.decoder.vocab_size, (num_tokens,), generator=generator)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    labels[-ANSWER_TOKENS - 1 : -1] = tokens[-ANSWER_TOKENS:]
    grids = torch.tensor(plan.encoded)
    num_patches = int(grids.prod(-1).sum())
    shape = (num_patches, model.tower.patch_dim)
    return EncodedSample(
        id=f"{image.height}x{image.width}",
        tokens=tokens,
        labels=labels,
        patches=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        grids=grids,
        image_slots=PROMPT_TOKENS + (rows >= 0).nonzero().squeeze(1),
        visual_rows=rows[rows >= 0],
        num_images=1,
    )


def random_batch(experiment: Experiment, seed: int) -> PackedBatch:
    """Samples until the next one no longer fits the budgets."""
    model, data = experiment.model, experiment.data
    generator = torch.Generator().manual_seed(seed)
    samples: list[EncodedSample] = []
    tokens = slices = 0
    for image in cycle(IMAGES):
        sample = random_sample(model, image, generator)
        tokens, slices = tokens + len(sample.tokens), slices + len(sample.grids)
        if tokens > data.token_budget or slices > data.slice_budget:
            break
        samples.append(sample)
    return collate(
        samples,
        token_budget=data.token_budget,
        pad_id=0,
        queries=model.resampler.queries,
        patch_dim=model.tower.patch_dim,
    ).validate(model.resampler.queries)


def measure_speed(experiment: Experiment) -> SpeedMeasurement:
    """Trains on the same step again and again; the first times are thrown away."""
    from sicog_mcore.build import build_model, plan_build
    from sicog_mcore.parallel.topology import start_topology, stop_topology
    from sicog_mcore.train.flops import WorkCounts, peak_tflops, step_flops
    from sicog_mcore.train.reporter import device_name
    from sicog_mcore.train.step import NextToken, train_step

    build = plan_build(experiment)
    topology = start_topology(experiment.parallel, experiment.train.seed)
    try:
        model = build_model(build, topology)
        batches = [random_batch(experiment, seed) for seed in range(experiment.train.packs_per_step)]
        counts = sum((WorkCounts.of(batch) for batch in batches), WorkCounts())
        batches = [batch.to(topology.device) for batch in batches]
        times = []
        for _ in range(WARM_UP_STEPS + TIMED_STEPS):
            started = time.perf_counter()
            train_step(model, batches, experiment.optim.lr, NextToken())  # reads the loss, and so waits for the device
            times.append(time.perf_counter() - started)
        step_s = median(times[WARM_UP_STEPS:])
        device = device_name(topology.device)
        peak = torch.cuda.max_memory_allocated() / GIB if topology.device.type == "cuda" else 0.0
    finally:
        stop_topology()
    tflops = step_flops(experiment.model, experiment.optim.freeze, counts) / step_s / 1e12
    limit = peak_tflops(device, experiment.train)
    return SpeedMeasurement(
        device=device,
        versions=_versions(),
        layers=build.layers.name,
        attention=build.attention.name,
        preset=experiment.preset,
        precision=experiment.train.precision,
        packs=len(batches),
        token_budget=experiment.data.token_budget,
        pack_fill=counts.tokens / len(batches) / experiment.data.token_budget,
        step_s=[round(seconds, 6) for seconds in times[WARM_UP_STEPS:]],
        tokens_per_s=counts.tokens / step_s,
        slices_per_s=counts.slices / step_s,
        tflops=tflops,
        mfu=tflops / limit if limit else None,
        peak_memory_gib=peak,
    )


def _versions() -> dict[str, str]:
    installed = {distribution.name.lower() for distribution in metadata.distributions()}
    found = {name: metadata.version(name) for name in PACKAGES if name in installed}
    return {"Python": sys.version.split()[0], **found, "CUDA": str(torch.version.cuda)}
