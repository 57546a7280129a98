"""Builds Megatron's GPTModel from a DecoderConfig, behind one function.

In: embeddings [t, 1, h]   Out: hidden states [t, 1, h], and logits of chosen positions   Next: vlm.py
GPTModel is deprecated from megatron-core 0.19 on; whoever replaces it changes this file only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sicog_mcore.config import DecoderConfig, ParallelConfig, TrainConfig
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.model.capability import AttentionBackend, LayerKind
from sicog_mcore.model.layers import transformer_block_spec
from sicog_mcore.model.mcore_options import option_problems
from sicog_mcore.sizes import padded_vocab


def decoder_transformer_config(
    decoder: DecoderConfig, parallel: ParallelConfig, train: TrainConfig, on_gpu: bool, with_te: bool
) -> TransformerConfig:
    """Translates our configuration of the decoder into Megatron's.

    Raises:
        ConfigError: ``decoder.mcore`` names what mcore_options.py does not list, or Megatron refuses the combination.
    """
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline > 1
    values = {
        "num_layers": decoder.num_layers,
        "hidden_size": decoder.hidden,
        "num_attention_heads": decoder.num_heads,
        "num_query_groups": decoder.num_kv_heads,
        "kv_channels": decoder.head_dim,
        "ffn_hidden_size": decoder.ffn,
        "normalization": "RMSNorm",
        "layernorm_epsilon": decoder.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": decoder.qkv_bias,
        "qk_layernorm": decoder.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": train.precision == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "sequence_parallel": parallel.sequence,
        # With the default batched p2p the interleaved schedule gives wrong gradients without an error.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Must be known before DistributedDataParallel is built, or data-parallel gradients are scaled wrongly.
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not on_gpu,
        # initialise.py does it, independent of the layout; but Megatron marks sharded parameters on the way.
        "perform_initialization": True,
        "init_method": _leave_uninitialised,
        "output_layer_init_method": _leave_uninitialised,
        "embedding_init_method": _leave_uninitialised,
        "bias_activation_fusion": on_gpu,
        "apply_rope_fusion": with_te,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        **_recompute(train),
    }
    if problems := option_problems(decoder.mcore, with_te, interleaved):
        raise ConfigError(problems)
    try:
        return TransformerConfig(**{**values, **decoder.mcore})
    except (ValueError, AssertionError, TypeError) as error:
        problem = ConfigProblem(
            "model.decoder", decoder.mcore or "...", f"Megatron refuses it: {error}", "change the named field"
        )
        raise ConfigError([problem]) from error


def _leave_uninitialised(weight: Tensor) -> Tensor:
    return weight


def _recompute(train: TrainConfig) -> dict[str, object]:
    if train.recompute_decoder == "none":
        return {}
    # Recomputing attention alone would free next to nothing: every packed back end keeps its inputs and output anyway.
    if train.recompute_decoder == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": train.recompute_layers,
    }


class Decoder(GPTModel):
    """GPTModel that takes embeddings with packed borders and leaves the choice of head rows to the caller."""

    def forward(self, embeddings: Tensor | None, positions: Tensor, packed: PackedSeqParams) -> Tensor:
        """Runs this stage's layers.

        Args:
            embeddings: [t, 1, h] on the first stage ([t / tensor, 1, h] under sequence parallelism); None elsewhere.
            positions: int64 [t], restarting at every sample.
            packed: borders of the samples.

        Returns:
            hidden states in the shape of ``embeddings``; the final norm is applied on the last stage.
        """
        # Positions restart at every sample, so a table as long as the longest sample serves all of them.
        table = self.rotary_pos_emb(packed.max_seqlen_q)  # [longest, 1, 1, d]
        return self.decoder(
            hidden_states=embeddings,
            attention_mask=None,
            rotary_pos_emb=table[positions],  # [t, 1, 1, d]: one vectorised rotation instead of one per sample
            packed_seq_params=packed,
        )

    def project(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Computes logits of chosen positions only: the head is the largest matrix, and few positions are supervised.

        Args:
            hidden: [t, 1, h], or [t / tensor, 1, h] under sequence parallelism.
            rows: int64 [t_s] positions in the whole packed sequence.

        Returns:
            [t_s, 1, v / tensor], this rank's part of the vocabulary.
        """
        if self.config.sequence_parallel:
            # The head itself sums the gradients of the chosen rows over ranks: here each rank takes its own part back.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden[rows], weight=weight)
        return logits


def build_decoder(
    decoder: DecoderConfig,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    layers: LayerKind,
    attention: AttentionBackend,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> Decoder:
    """Builds this stage's part of the decoder; weights are undefined until initialise.py or a checkpoint fills them."""
    # Megatron decides how many layers a stage holds; the spec must list exactly these.
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp.rank())
    spec = transformer_block_spec(num_layers, attention, causal=True, layers=layers, qk_norm=decoder.qk_norm)
    model = Decoder(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab(decoder),
        max_sequence_length=0,  # rotary positions need no table of a fixed length
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=decoder.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=decoder.rope_base,
        rope_scaling=decoder.rope_scaling_factor != 1.0,
        rope_scaling_factor=decoder.rope_scaling_factor,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if post_process:
        model.output_layer.sequence_parallel = False  # project() gathers first, then selects rows
    return model
