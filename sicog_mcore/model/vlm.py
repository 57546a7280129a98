"""Joins the multimodal model: tower, resampler, splice, decoder, loss, each in its own file.

In: PackedBatch   Out: losses of supervised positions (last stage) or hidden states   Next: train/step.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from sicog_mcore.config import Experiment, ModelPart
from sicog_mcore.data.batch import PackedBatch
from sicog_mcore.model.attention import packed_sequences
from sicog_mcore.model.capability import AttentionBackend, LayerKind
from sicog_mcore.model.decoder import build_decoder
from sicog_mcore.model.layers import EXTRA_STATE, plain_name
from sicog_mcore.model.loss import supervised_rows, token_losses
from sicog_mcore.model.resampler import Resampler
from sicog_mcore.model.splice import share_slices, splice
from sicog_mcore.model.vision_tower import VisionTower, tower_transformer_config


@dataclass(frozen=True)
class StagePlan:
    """The parts that one model chunk builds.

    Attributes:
        pre_process: has tower, resampler and embedding table.
        post_process: has the output head.
        vp_stage: Megatron's virtual stage; None for the plain schedule.
        groups: process groups of the decoder.
        tower_groups: the same with a tensor-parallel group of one rank.
        layers: "te" or "local", from the capability report.
        attention: back end of packed attention.
    """

    pre_process: bool
    post_process: bool
    vp_stage: int | None
    groups: ProcessGroupCollection
    tower_groups: ProcessGroupCollection
    layers: LayerKind
    attention: AttentionBackend


class VisionLanguageModel(MegatronModule):
    """One pipeline chunk of the model.

    The decoder is named ``language_model`` because Megatron's schedules take any attribute ``decoder`` for a
    TransformerBlock.
    """

    def __init__(self, experiment: Experiment, config: TransformerConfig, plan: StagePlan):
        super().__init__(config)
        model = experiment.model
        self.model_config = model
        self.groups = plan.groups
        self.pre_process, self.post_process, self.vp_stage = plan.pre_process, plan.post_process, plan.vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = model.decoder.tie_embeddings
        self.language_model = build_decoder(
            model.decoder,
            config,
            plan.groups,
            plan.layers,
            plan.attention,
            plan.pre_process,
            plan.post_process,
            plan.vp_stage,
        )
        self.tower: VisionTower | None = None
        self.resampler: Resampler | None = None
        if plan.pre_process:
            tower_config = tower_transformer_config(model.tower, config.params_dtype, experiment.train.recompute_tower)
            self.tower = VisionTower(model.tower, tower_config, plan.layers, plan.attention, plan.tower_groups)
            self.resampler = Resampler(model.resampler, model.tower.hidden, model.decoder.hidden, config.params_dtype)
        if not config.use_cpu_initialization:
            self.cuda()  # what Megatron did not create there: tower, resampler, the local norms
        self.register_load_state_dict_post_hook(_forgive_extra_states)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Returns the table whose gradients Megatron sums over pipeline stages when embeddings are tied."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, tensor: Tensor | list[Tensor]) -> None:
        """Takes the hidden states of the stage before; Megatron's schedules call it."""
        self.language_model.set_input_tensor(tensor)

    def parameters_of(self, part: ModelPart) -> list[torch.nn.Parameter]:
        """Returns the parameters of one part on this stage; none where the part is on another stage."""
        module = self.language_model if part == "decoder" else self.tower if part == "tower" else self.resampler
        return [] if module is None else list(module.parameters())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, object]:
        """Describes this chunk to Megatron's distributed checkpoints; tower and resampler are replicated.

        The names in the checkpoint, and so which entries it has, are the same for both kinds of layers: each loads the
        other's. Extra states, which matter for fp8 only, are left out.
        """
        state = self.language_model.sharded_state_dict(f"{prefix}language_model.", sharded_offsets, metadata)
        state = {name: entry for name, entry in state.items() if EXTRA_STATE not in name}
        for part, module in (("tower", self.tower), ("resampler", self.resampler)):
            if module is not None:
                # Entries are made under the plain names, so that both kinds of layers write the same checkpoint, and are
                # handed back under the local names, by which Megatron fills this module.
                local = {f"{part}.{n}": t for n, t in module.state_dict(keep_vars=True).items() if EXTRA_STATE not in n}
                entries = make_sharded_tensors_for_checkpoint(
                    {plain_name(name): tensor for name, tensor in local.items()},
                    prefix,
                    tp_group=self.groups.tp,
                    dp_cp_group=self.groups.dp_cp,
                )
                state |= {f"{prefix}{name}": entries[f"{prefix}{plain_name(name)}"] for name in local}
        return state

    def forward(self, batch: PackedBatch) -> Tensor:
        """Runs this stage.

        Returns:
            last stage: fp32 [t_s] losses of supervised positions; other stages: hidden states [t', 1, h].
        """
        hidden = self.hidden_states(batch)
        if not self.post_process:
            return hidden
        # Rows are chosen before the head: logits [t, v] of a whole pack would be the largest tensor of the step.
        rows = supervised_rows(batch.labels)
        logits = self.language_model.project(hidden, rows)  # [t_s, 1, v / tensor]
        return token_losses(logits, batch.labels[rows])

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Embeds text and images on the first stage and runs the decoder layers of this stage: [t', 1, h]."""
        embeddings = self.embed(batch) if self.pre_process else None
        borders = packed_sequences(batch.cu_seqlens, batch.max_seqlen)
        return self.language_model(embeddings, batch.positions, borders)

    def embed(self, batch: PackedBatch) -> Tensor:
        """Returns embeddings of text with visual tokens in their places, on the first stage only: [t', 1, h]."""
        text = self.language_model.embedding(batch.tokens[None], batch.positions[None])  # [t', 1, h]
        visual = self.encode_images(batch)  # [r, h]
        first_position = self.groups.tp.rank() * text.shape[0] if self.config.sequence_parallel else 0
        return splice(text, visual, batch.image_slots, batch.visual_rows, first_position)

    def encode_images(self, batch: PackedBatch) -> Tensor:
        """Encodes all slices: visual tokens [r, h], slice i in rows i*q to (i+1)*q; rows of blank slices at the end."""
        assert self.tower is not None and self.resampler is not None, "images are encoded on the first stage only"
        tensor = self.groups.tp
        share = share_slices(batch.patches, batch.grids, tensor.rank(), tensor.size())
        features = self.tower(share.patches, share.grids)  # [p', c]
        visual = self.resampler(features, share.grids).flatten(0, 1)  # [k' * q, h]
        if tensor.size() == 1:
            return visual
        # Under sequence parallelism a rank back-propagates only the rows it spliced in: sum over ranks. Without it every
        # rank already holds the full gradient: take one's own part.
        return gather_from_sequence_parallel_region(
            visual, tensor_parallel_output_grad=self.config.sequence_parallel, group=tensor
        )


def _forgive_extra_states(_: torch.nn.Module, keys: Any) -> None:
    """Lets Transformer Engine's layers load checkpoints without extra states, see ``sharded_state_dict``."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if EXTRA_STATE not in key]
