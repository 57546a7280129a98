"""Every knob of a run, as frozen dataclasses: the only truth about a configuration.

Standard library only, so that a configuration is read and checked in milliseconds, before torch is imported.
cli.py fills these classes from YAML and dotted overrides; validation.py says what cannot work; presets.py holds known sizes.
Derived values are properties, never optional fields. Units stand in the field's name or its description.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

PATCH_CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class SlicingConfig:
    """LLaVA-UHD slicing and the order of visual tokens in the text (SICOG's layout is "stitched").

    Args:
        resolution_px: side of the square whose area bounds every slice (pixels).
        max_slices: largest number of slices of an image, the overview not counted.
        layout: "stitched" puts all slices into one raster map with a separator after each row, overview last;
            "per_slice" writes each slice's tokens followed by its own separator, overview last.
        overview_only: encode the overview alone, as SICOG's alignment stage does.
        separators: "real" uses the tokenizer's newline and comma; "legacy" the ids 13 and 29892 of released SICOG weights.
    """

    resolution_px: int = 336
    max_slices: int = 7
    layout: Literal["stitched", "per_slice"] = "stitched"
    separators: Literal["real", "legacy"] = "real"
    overview_only: bool = False


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """CLIP vision transformer, patch rows in, features of one hidden layer out.

    Args:
        image_px: side of the square image the position table was made for (pixels).
        patch_px: side of a patch (pixels).
        num_layers: layers of the source checkpoint.
        feature_layer: hidden state that is used; -2 is the output of the last but one layer. Unused layers are not built.
        hidden: width c.
        num_heads: attention heads.
        ffn: width of the feed-forward layer.
        norm_eps: epsilon of the layer norms.
    """

    image_px: int = 336
    patch_px: int = 14
    num_layers: int = 24
    feature_layer: int = -2
    hidden: int = 1024
    num_heads: int = 16
    ffn: int = 4096
    norm_eps: float = 1e-5

    @property
    def layers_used(self) -> int:
        return self.num_layers + 1 + self.feature_layer

    @property
    def grid(self) -> int:
        """Side of the position table, in patches."""
        return self.image_px // self.patch_px

    @property
    def patch_dim(self) -> int:
        return PATCH_CHANNELS * self.patch_px**2


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Window resampler: every query attends to its own window of the feature map.

    Args:
        query_grid: queries per side of a slice; the square of it is the number of visual tokens per slice.
        num_heads: attention heads over the decoder's hidden size.
        norm_eps: epsilon of the layer norms.
        train_positions: train the position table, as the released weights did, or keep it fixed.
    """

    query_grid: int = 12
    num_heads: int = 28
    norm_eps: float = 1e-6
    train_positions: bool = True

    @property
    def queries(self) -> int:
        return self.query_grid**2


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Decoder-only language model: RMSNorm, SwiGLU, grouped-query attention, rotary positions.

    Args:
        num_layers: transformer layers.
        hidden: width h.
        num_heads: query heads n.
        num_kv_heads: key/value heads g.
        head_dim: width d of a head.
        ffn: width of the gated feed-forward layer.
        vocab_size: rows of the embedding table (tokens); the tokenizer must not need more.
        rope_base: base of the rotary frequencies.
        rope_scaling_factor: Llama-3.1 frequency scaling; 1 turns it off.
        qkv_bias: biases on query, key and value (Qwen2).
        qk_norm: RMS norm of every query and key head (Qwen3).
        tie_embeddings: one table for input and output.
        norm_eps: epsilon of the RMS norms.
        mcore: further fields of Megatron's TransformerConfig that change how the decoder is computed, not what it computes;
            model/mcore_options.py lists them.
    """

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    rope_base: int = 1_000_000
    rope_scaling_factor: float = 1.0
    qkv_bias: bool = True
    qk_norm: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    mcore: dict[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole multimodal model.

    Args:
        slicing: how images are cut and written into the text.
        tower: vision transformer.
        resampler: features to visual tokens.
        decoder: language model.
    """

    slicing: SlicingConfig
    tower: TowerConfig
    resampler: ResamplerConfig
    decoder: DecoderConfig


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set.

    Args:
        path: a .json or .jsonl file in LLaVA format, or a WebDataset .tar shard (or a folder of shards).
        images: folder that the rows' image paths are relative to; nothing outside it is read. Unused for shards.
    """

    path: str
    images: str = "."


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows to packed batches.

    Args:
        sources: data sets, read as one.
        tokenizer: a Hugging Face tokenizer.json, a SentencePiece .model, or the folder of one.
        template: chat template.
        system_prompt: system turn of samples that bring none; empty for no system turn.
        token_budget: length of a packed sequence (tokens, visual tokens included).
        slice_budget: most slices in a packed sequence, overviews included.
        window_samples: rows of the shuffle buffer. An epoch shuffles runs of neighbouring rows (at most a sixteenth of this
            long, and of one file or block of a file), gathers so many rows, shuffles them and packs them together; with
            ``train.samples_per_step`` the rows of each step are packed together instead.
        workers: processes that decode and slice images, per data-parallel rank; 0 decodes in the main process.
        worker_timeout_s: seconds without a batch after which the run stops instead of waiting for ever.
        too_long: samples over the token budget are quarantined, or lose the end of their last answer.
        duplicate_ids: a repeated id is quarantined, or kept under the id "<id>#<row>".
        max_image_px: largest image (pixels, height times width), judged by the header before decoding.
        max_aspect: largest ratio of the longer to the shorter side.
        max_bad_rate: largest share of bad rows, a row counting once in a pass over the data. The run stops as soon as
            more rows of a pass are bad than the whole set may have; and, where the set has more than ``bad_window``
            rows, as soon as at least 10 of the last ``bad_window`` are bad and their share is above the limit by
            more than five standard deviations.
        bad_window: rows over which the running share of bad rows of a large set is taken.
        on_change: what a resumed run does if rows or settings that its place in the data depends on are not those of
            the checkpoint: "refuse" stops with what changed; "restart_epoch" says so, skips the rest of the epoch and
            starts the data anew at the next one. Rows that were only appended join after the epoch under way.
        index: folder of the index of the data sets, which all machines of a run must see; empty for ``index`` in the
            output folder. Runs that share it index the same rows once. It may be deleted at any time.
        index_limit_s: longest time that building a missing index at the start may take (s), going by the first rows; what
            takes longer is refused with the command that builds it beforehand.
    """

    sources: tuple[SourceConfig, ...] = ()
    tokenizer: str = ""
    template: Literal["chatml", "llama3", "plain"] = "chatml"
    system_prompt: str = "You are a helpful assistant."
    token_budget: int = 4096
    slice_budget: int = 32
    window_samples: int = 8192
    workers: int = 4
    worker_timeout_s: int = 600
    too_long: Literal["quarantine", "truncate"] = "quarantine"
    duplicate_ids: Literal["quarantine", "keep"] = "quarantine"
    max_image_px: int = 50_000_000
    max_aspect: float = 200.0
    max_bad_rate: float = 0.01
    bad_window: int = 10_000
    on_change: Literal["refuse", "restart_epoch"] = "refuse"
    index: str = ""
    index_limit_s: int = 600


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks; data parallelism takes what is left.

    Args:
        tensor: tensor-parallel ranks (TP).
        pipeline: pipeline stages (PP).
        virtual_pipeline: model chunks per stage for the interleaved schedule; 1 is plain 1F1B.
        sequence: sequence parallelism (SP) of norms and embeddings over the TP ranks.
        overlap_grad_reduce: reduce gradients while the backward pass runs.
        overlap_param_gather: gather updated parameters while the forward pass runs.
        timeout_s: seconds after which a hanging collective fails, and 10 s later whatever else keeps a rank waiting; the run
            then ends with exit code 75, the stacks of the ranks that wait, and the name of the one that is missing. Ranks
            may start 30 s further apart, and a slow loader counts against ``data.worker_timeout_s`` instead.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    timeout_s: int = 600

    @property
    def model_size(self) -> int:
        """Ranks that share one replica of the model."""
        return self.tensor * self.pipeline


ModelPart = Literal["tower", "resampler", "decoder"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a cosine schedule.

    Args:
        lr: peak learning rate.
        tower_lr_scale: factor on ``lr`` for the vision tower.
        resampler_lr_scale: factor on ``lr`` for the resampler.
        decoder_lr_scale: factor on ``lr`` for the decoder.
        min_lr_fraction: final learning rate as a fraction of the peak.
        warmup_fraction: share of all steps with linear warm-up.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled decay of matrices; biases and norms have none.
        clip_grad_norm: global gradient norm limit; 0 turns clipping off.
        freeze: parts that are not trained.
    """

    lr: float = 2e-5
    tower_lr_scale: float = 1.0
    resampler_lr_scale: float = 1.0
    decoder_lr_scale: float = 1.0
    min_lr_fraction: float = 0.0
    warmup_fraction: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad_norm: float = 1.0
    freeze: tuple[ModelPart, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop.

    Args:
        steps: optimiser steps of the whole run.
        packs_per_step: global batch in packed sequences, over all ranks.
        samples_per_step: global batch in samples, as SICOG states it: a step packs these, however many packs they need.
        tokens_per_step: global batch in tokens (padding included), a multiple of ``data.token_budget``. At most one of the
            last two is given; 0 leaves it to the others.
        seed: seed of weights and data order.
        precision: "bf16" keeps fp32 master weights; "fp32" is for checks.
        recompute_decoder: decoder layers that are computed again in the backward pass instead of kept: "none", "full" for
            all, or "block" for the first ``recompute_layers`` of each model chunk.
        recompute_layers: number of these layers with "block"; 0 otherwise.
        recompute_tower: the same for the vision tower.
        attention: back end of packed attention; "auto" takes the first that the machine can run.
        log_every: steps between lines on the console; metrics.jsonl always has every step.
        tensorboard: write TensorBoard files.
        peak_tflops: dense peak of one device (TFLOP/s) for MFU; 0 looks the device up and prints no MFU if it is unknown.
    """

    steps: int = 1000
    packs_per_step: int = 32
    samples_per_step: int = 0
    tokens_per_step: int = 0
    seed: int = 42
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute_decoder: Literal["none", "block", "full"] = "none"
    recompute_layers: int = 0
    recompute_tower: Literal["none", "full"] = "full"
    attention: Literal["auto", "te", "flash", "varlen", "sdpa"] = "auto"
    log_every: int = 1
    tensorboard: bool = True
    peak_tflops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints that a run keeps, and the one it starts from.

    Args:
        every_steps: steps between checkpoints; the last step is always saved.
        keep_last: committed checkpoints that are kept.
        resume: "auto" continues the newest committed checkpoint if there is one, "must" insists on one,
            "never" refuses an output folder that already has one.
    """

    every_steps: int = 500
    keep_last: int = 2
    resume: Literal["auto", "must", "never"] = "auto"


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where first weights come from. An empty path leaves a part as it is drawn at random.

    A path is a Hugging Face folder or .safetensors file, one of our checkpoint folders (``checkpoints/step_N``), or the
    output folder of a run (its newest checkpoint). Ignored when the run resumes from its own checkpoint.

    Args:
        checkpoint: weights of all parts that have no path of their own.
        tower: weights of the vision tower.
        resampler: weights of the resampler.
        decoder: weights of the decoder.
    """

    checkpoint: str = ""
    tower: str = ""
    resampler: str = ""
    decoder: str = ""


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Direct preference optimisation over pairs of answers; used when ``objective`` is "dpo".

    Args:
        loss: form of the preference loss.
        beta: strength of the pull towards the reference model.
        label_smoothing: share of pairs whose preference is taken to be wrong (sigmoid loss).
        sft_weight: factor of the next-token loss on chosen answers.
        reference: "precomputed" log-probabilities, written once to the output folder, or a "frozen" copy of the model.
    """

    loss: Literal["sigmoid", "hinge", "ipo", "kto_pair"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    reference: Literal["precomputed", "frozen"] = "precomputed"


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Rows and questions that are not trained on, measured while the run goes on.

    Args:
        every_steps: steps between two measurements; the last step is measured too. 0 measures never.
        sources: data sets whose answers are predicted, as in ``data.sources``; metrics.jsonl gets the mean loss of their
            answers' tokens (next-token loss, whatever the objective) and the perplexity. Weights of rows do not count here.
        benchmark: questions with reference answers that the model is asked, greedily: a .tsv or .jsonl file, or
            "easy-vqa:test"; metrics.jsonl gets the accuracy, judged as tools/evaluate.py does. Empty asks nothing.
        images: folder that the image paths of ``benchmark`` are relative to.
        prompt: how the questions are asked; prompts.json has the names.
        max_new_tokens: an answer is cut after so many tokens.
        batch: questions that a replica answers at the same time; each needs its KV cache beside what training holds.
    """

    every_steps: int = 0
    sources: tuple[SourceConfig, ...] = ()
    benchmark: str = ""
    images: str = "."
    prompt: str = "direct"
    max_new_tokens: int = 64
    batch: int = 8


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run, whole.

    Args:
        preset: name of the preset whose values are the defaults of all others.
        output: folder for checkpoints, metrics and the quarantine report.
        model: sizes and layout.
        data: data sets and packing.
        parallel: layout over ranks.
        optim: optimiser and schedule.
        train: loop, precision and logging.
        checkpoint: saving and resuming.
        init: where first weights come from.
        objective: next-token prediction, or preferences between pairs of answers.
        dpo: the preference loss.
        held_out: what is measured during training.
    """

    preset: str
    output: str = "runs/stage15"
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    objective: Literal["next_token", "dpo"] = "next_token"
    dpo: DpoConfig = field(default_factory=DpoConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)

    @property
    def packs_per_step(self) -> int:
        """Packed sequences of an optimiser step; not fixed (0) where the global batch counts samples."""
        if self.train.samples_per_step:
            return 0
        return self.train.tokens_per_step // max(1, self.data.token_budget) or self.train.packs_per_step

    def to_dict(self) -> dict:
        """Plain dictionaries, lists and scalars: what is written as JSON beside a checkpoint."""
        return asdict(self)
