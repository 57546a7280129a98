"""Lists known keys of configurations beside foreign weights: compared, harmless at one value, or irrelevant.

A key that is not listed is named to the user. To add a key, write it into the group whose reason holds for it.
Used by: hf_config.py, hf_beside.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal

Scope = Literal["decoder", "tower", "top", "preprocessor", "generation"]
Fate = Literal["compared", "irrelevant", "unknown"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Compared with what a run computes, by hf_config.py and hf_beside.py.
COMPARED: Mapping[Scope, frozenset[str]] = MappingProxyType(
    {
        "decoder": _words(
            "model_type architectures auto_map hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim intermediate_size vocab_size rms_norm_eps rope_theta tie_word_embeddings hidden_act rope_scaling "
            "rope_parameters use_sliding_window sliding_window layer_types attention_bias mlp_bias "
            "original_max_position_embeddings query_pre_attn_scalar attention_multiplier hidden_activation"
        ),
        "tower": _words(
            "model_type image_size patch_size num_hidden_layers hidden_size num_attention_heads intermediate_size "
            "layer_norm_eps hidden_act num_channels"
        ),
        "top": _words(
            "model_type auto_map tie_word_embeddings vision_feature_layer mm_vision_select_layer mm_hidden_size "
            "query_grid resampler_heads resampler_norm_eps vision_feature_select_strategy mm_vision_select_feature"
        ),
        "preprocessor": _words(
            "image_mean image_std do_normalize do_rescale rescale_factor patch_size resolution max_slices overview_only "
            "layout query_grid"
        ),
        "generation": frozenset(),
    }
)
# Layers, scales and masks that our decoder and tower do not have: refused unless the value, or nothing, turns them off.
ABSENT: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        **dict.fromkeys(
            _words(
                "final_logit_softcapping attn_logit_softcapping logit_soft_cap attn_logit_softcap alibi use_alibi clip_qkv "
                "use_parallel_residual parallel_attn parallel_residual use_bidirectional_attention attention_chunk_size "
                "no_rope_layers no_rope_layer_interval attn_temperature_tuning use_qk_norm qk_layernorm qkv_clip "
                "use_mup mup_width_multiplier scale_depth scale_attn dim_model_base cross_attention_layers pruned_heads "
                "num_experts num_local_experts n_routed_experts num_experts_per_tok num_experts_per_token n_shared_experts "
                "moe_intermediate_size moe_layers shared_expert_intermediate_size kv_lora_rank q_lora_rank qk_rope_head_dim "
                "qk_nope_head_dim v_head_dim index_topk num_nextn_predict_layers mtp_num_layers sliding_window_pattern "
                "attention_out_bias use_bias bias attention_sink sink_tokens lora_config lora_rank lora_alpha "
                "peft_config use_lora use_backbone_lora use_llm_lora altup_num_inputs laurel_rank "
                "hidden_size_per_layer_input num_kv_shared_layers "
                "rope_interleaved linear_attn_config linear_num_key_heads full_attention_interval mamba_d_state "
                "layer_norm_type norm_after"
            ),
            (),
        ),
        **dict.fromkeys(
            _words(
                "residual_multiplier embedding_multiplier logits_scaling logit_scale scale_emb partial_rotary_factor "
                "rotary_pct rotary_percentage lm_head_multiplier key_multiplier"
            ),
            (1,),
        ),
        "is_causal": (True,),
        "use_causal_mask": (True,),
        "norm_type": ("rms", "rmsnorm", "RMSNorm", "rms_norm"),
        "projection_bias": (),
    }
)
# Weights are packed, not numbers: refused wherever they stand.
PACKED = _words("quantization_config compression_config quantization quant_config bnb_config fp8_config")
# Chance in training: said, a run has none of it.
DROPOUT = _words(
    "attention_dropout dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop "
    "attn_pdrop residual_dropout embedding_dropout projection_dropout drop_path_rate classifier_dropout layerdrop"
)
# Configurations of one part inside that of a whole model, by what transformers and others call them.
NESTED: Mapping[Literal["decoder", "tower"], tuple[str, ...]] = MappingProxyType(
    {
        "decoder": (
            *("text_config", "llm_config", "language_config", "language_model_config", "lm_config", "llm_cfg"),
            *(
                "llm",
                "llm_model_config",
                "decoder_config",
                "text_model_config",
                "decoder",
                "language_model",
                "thinker_config",
            ),
        ),
        "tower": (
            "vision_config",
            "vision_tower_config",
            "vision_encoder_config",
            "visual",
            "vit_config",
            "vision_cfg",
        ),
    }
)
# Parts that are not ours at all.
OTHER_PARTS = _words(
    "audio_config talker_config token2wav_config video_config projector_config connector_config aligner_config "
    "gen_vision_config gen_aligner_config gen_head_config perceiver_config qformer_config multi_modal_projector_config "
    "vision_tower_cfg mm_projector_cfg speech_config backbone_config code2wav_config vq_config"
)
_EVERYWHERE: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "where it comes from": _words(
            "_name_or_path transformers_version architectures model_name _commit_hash _attn_implementation "
            "_attn_implementation_autoset attn_implementation torch_dtype dtype use_bfloat16 torchscript "
            "unsloth_version is_llama_config "
            "unsloth_fixed transformers.js_config _diffusers_version name description license parent_library"
        ),
        "first values of a training from nothing": _words(
            "initializer_range initializer_factor init_std init_device embd_init_std layer_scale_init_value"
        ),
        "what a forward pass returns, and speed": _words(
            "output_attentions output_hidden_states return_dict use_return_dict use_cache pretraining_tp "
            "chunk_size_feed_forward gradient_checkpointing use_flash_attn use_flash_attention_2 attn_impl "
            "tf_legacy_loss fused_ops keys_to_ignore_at_inference use_liger_kernel base_model_tp_plan"
        ),
        "ids that data.template and the tokenizer decide": _words(
            "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id eos_coefficient "
            "forced_bos_token_id forced_eos_token_id im_start_id im_end_id tokenizer_class prefix"
        ),
        "heads of other tasks": _words(
            "id2label label2id num_labels problem_type finetuning_task task_specific_params is_encoder_decoder is_decoder "
            "add_cross_attention cross_attention_hidden_size tie_encoder_decoder classifier_activation"
        ),
        "how transformers generates": _words(
            "max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups "
            "diversity_penalty temperature top_k top_p min_p top_h typical_p repetition_penalty length_penalty "
            "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
            "return_dict_in_generate remove_invalid_values exponential_decay_length_penalty suppress_tokens "
            "begin_suppress_tokens"
        ),
    }
)
_BY_SCOPE: Mapping[Scope, Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "decoder": MappingProxyType(
            {
                "rotary positions have no table": _words(
                    "max_position_embeddings seq_length max_sequence_length n_positions"
                ),
                "counts for sliding windows, which are refused": _words("max_window_layers sliding_window_size"),
                "counts for experts, which are refused": _words(
                    "decoder_sparse_step mlp_only_layers norm_topk_prob output_router_logits router_aux_loss_coef "
                    "router_jitter_noise first_k_dense_replace moe_layer_freq routed_scaling_factor topk_group topk_method "
                    "n_group scoring_func aux_loss_alpha seq_aux ep_size"
                ),
            }
        ),
        "tower": MappingProxyType(
            {
                "the visual projection is not used": _words("projection_dim"),
                "of CLIP's text model": _words("vocab_size max_position_embeddings tie_word_embeddings"),
            }
        ),
        "top": MappingProxyType(
            {
                "of CLIP's text model and its loss": _words("projection_dim logit_scale_init_value text_config_dict"),
                "read as part of vision_config": _words("vision_config_dict"),
                "other projects' projector and markers, which have no place here": _words(
                    "image_token_index image_token_id video_token_id video_token_index audio_token_id image_seq_length "
                    "ignore_index projector_hidden_act multimodal_projector_bias image_grid_pinpoints image_aspect_ratio "
                    "image_crop_resolution image_split_resolution mm_patch_merge_type mm_projector_type mm_projector_lr "
                    "mm_resampler_type mm_spatial_pool_mode mm_use_im_patch_token mm_use_im_start_end mm_vision_tower "
                    "mm_vision_tower_lr mm_tunable_parts mm_newline_position pos_skipping_range tune_mm_mlp_adapter "
                    "freeze_mm_mlp_adapter tune_mm_vision_resampler freeze_mm_vision_resampler unfreeze_mm_vision_tower "
                    "use_mm_proj use_pos_skipping tokenizer_model_max_length tokenizer_padding_side vision_tower_pretrained "
                    "use_image_newline_parameter downsample_ratio dynamic_image_size force_image_size max_dynamic_patch "
                    "min_dynamic_patch ps_version select_layer template use_thumbnail pad2square system_message "
                    "vision_start_token_id vision_end_token_id vision_token_id add_faster_video faster_token_stride "
                    "mm_perceiver_depth mm_perceiver_latents mm_qformer_depth boi_token_index eoi_token_index "
                    "mm_tokens_per_image spatial_merge_size image_size patch_size num_image_tokens"
                ),
                "sizes of the decoder, compared where its own configuration names them": _words(
                    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
                    "vocab_size rms_norm_eps rope_theta rope_scaling rope_parameters hidden_act max_position_embeddings "
                    "use_sliding_window sliding_window max_window_layers layer_types attention_bias mlp_bias"
                ),
            }
        ),
        "preprocessor": MappingProxyType(
            {
                "pictures are cut and resized by model.slicing": _words(
                    "size crop_size do_resize do_center_crop do_convert_rgb do_pad do_crop resample image_grid_pinpoints "
                    "aspect_ratio_setting image_crop_resolution image_split_resolution default_to_square do_image_splitting "
                    "do_splitting max_image_size min_pixels max_pixels merge_size temporal_patch_size shortest_edge "
                    "longest_edge crop_pct pad_size max_patches min_patches crop_to_patches max_num_tiles"
                ),
                "which class of transformers reads the file": _words(
                    "image_processor_type feature_extractor_type processor_class auto_map _valid_processor_keys "
                    "data_format input_data_format return_tensors disable_grouping device image_seq_length "
                    "num_additional_image_tokens vision_feature_select_strategy"
                ),
            }
        ),
        "generation": MappingProxyType(
            {
                "how transformers generates": _words(
                    "_from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
                    "assistant_lookbehind cache_config cache_implementation compile_config constraints "
                    "continuous_batching_config disable_compile dola_layers encoder_repetition_penalty epsilon_cutoff "
                    "eta_cutoff force_words_ids guidance_scale is_assistant low_memory max_cache_len "
                    "max_matching_ngram_size "
                    "max_time num_assistant_tokens num_assistant_tokens_schedule output_logits penalty_alpha "
                    "prefill_chunk_size prompt_lookup_num_tokens renormalize_logits sequence_bias speculation_type "
                    "stop_strings target_lookbehind token_healing use_mtp watermarking_config chat_format max_window_size "
                    "user_token_id assistant_token_id generation_mode max_context_size stop_words_ids"
                )
            }
        ),
    }
)


def reason(key: str, scope: Scope) -> str:
    """Returns why a key does not matter here; empty if it matters or is unknown."""
    groups = (*_EVERYWHERE.items(), *_BY_SCOPE[scope].items())
    return next((why for why, keys in groups if key in keys), "")


def fate(key: str, scope: Scope, also: Collection[Scope] = ()) -> Fate:
    """Tells what happens to a key of one kind of configuration.

    Args:
        also: other scopes whose keys stand in the same object, as in the flat config.json of released weights.
    """
    scopes = (scope, *also)
    nested = {*NESTED["decoder"], *NESTED["tower"], *OTHER_PARTS}
    if (
        any(key in COMPARED[each] for each in scopes)
        or key in PACKED
        or key in DROPOUT
        or key in ABSENT
        or key in nested
    ):
        return "compared"
    return "irrelevant" if any(reason(key, each) for each in scopes) else "unknown"
