"""Estimates the bytes that a run needs on one device, by arithmetic, before anything is built.

In: an Experiment and the number of ranks   Out: MemoryEstimate of the first and of the last pipeline stage
Used by: train/run.py, which refuses what cannot fit, and by the tests of the presets. Standard library only.
Weights, gradients, optimizer states and the activations that the backward pass keeps are counted. Allocator losses, NCCL's
buffers and the CUDA context are not: RESERVED_GIB stands for them. The states are exact to the padding of buckets;
activations are those of the layers as they are written here, in the precision of the run. No figure has been compared with
a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sicog_mcore.config import DecoderConfig, Experiment, ModelConfig, ModelPart, TowerConfig
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.sizes import padded_vocab, params_by_part

GIB = 2**30
RESERVED_GIB = 3  # the CUDA context, NCCL's buffers, pieces of memory too small to use
MASTER_AND_MOMENTS = 12  # bytes per parameter, shared out over the data-parallel ranks; 8 without a master copy
GRADIENT = 4  # bytes: gradients are summed in fp32
RESAMPLER_BYTES_PER_WIDTH = (
    29.5 * 2**20 / 3584
)  # kept per slice of 576 patches in bf16, per unit of the decoder's width
SUPERVISED_SHARE = 0.25  # of the positions of a pack that have logits; instruction data has about a quarter
LOGIT_BYTES = 8  # per element: bf16 logits, their fp32 copy, the gradient that replaces it


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by cause.

    Attributes:
        weights: of this stage's part of the model, and of the frozen reference if there is one.
        gradients: fp32, of what is trained.
        optimizer: this rank's share of master weights and moments.
        decoder: activations of the decoder's layers that are kept for the backward pass, over all micro-batches in flight.
        vision: the same for tower and resampler; zero behind the first stage.
        logits: of the supervised positions; zero before the last stage.
    """

    weights: int
    gradients: int
    optimizer: int
    decoder: int
    vision: int
    logits: int

    @property
    def states(self) -> int:
        """Sums the bytes that are there from the first step to the last, whatever the batch is."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.decoder + self.vision + self.logits


def estimate_memory(experiment: Experiment, world_size: int) -> MemoryEstimate:
    """Estimates the first and the last stage, and returns the larger: only these hold more than their layers.

    Args:
        world_size: ranks of the run, a multiple of ``parallel.model_size``.
    """
    stages = {0, experiment.parallel.pipeline - 1}
    return max((_stage(experiment, world_size, stage) for stage in stages), key=lambda estimate: estimate.total)


def estimate_text(estimate: MemoryEstimate) -> str:
    """Writes the estimate in one line, in GiB."""
    causes = {
        "weights": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "decoder activations": estimate.decoder,
        "vision": estimate.vision,
        "logits": estimate.logits,
    }
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in causes.items() if size >= GIB / 20)
    return f"about {estimate.total / GIB:.1f} GiB by arithmetic: {parts or 'each below 0.1'}"


def fitting(experiment: Experiment, world_size: int, device_bytes: int) -> list[str]:
    """Checks a run against devices of this size before it starts; returns lines for the user, none if it fits.

    Raises:
        ConfigError: weights, gradients and optimizer states alone are larger than the device.
    """
    estimate, room = estimate_memory(experiment, world_size), device_bytes - RESERVED_GIB * GIB
    if estimate.states > room:
        found = f"weights, gradients and optimizer states take {estimate.states / GIB:.1f} GiB a device"
        problem = f"{found}, of which {room / GIB:.1f} GiB are usable"
        fix = "raise parallel.tensor or parallel.pipeline, use more devices, or freeze parts (optim.freeze)"
        raise ConfigError([ConfigProblem("parallel.tensor", experiment.parallel.tensor, problem, fix)])
    if estimate.total <= room:
        return []
    found = f"memory may not suffice: {estimate_text(estimate)}; {room / GIB:.1f} GiB are usable"
    layers = _layers_to_recompute(experiment, world_size, room)
    if layers is None:
        return [f"{found}; raise parallel.tensor with parallel.sequence=true, or lower data.token_budget"]
    return [f"{found}; train.recompute_decoder=block with train.recompute_layers={layers} would fit"]


def _layers_to_recompute(experiment: Experiment, world_size: int, room: int) -> int | None:
    """Finds the fewest layers of a model chunk that must be recomputed; None if all of them are too few."""
    parallel = experiment.parallel
    for layers in range(1, experiment.model.decoder.num_layers // (parallel.pipeline * parallel.virtual_pipeline) + 1):
        train = replace(experiment.train, recompute_decoder="block", recompute_layers=layers)
        if estimate_memory(replace(experiment, train=train), world_size).total <= room:
            return layers
    return None


def _stage(experiment: Experiment, world_size: int, stage: int) -> MemoryEstimate:
    model, parallel, train = experiment.model, experiment.parallel, experiment.train
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    held = _held_params(model, parallel.tensor, parallel.pipeline, is_first, is_last)
    trained = sum(size for part, size in held.items() if part not in experiment.optim.freeze)
    width = 2 if train.precision == "bf16" else 4
    replicas = world_size // parallel.model_size
    # In fp32 the weights are their own masters.
    states = MASTER_AND_MOMENTS if width == 2 else MASTER_AND_MOMENTS - 4
    copies = 2 if experiment.objective == "dpo" and experiment.dpo.reference == "frozen" else 1
    supervised = int(experiment.data.token_budget * SUPERVISED_SHARE)
    return MemoryEstimate(
        weights=copies * width * sum(held.values()),
        gradients=GRADIENT * trained,
        optimizer=states * trained // replicas,
        decoder=_decoder_activations(experiment, stage, width),
        vision=_vision_activations(experiment, width) if is_first else 0,
        logits=LOGIT_BYTES * supervised * padded_vocab(model.decoder) // parallel.tensor if is_last else 0,
    )


def _held_params(
    model: ModelConfig, tensor: int, pipeline: int, is_first: bool, is_last: bool
) -> Mapping[ModelPart, int]:
    """Counts the parameters of each part on a rank; tower and resampler are whole on every rank of the first stage."""
    whole, decoder = params_by_part(model), model.decoder
    table = padded_vocab(decoder) * decoder.hidden
    tables = table * (1 if decoder.tie_embeddings else 2)
    layers = (whole["decoder"] - tables) // pipeline
    # The first stage holds the embedding table, the last one the head; tied and on one stage, both are one table.
    own_tables = table * (is_first + (is_last and not (is_first and decoder.tie_embeddings)))
    vision: Mapping[ModelPart, int] = {"tower": whole["tower"], "resampler": whole["resampler"]}
    return {"decoder": (layers + own_tables) // tensor, **(vision if is_first else {})}


def _decoder_activations(experiment: Experiment, stage: int, width: int) -> int:
    """Counts activations of all micro-batches that are between forward and backward pass on this stage."""
    parallel, train, decoder = experiment.parallel, experiment.train, experiment.model.decoder
    chunks = parallel.virtual_pipeline
    layers = decoder.num_layers // (parallel.pipeline * chunks)  # of one chunk
    whole, entry = _layer_bytes(decoder, parallel.tensor, parallel.sequence, width)
    redone = {"none": 0, "block": min(train.recompute_layers, layers), "full": layers}[train.recompute_decoder]
    kept = (layers - redone) * whole + redone * entry
    in_flight = parallel.pipeline - stage  # 1F1B; the interleaved schedule warms up with more chunks, of fewer layers
    if chunks > 1:
        # Megatron's interleaved schedule warms up with two passes for each stage behind this one, and with a group of
        # ``pipeline`` micro-batches through all chunks but the last; one more pass is at work.
        in_flight = 2 * (parallel.pipeline - stage - 1) + (chunks - 1) * parallel.pipeline + 1
    transient = whole if redone else 0  # a layer that is computed again is whole for a moment
    return experiment.data.token_budget * (in_flight * kept + transient)


def _layer_bytes(decoder: DecoderConfig, tensor: int, sequence: bool, width: int) -> tuple[int, int]:
    """Counts bytes per token: the activations that a layer keeps, and its input."""
    query, key_value = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    residual = 4 * width * decoder.hidden  # in and out of both norms
    # projected and rotated queries and keys; values keep the projection's storage alive; attention's output
    attention = width * (query + 2 * key_value) + width * (query + key_value) + width * query
    gated = width * 3 * decoder.ffn  # both halves in front of the gate, and their product
    shared = tensor if sequence else 1
    return residual // shared + (attention + gated) // tensor, width * decoder.hidden // shared


def _vision_activations(experiment: Experiment, width: int) -> int:
    """Counts activations of the slices of one pack that this rank encodes, for each micro-batch in flight."""
    model, train, parallel, freeze = experiment.model, experiment.train, experiment.parallel, experiment.optim.freeze
    slices = -(-_usual_slices(experiment) // parallel.tensor)
    # All slices have about the same area, so the largest one stands for each of them.
    patches = (model.slicing.resolution_px // model.tower.patch_px) ** 2
    tower, layer, entry = model.tower, *_tower_layer_bytes(model.tower, width)
    # A frozen tower needs no backward pass, and so keeps nothing; the resampler behind it may still learn.
    if "tower" in freeze:
        kept = 0
    elif train.recompute_tower == "full":
        kept = tower.layers_used * entry + layer
    else:
        kept = tower.layers_used * layer
    resampler = RESAMPLER_BYTES_PER_WIDTH * width / 2 * model.decoder.hidden * patches / 576
    own = kept * (patches + 1) + (0 if {"tower", "resampler"} <= set(freeze) else resampler)
    return int(slices * own * parallel.pipeline)


def _tower_layer_bytes(tower: TowerConfig, width: int) -> tuple[int, int]:
    """Counts bytes per token: the activations that a layer keeps, and its input."""
    # Kept are norms and residuals (4 c), queries, keys and values (3 c), attention's output (c), three wide activations.
    return width * (4 * tower.hidden + 3 * tower.hidden + tower.hidden + 3 * tower.ffn), width * tower.hidden


def _usual_slices(experiment: Experiment) -> int:
    """Counts the slices of a pack whose tokens are half visual, as in high-resolution data; at most the budget."""
    visual = experiment.data.token_budget // (2 * experiment.model.resampler.queries)
    return max(1, min(experiment.data.slice_budget, visual))
