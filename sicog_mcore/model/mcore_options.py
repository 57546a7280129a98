"""Lists the fields of Megatron's TransformerConfig that ``model.decoder.mcore`` may set, and why others are refused.

TransformerConfig has some 240 fields for many kinds of models. Most of them do nothing in this one, some crash, and some
change what the decoder computes, which neither an export nor generation would follow. A field is taken only if it changes
how the decoder is computed, and not what it computes.   Next: decoder.py
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields

from megatron.core.transformer.transformer_config import TransformerConfig

from sicog_mcore.errors import ConfigProblem

# The purpose of each option; all are booleans.
OPTIONS: Mapping[str, str] = {
    "bias_activation_fusion": "SwiGLU as one kernel that torch compiles; false where no C compiler is at hand",
    "apply_rope_fusion": "rotary positions in Transformer Engine's kernel; false to compare with torch's",
    "deallocate_pipeline_outputs": "frees a stage's output as soon as the next stage has it",
    "disable_bf16_reduced_precision_matmul": "sums of bf16 products in fp32 throughout",
}
NEEDS_TE = ("apply_rope_fusion",)
# The interleaved schedule overlaps its sends: Megatron frees an output before the send that reads it is over, so that the
# next stage may receive whatever is written there next (seen on CPU: wrong losses, NaN gradients).
NOT_INTERLEAVED = ("deallocate_pipeline_outputs",)
# Fields that have a place of their own in the configuration.
ELSEWHERE: Mapping[str, str] = {
    "num_layers": "model.decoder.num_layers",
    "hidden_size": "model.decoder.hidden",
    "num_attention_heads": "model.decoder.num_heads",
    "num_query_groups": "model.decoder.num_kv_heads",
    "kv_channels": "model.decoder.head_dim",
    "ffn_hidden_size": "model.decoder.ffn",
    "layernorm_epsilon": "model.decoder.norm_eps",
    "add_qkv_bias": "model.decoder.qkv_bias",
    "qk_layernorm": "model.decoder.qk_norm",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "sequence_parallel": "parallel.sequence",
    "bf16": "train.precision",
    "params_dtype": "train.precision",
    "pipeline_dtype": "train.precision",
    "recompute_granularity": "train.recompute_decoder",
    "recompute_method": "train.recompute_decoder",
    "recompute_modules": "train.recompute_decoder",
    "recompute_num_layers": "train.recompute_layers",
    "attention_backend": "train.attention",
}
# Fields that people ask for, and what becomes of them here.
REASONS: Mapping[str, str] = {
    "fp32_residual_connection": "a layer hands its residual on in the dtype of its weights, whatever this says",
    "init_method_std": "first weights are drawn by model/initialise.py, whatever the layout",
    "embedding_init_method_std": "first weights are drawn by model/initialise.py, whatever the layout",
    "hidden_dropout": "packed layers have no dropout",
    "attention_dropout": "packed attention has no dropout",
    "attention_softmax_in_fp32": "the attention back ends decide it themselves",
    "masked_softmax_fusion": "packed attention has no such kernel",
    "cross_entropy_loss_fusion": "the loss is computed in model/loss.py",
    "context_parallel_size": "context parallelism is not supported",
    "num_moe_experts": "mixtures of experts are not supported",
    "fp8": "FP8 is not supported",
    "fp4": "FP4 is not supported",
    "tp_comm_overlap": "its user buffers are not set up here",
    "cpu_offloading": "offloading of activations is not supported",
    "gradient_accumulation_fusion": "it needs Apex's or Transformer Engine's kernels wired to the gradient buffers",
}


def option_problems(
    options: Mapping[str, bool | int | float | str], with_te: bool, interleaved: bool = False
) -> list[ConfigProblem]:
    """Finds options in ``model.decoder.mcore`` that would be ignored, contradict another value, or cannot run here.

    Args:
        options: as configured.
        with_te: whether Transformer Engine's layers are used.
        interleaved: whether the pipeline runs the interleaved schedule.
    """
    found = (_problem(name, value, with_te, interleaved) for name, value in sorted(options.items()))
    return [problem for problem in found if problem]


def _problem(name: str, value: bool | int | float | str, with_te: bool, interleaved: bool) -> ConfigProblem | None:
    path = f"model.decoder.mcore.{name}"
    if name in OPTIONS:
        if not isinstance(value, bool):
            return ConfigProblem(path, value, "is neither true nor false", "give one of the two")
        if value and name in NEEDS_TE and not with_te:
            return ConfigProblem(path, value, "needs Transformer Engine, which is not used here", "remove it")
        if value and name in NOT_INTERLEAVED and interleaved:
            problem = "frees outputs that the interleaved schedule is still sending"
            return ConfigProblem(path, value, problem, "remove it, or set parallel.virtual_pipeline=1")
        return None
    if name in ELSEWHERE:
        return ConfigProblem(path, value, "has a place of its own", f"set {ELSEWHERE[name]} instead")
    known = {field.name for field in fields(TransformerConfig)}
    if name not in known:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(OPTIONS)}"
        return ConfigProblem(path, value, "is no field of TransformerConfig", hint)
    reason = REASONS.get(name, "this decoder does not use it, or an export would not follow it")
    return ConfigProblem(path, value, f"cannot be set: {reason}", f"remove it; known here: {', '.join(OPTIONS)}")
