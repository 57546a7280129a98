"""Finds configurations that cannot work, by arithmetic, before torch is imported or a process group starts.

In: an Experiment and the number of ranks.  Out: every problem at once, each with path, value and remedy.  Next: cli.py.
A rule is skipped where an earlier one already reported the number it would divide by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any, get_args

from sicog_mcore.config import (
    DataConfig,
    DpoConfig,
    Experiment,
    HeldOutConfig,
    ModelConfig,
    ModelPart,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from sicog_mcore.errors import ConfigProblem
from sicog_mcore.sizes import most_visual_tokens, padded_vocab

TEXT_ROOM = 32  # tokens beside the largest image: the template's own and a short answer

AT_LEAST_ONE = (
    *("model.slicing.resolution_px", "model.slicing.max_slices"),
    *("model.tower.image_px", "model.tower.patch_px", "model.tower.num_layers", "model.tower.hidden"),
    *("model.tower.num_heads", "model.tower.ffn", "model.resampler.query_grid", "model.resampler.num_heads"),
    *("model.decoder.num_layers", "model.decoder.hidden", "model.decoder.num_heads", "model.decoder.num_kv_heads"),
    *("model.decoder.head_dim", "model.decoder.ffn", "model.decoder.vocab_size", "model.decoder.rope_base"),
    *("model.decoder.rope_scaling_factor", "data.token_budget", "data.slice_budget", "data.window_samples"),
    *("data.worker_timeout_s", "data.max_image_px", "data.max_aspect", "data.bad_window"),
    "data.index_limit_s",
    *("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.timeout_s"),
    *("train.steps", "train.packs_per_step", "train.log_every", "checkpoint.every_steps", "checkpoint.keep_last"),
    *("held_out.max_new_tokens", "held_out.batch"),
)
AT_LEAST_ZERO = (
    *("data.workers", "optim.tower_lr_scale", "optim.resampler_lr_scale", "optim.decoder_lr_scale"),
    *("optim.weight_decay", "optim.clip_grad_norm", "train.seed", "train.peak_tflops"),
    *("train.samples_per_step", "train.tokens_per_step", "train.recompute_layers", "dpo.sft_weight"),
    "held_out.every_steps",
)
ABOVE_ZERO = (
    "model.tower.norm_eps",
    "model.resampler.norm_eps",
    "model.decoder.norm_eps",
    "optim.lr",
    "optim.eps",
    "dpo.beta",
)
FRACTIONS = ("data.max_bad_rate", "optim.min_lr_fraction", "optim.warmup_fraction", "dpo.label_smoothing")
BELOW_ONE = ("optim.beta1", "optim.beta2")

RULE_PATHS: Mapping[str, tuple[str, ...]] = {
    "at least 1": AT_LEAST_ONE,
    "at least 0": AT_LEAST_ZERO,
    "above 0": ABOVE_ZERO,
    "from 0 to 1": FRACTIONS,
    "from 0 to below 1": BELOW_ONE,
}


def find_problems(experiment: Experiment, world_size: int) -> list[ConfigProblem]:
    """Lists all values of a configuration that cannot work on ``world_size`` ranks; nothing on disk is looked at."""
    model, data, parallel = experiment.model, experiment.data, experiment.parallel
    # Rules on ranks divide by the sizes of the layout, so they wait until the layout itself is sound.
    layout = [*_tensor_parallel(model, data, parallel), *_pipeline(model, parallel)]
    return [
        *_ranges(experiment),
        *_vision(model),
        *_decoder(model),
        *_budgets(model, data),
        *_global_batch(experiment.train, data),
        *_recompute(experiment.train, model, parallel),
        *layout,
        *(() if layout else _ranks(experiment, world_size)),
        *_optimiser(experiment.optim, parallel),
        *_preferences(experiment),
        *_held_out(experiment.held_out, parallel),
    ]


def _ranges(experiment: Experiment) -> Iterator[ConfigProblem]:
    allowed = {
        "at least 1": lambda number: number >= 1,
        "at least 0": lambda number: number >= 0,
        "above 0": lambda number: number > 0,
        "from 0 to 1": lambda number: 0 <= number <= 1,
        "from 0 to below 1": lambda number: 0 <= number < 1,
    }
    for rule, paths in RULE_PATHS.items():
        for path in paths:
            number: Any = reduce(getattr, path.split("."), experiment)
            # A chain that is negated as a whole: NaN fails it, and would slip through a test of the opposite.
            if not (-math.inf < number < math.inf and allowed[rule](number)):
                yield ConfigProblem(path, number, "out of range", f"use a finite number {rule}")


def _vision(model: ModelConfig) -> Iterator[ConfigProblem]:
    slicing, tower, resampler, width = model.slicing, model.tower, model.resampler, model.decoder.hidden
    for path, pixels in (
        ("model.tower.image_px", tower.image_px),
        ("model.slicing.resolution_px", slicing.resolution_px),
    ):
        if not _divides(tower.patch_px, pixels):
            yield ConfigProblem(
                path, pixels, f"not whole patches of {tower.patch_px} px", _multiple(tower.patch_px, pixels)
            )
    if not _divides(tower.num_heads, tower.hidden):
        problem = f"{tower.num_heads} heads do not divide hidden={tower.hidden}"
        yield ConfigProblem("model.tower.num_heads", tower.num_heads, problem, _use(_divisors(tower.hidden)))
    if not -tower.num_layers <= tower.feature_layer <= -1:
        problem = f"no such hidden state of {tower.num_layers} layers, counted from the end"
        yield ConfigProblem("model.tower.feature_layer", tower.feature_layer, problem, f"use {-tower.num_layers} to -1")
    if not _divides(resampler.num_heads, width):
        problem = f"{resampler.num_heads} heads do not divide the decoder's hidden={width}"
        yield ConfigProblem("model.resampler.num_heads", resampler.num_heads, problem, _use(_divisors(width)))
    if not _divides(4, width):
        problem = "the resampler's sine and cosine positions for rows and columns need a multiple of 4"
        yield ConfigProblem("model.decoder.hidden", width, problem, _multiple(4, width))


def _decoder(model: ModelConfig) -> Iterator[ConfigProblem]:
    decoder = model.decoder
    if not _divides(2, decoder.head_dim):
        problem = "rotary positions turn pairs of channels, so it must be even"
        yield ConfigProblem("model.decoder.head_dim", decoder.head_dim, problem, _multiple(2, decoder.head_dim))
    if not _divides(decoder.num_kv_heads, decoder.num_heads):
        problem = f"{decoder.num_kv_heads} key/value heads do not divide {decoder.num_heads} query heads"
        fix = _use(_divisors(decoder.num_heads))
        yield ConfigProblem("model.decoder.num_kv_heads", decoder.num_kv_heads, problem, fix)


def _budgets(model: ModelConfig, data: DataConfig) -> Iterator[ConfigProblem]:
    most = model.slicing.max_slices
    if most < 1 or model.resampler.query_grid < 1:
        return
    # The largest image must fit a pack with some text, or rows with such images would be refused one by one later.
    tokens = most_visual_tokens(model.slicing, model.resampler) + TEXT_ROOM
    if data.token_budget < tokens:
        problem = f"an image of up to {most} slices and {TEXT_ROOM} tokens of text need {tokens} tokens"
        fix = f"use at least {tokens}, or lower model.slicing.max_slices"
        yield ConfigProblem("data.token_budget", data.token_budget, problem, fix)
    slices = most + 1 if most > 1 else 1
    if data.slice_budget < slices:
        problem = f"one image can take {slices} slices, the overview included"
        fix = f"use at least {slices}, or lower model.slicing.max_slices"
        yield ConfigProblem("data.slice_budget", data.slice_budget, problem, fix)


def _global_batch(train: TrainConfig, data: DataConfig) -> Iterator[ConfigProblem]:
    if train.samples_per_step and train.tokens_per_step:
        problem = f"the global batch is given twice, also as train.samples_per_step={train.samples_per_step}"
        yield ConfigProblem(
            "train.tokens_per_step", train.tokens_per_step, problem, "give one of them, 0 for the other"
        )
    if train.tokens_per_step and not _divides(data.token_budget, train.tokens_per_step):
        problem = f"is no whole number of packs of {data.token_budget} tokens"
        fix = _multiple(data.token_budget, train.tokens_per_step)
        yield ConfigProblem("train.tokens_per_step", train.tokens_per_step, problem, fix)


def _recompute(train: TrainConfig, model: ModelConfig, parallel: ParallelConfig) -> Iterator[ConfigProblem]:
    layers = model.decoder.num_layers // max(1, parallel.pipeline * parallel.virtual_pipeline)  # of a model chunk
    count, path = train.recompute_layers, "train.recompute_layers"
    if train.recompute_decoder == "block" and not 1 <= count <= max(1, layers):
        problem = f"a model chunk has {layers} decoder layers, of which block recomputes this many"
        yield ConfigProblem(path, count, problem, f"use 1 to {max(1, layers)}")
    elif train.recompute_decoder != "block" and count > 0:
        problem = f"would be ignored: train.recompute_decoder is {train.recompute_decoder!r}"
        yield ConfigProblem(path, count, problem, "set train.recompute_decoder=block, or this to 0")


def _tensor_parallel(model: ModelConfig, data: DataConfig, parallel: ParallelConfig) -> Iterator[ConfigProblem]:
    decoder, tensor = model.decoder, parallel.tensor
    shared = [
        (decoder.num_heads, f"{decoder.num_heads} attention heads"),
        (decoder.num_kv_heads, f"{decoder.num_kv_heads} key/value heads"),
        (decoder.ffn, f"the feed-forward width {decoder.ffn}"),
        (padded_vocab(decoder), f"the padded vocabulary of {padded_vocab(decoder)} rows"),
    ]
    if parallel.sequence:
        shared.append((data.token_budget, f"the token budget of {data.token_budget}, split by sequence parallelism"))
    # A number that divides the greatest common divisor divides every size; these are the ones to offer.
    choices = _divisors(math.gcd(*(size for size, _ in shared)))
    if uneven := [words for size, words in shared if not _divides(tensor, size)]:
        problem = f"tensor={tensor} does not divide {', '.join(uneven)}"
        yield ConfigProblem("parallel.tensor", tensor, problem, _use(choices))
    if parallel.sequence and tensor == 1:
        fix = "set parallel.sequence=false, or parallel.tensor to 2 or more"
        yield ConfigProblem("parallel.sequence", True, "there are no tensor-parallel ranks to split over", fix)


def _pipeline(model: ModelConfig, parallel: ParallelConfig) -> Iterator[ConfigProblem]:
    layers, stages, chunks = model.decoder.num_layers, parallel.pipeline, parallel.virtual_pipeline
    if not _divides(stages, layers):
        problem = f"{layers} decoder layers cannot be shared equally by {stages} stages"
        yield ConfigProblem("parallel.pipeline", stages, problem, _use(_divisors(layers)))
    elif chunks > 1 and not _divides(stages * chunks, layers):
        problem = f"{layers} decoder layers cannot be shared equally by {stages} stages of {chunks} chunks"
        fix = _use(_divisors(layers // stages))
        yield ConfigProblem("parallel.virtual_pipeline", chunks, problem, fix)
    if chunks > 1 and stages == 1:
        fix = "set parallel.virtual_pipeline=1, or parallel.pipeline to 2 or more"
        yield ConfigProblem("parallel.virtual_pipeline", chunks, "an interleaved schedule needs several stages", fix)


def _ranks(experiment: Experiment, world_size: int) -> Iterator[ConfigProblem]:
    parallel, packs = experiment.parallel, experiment.packs_per_step
    size, stages = parallel.model_size, parallel.pipeline
    if parallel.tensor < 1 or stages < 1 or packs < 0:
        return
    if not _divides(size, world_size):
        problem = (
            f"{world_size} ranks cannot hold whole copies of tensor {parallel.tensor} x pipeline {stages} = {size}"
        )
        counts = _words(range(size, 3 * size + 1, size))
        fix = f"start with torchrun --nproc-per-node {counts} (a multiple of {size}), or choose a smaller layout"
        yield ConfigProblem("parallel.tensor", parallel.tensor, problem, fix)
        return
    replicas = world_size // size
    if not _divides(replicas, packs):
        problem = f"{packs} packs cannot be shared equally by {replicas} data-parallel replicas"
        yield ConfigProblem("train.packs_per_step", packs, problem, _multiple(replicas, packs))
    # The interleaved schedule takes micro-batches in groups of as many as there are stages.
    elif parallel.virtual_pipeline > 1 and not _divides(stages, packs // replicas):
        problem = f"{packs // replicas} packs per replica are not a multiple of {stages} stages (interleaved schedule)"
        yield ConfigProblem("train.packs_per_step", packs, problem, _multiple(replicas * stages, packs))


def _optimiser(optim: OptimConfig, parallel: ParallelConfig) -> Iterator[ConfigProblem]:
    if set(optim.freeze) == set(get_args(ModelPart)):
        fix = "leave at least one part out"
        yield ConfigProblem("optim.freeze", list(optim.freeze), "nothing is left to train", fix)
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        fix = "set parallel.overlap_grad_reduce=true as well"
        yield ConfigProblem("parallel.overlap_param_gather", True, "needs the overlapped gradient reduction", fix)


def _preferences(experiment: Experiment) -> Iterator[ConfigProblem]:
    dpo, usual = experiment.dpo, DpoConfig()
    if experiment.objective != "dpo":
        for name, value in vars(dpo).items():
            if value != vars(usual)[name]:
                fix = "start sicog dpo (launch/train_dpo.py), set objective=dpo, or leave it out"
                yield ConfigProblem(f"dpo.{name}", value, f"would be ignored: objective is {experiment.objective}", fix)
    elif dpo.label_smoothing > 0 and dpo.loss != "sigmoid":
        problem = f"would be ignored: the {dpo.loss} loss has no label smoothing"
        yield ConfigProblem("dpo.label_smoothing", dpo.label_smoothing, problem, "set dpo.loss=sigmoid, or this to 0")


def _held_out(held_out: HeldOutConfig, parallel: ParallelConfig) -> Iterator[ConfigProblem]:
    if held_out.every_steps > 0 and not (held_out.sources or held_out.benchmark):
        fix = "name held_out.sources, held_out.benchmark or both, or set it to 0"
        yield ConfigProblem("held_out.every_steps", held_out.every_steps, "there is nothing to measure", fix)
    if held_out.every_steps > 0 and held_out.benchmark:
        fix = "leave the benchmark out, or set {}; held_out.sources are measured under every layout"
        if parallel.pipeline > 1:
            problem = f"a model of {parallel.pipeline} pipeline stages does not answer questions"
            yield ConfigProblem("held_out.benchmark", held_out.benchmark, problem, fix.format("parallel.pipeline=1"))
        elif parallel.sequence:
            problem = "a sequence-parallel model does not answer questions, whose tokens come one by one"
            yield ConfigProblem(
                "held_out.benchmark", held_out.benchmark, problem, fix.format("parallel.sequence=false")
            )


def _divides(divisor: int, number: int) -> bool:
    """Tells whether the quotient is whole; also true where a number below 1 was already reported as out of range."""
    return divisor < 1 or number < 1 or number % divisor == 0


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, 1024) + 1) if number % divisor == 0]


def _use(choices: Iterable[int]) -> str:
    return f"use {_words(choices)}"


def _multiple(of: int, near: int) -> str:
    """Names the multiples on both sides of a number."""
    below = near // of * of
    return f"use a multiple of {of}, e.g. {_words(size for size in (below, below + of) if size > 0)}"


def _words(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
