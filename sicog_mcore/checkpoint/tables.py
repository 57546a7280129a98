"""Lists names of foreign weights beside ours, part by part, and the families of checkpoints that use them.

A new family is a row in FAMILIES and, where its names are new, a table. Tables hold names only: mapping.py knows shapes,
shards and the order of rows. A row does not apply where the model lacks its parameter (biases of Qwen2, head norms of
Qwen3).
Next: weights.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sicog_mcore.checkpoint.hf_config import MODEL_TYPE
from sicog_mcore.checkpoint.mapping import (
    QKV,
    Fused,
    GatedMLP,
    Ignored,
    MappingRow,
    MappingTable,
    OneToOne,
    PaddedVocabulary,
    Tied,
    matches,
)
from sicog_mcore.config import DecoderConfig, ModelConfig, ModelPart, TowerConfig
from sicog_mcore.errors import CheckpointError

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
RESAMPLER_NAMES = (
    *("query", "pos_embed", "proj", "kv_proj.weight"),
    *("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"),
    *("ln_q.weight", "ln_q.bias", "ln_kv.weight", "ln_kv.bias", "ln_post.weight", "ln_post.bias"),
)


def decoder_table(decoder: DecoderConfig) -> MappingTable:
    """Returns the table of Qwen2, Qwen2.5, Qwen3, Llama 3 and SmolLM2; biases, head norms and a head may be missing."""
    ours, theirs = "language_model.decoder.layers.*.", "model.layers.*."
    groups, queries = decoder.num_kv_heads, decoder.num_heads // decoder.num_kv_heads

    def qkv(kind: str) -> QKV:
        q, k, v = (f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
        return QKV(f"{ours}self_attention.linear_qkv.{kind}", (q, k, v), groups, queries)

    return (
        PaddedVocabulary("language_model.embedding.word_embeddings.weight", EMBEDDINGS, decoder.vocab_size),
        OneToOne(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight"),
        qkv("weight"),
        qkv("bias"),
        OneToOne(f"{ours}self_attention.q_layernorm.weight", f"{theirs}self_attn.q_norm.weight"),
        OneToOne(f"{ours}self_attention.k_layernorm.weight", f"{theirs}self_attn.k_norm.weight"),
        OneToOne(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight"),
        OneToOne(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight"),
        GatedMLP(f"{ours}mlp.linear_fc1.weight", (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")),
        OneToOne(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight"),
        OneToOne("language_model.decoder.final_layernorm.weight", "model.norm.weight"),
        PaddedVocabulary("language_model.output_layer.weight", HEAD, decoder.vocab_size),
        *((Tied(HEAD, of=EMBEDDINGS),) if decoder.tie_embeddings else ()),
        Ignored(f"{theirs}self_attn.rotary_emb.inv_freq", "a buffer of old Llama files"),
    )


def tower_table(tower: TowerConfig) -> MappingTable:
    """Returns the table of CLIP's vision transformer. Layers behind the used output, and the last norm, are not built."""
    ours, theirs = "tower.transformer.layers.*.", "encoder.layers.*."
    unused = "behind the layer whose output is used (model.tower.feature_layer)"

    def both(target: str, source: str) -> tuple[MappingRow, ...]:
        return tuple(OneToOne(f"{target}.{kind}", f"{source}.{kind}") for kind in ("weight", "bias"))

    def qkv(kind: str) -> QKV:
        q, k, v = (f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
        return QKV(f"{ours}self_attention.linear_qkv.{kind}", (q, k, v), tower.num_heads, 1)

    return (
        OneToOne("tower.class_embedding", "embeddings.class_embedding"),
        Fused("tower.patch_embedding.weight", "embeddings.patch_embedding.weight"),
        OneToOne("tower.position_embedding", "embeddings.position_embedding.weight"),
        *both("tower.pre_norm", "pre_layrnorm"),  # CLIP's own spelling
        *both(f"{ours}input_layernorm", f"{theirs}layer_norm1"),
        qkv("weight"),
        qkv("bias"),
        *both(f"{ours}self_attention.linear_proj", f"{theirs}self_attn.out_proj"),
        *both(f"{ours}pre_mlp_layernorm", f"{theirs}layer_norm2"),
        *both(f"{ours}mlp.linear_fc1", f"{theirs}mlp.fc1"),
        *both(f"{ours}mlp.linear_fc2", f"{theirs}mlp.fc2"),
        *(Ignored(f"encoder.layers.{i}.**", unused) for i in range(tower.layers_used, tower.num_layers)),
        Ignored("post_layernorm.**", unused),
        Ignored("embeddings.position_ids", "a buffer of old CLIP files"),
    )


def part_table(part: ModelPart, model: ModelConfig) -> MappingTable:
    """Returns the table of one part."""
    if part == "decoder":
        return decoder_table(model.decoder)
    if part == "tower":
        return tower_table(model.tower)
    return tuple(OneToOne(f"resampler.{name}", name) for name in RESAMPLER_NAMES)


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints.

    Attributes:
        prefixes: texts in front of the names of a part; of several, the first is written, all are read.
        kinds: per part, each ``model_type`` of config.json that computes the same as ours, and the class it stands for;
            the first holds where config.json names none.
        foreign: names of parts that we do not have.
    """

    name: str
    about: str
    prefixes: Mapping[ModelPart, tuple[str, ...]]
    kinds: Mapping[ModelPart, Mapping[str, str]]
    foreign: tuple[str, ...] = ()

    def part_of(self, name: str) -> ModelPart | None:
        """Returns the part that a tensor belongs to, by the longest prefix that fits; None for foreign parts."""
        if any(matches(pattern, name) for pattern in self.foreign):
            return None
        fitting = [(len(p), part) for part, prefixes in self.prefixes.items() for p in prefixes if name.startswith(p)]
        return max(fitting)[1] if fitting else None


# Tower and decoder by their model_type, and the class whose defaults hold.
TOWERS: Mapping[str, str] = MappingProxyType({"clip_vision_model": "clip"})
DECODER_CLASSES: Mapping[str, str] = MappingProxyType({"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"})
RELEASED_CLASSES: Mapping[str, str] = MappingProxyType(
    {"llava_qwen": "qwen2", "llava_qwen2": "qwen2", "qwen2": "qwen2", "llava_llama": "llama", "llava": "llama"}
)


def _family(
    name: str,
    about: str,
    foreign: tuple[str, ...] = (),
    decoders: Mapping[str, str] = DECODER_CLASSES,
    **prefixes: tuple[str, ...],
) -> Family:
    kinds = MappingProxyType({"tower": TOWERS, "decoder": decoders, "resampler": decoders})
    return Family(name, about, MappingProxyType(dict(prefixes)), kinds, foreign)  # type: ignore[arg-type]


def _one(kind: str) -> Mapping[str, str]:
    return MappingProxyType({kind: kind})


QWEN2 = _family("qwen2", "Qwen2 or Qwen2.5 decoder", decoders=_one("qwen2"), decoder=("",))
QWEN3 = _family("qwen3", "Qwen3 decoder", decoders=_one("qwen3"), decoder=("",))
LLAMA = _family("llama", "Llama 3 or SmolLM2 decoder", decoders=_one("llama"), decoder=("",))
CLIP = _family(
    "clip",
    "CLIP, of which the vision tower is used",
    ("text_model.**", "text_projection.**", "visual_projection.**", "logit_scale"),
    tower=("vision_model.", ""),
)
RELEASED = _family(
    "llava_uhd",
    "released SICOG or LLaVA-UHD weights",
    decoders=RELEASED_CLASSES,
    tower=("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_model."),
    resampler=("model.mm_projector.", "mm_projector."),
    decoder=("",),
)
OWN = _family(
    "sicog",
    "whole model, as exported by this project",
    tower=("vision_tower.vision_model.", "vision_tower."),
    resampler=("resampler.",),
    decoder=("language_model.",),
)
OTHER = _family(
    "vlm",
    "vision-language model of another project, of which decoder and CLIP tower are used",
    tower=("vision_tower.vision_model.", "vision_tower."),
    decoder=("language_model.",),
)
RESAMPLER = _family("resampler", "resampler alone", resampler=("",))
FAMILIES = (QWEN2, QWEN3, LLAMA, CLIP, RELEASED, OWN, OTHER, RESAMPLER)
DECODERS: Mapping[str, Family] = MappingProxyType({family.name: family for family in (QWEN2, QWEN3, LLAMA)})


def recognise(names: Collection[str], model_type: str, where: str) -> Family:
    """Recognises the family of a checkpoint by the names of its tensors; decoders also by ``model_type``.

    Args:
        model_type: as config.json has it; empty where there is none, then biases and head norms tell decoders apart.
        where: the file or folder, for messages.

    Raises:
        CheckpointError: no family has such names, or a decoder that shares our names computes something else.
    """

    def some(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if some("language_model.", "vision_tower.", "resampler."):
        return OWN if model_type in ("", MODEL_TYPE) else OTHER
    if some("model.mm_projector.", "mm_projector.", "model.vision_tower."):
        return RELEASED
    if some("vision_model.", "encoder.layers.", "embeddings."):
        if model_type not in ("", "clip", *TOWERS):
            raise CheckpointError(
                f"{where} has model_type {model_type!r}; its names look familiar, but only clip and {', '.join(TOWERS)} are "
                "known to compute the same as our tower"
            )
        return CLIP
    if "kv_proj.weight" in names:
        return RESAMPLER
    if not some("model.", HEAD):
        known = "; ".join(f"{family.name}: {family.about}" for family in FAMILIES)
        some_names = ", ".join(sorted(names)[:3])
        raise CheckpointError(f"{where} is of no known family (it has {some_names}, ...); known are {known}")
    if model_type:
        if model_type not in DECODERS:
            raise CheckpointError(
                f"{where} has model_type {model_type!r}; its names look familiar, but only {', '.join(DECODERS)} are known "
                "to compute the same as our decoder"
            )
        return DECODERS[model_type]
    if any(name.endswith("self_attn.q_norm.weight") for name in names):
        return QWEN3
    return QWEN2 if any(name.endswith("self_attn.q_proj.bias") for name in names) else LLAMA
