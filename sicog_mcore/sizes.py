"""Counts by arithmetic: parameters of every part, and the most visual tokens an image can take.

In: the dataclasses of config.py.  Out: plain integers, before anything is built.  Next: validation.py, train/.
Standard library only; a test compares these numbers with the built model.
"""

from __future__ import annotations

from sicog_mcore.config import DecoderConfig, ModelConfig, ModelPart, ResamplerConfig, SlicingConfig, TowerConfig

VOCAB_MULTIPLE = 128  # the same for every tensor-parallel size, so that checkpoints move between layouts


def padded_vocab(config: DecoderConfig) -> int:
    """Returns the rows of the embedding table as it is built."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def tower_params(config: TowerConfig, all_layers: bool = False) -> int:
    """Counts the parameters of the vision tower.

    Args:
        config: sizes of the tower.
        all_layers: count the source checkpoint (every layer and the last norm) instead of the part that is built.
    """
    c, f = config.hidden, config.ffn
    # Biases of query, key, value and output (4 c), of the second feed-forward matrix (c) and of the first (f); two
    # norms with weight and bias (4 c).
    layer = 4 * c * c + 2 * c * f + (4 + 4 + 1) * c + f  # attention and MLP matrices; two norms, biases
    positions = (config.grid**2 + 1) * c  # one row more for the class token
    class_token = c
    norms = 4 * c if all_layers else 2 * c
    layers = config.num_layers if all_layers else config.layers_used
    return layers * layer + config.patch_dim * c + positions + class_token + norms


def resampler_params(config: ResamplerConfig, kv_width: int, width: int) -> int:
    """Counts the parameters of the window resampler, with its position table, trained or not.

    Args:
        config: sizes of the resampler.
        kv_width: width c of the features that come in.
        width: decoder width h that goes out.
    """
    kv_projection = kv_width * width
    attention = 4 * width * width + 4 * width
    projection = width * width
    queries_and_positions = 2 * config.queries * width
    norms = 3 * 2 * width
    return kv_projection + attention + projection + queries_and_positions + norms


def decoder_params(config: DecoderConfig) -> int:
    """Counts the parameters of the language model, the padding of the vocabulary included."""
    h, query, key_value = config.hidden, config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    matrices = h * (query + key_value) + query * h + 3 * h * config.ffn
    biases = query + key_value if config.qkv_bias else 0
    head_norms = 2 * config.head_dim if config.qk_norm else 0
    tables = padded_vocab(config) * h * (1 if config.tie_embeddings else 2)
    return config.num_layers * (matrices + biases + head_norms + 2 * h) + h + tables


def params_by_part(config: ModelConfig) -> dict[ModelPart, int]:
    """Counts the parameters of each part as it is built, over all ranks."""
    return {
        "tower": tower_params(config.tower),
        "resampler": resampler_params(config.resampler, config.tower.hidden, config.decoder.hidden),
        "decoder": decoder_params(config.decoder),
    }


def model_params(config: ModelConfig) -> int:
    """Counts the parameters of the whole model as it is built."""
    return sum(params_by_part(config).values())


def most_visual_tokens(slicing: SlicingConfig, resampler: ResamplerConfig) -> int:
    """Counts the visual tokens, separators included, of the image that takes the most of them."""
    side, queries, most = resampler.query_grid, resampler.queries, slicing.max_slices
    if most <= 1:
        return queries
    if slicing.layout == "per_slice":
        return (queries + 1) * most + queries
    return side * most * (side + 1) + 1 + queries  # a single column of slices has the most rows, each with a separator
