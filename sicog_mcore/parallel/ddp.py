"""Model chunks -> Megatron's DistributedDataParallel and distributed optimizer (ZeRO-1), and the gradient finish.

In: model chunks   Out: TrainableModel   Next: param_groups.py, gradient_sums.py, train/step.py, checkpoint/store.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sicog_mcore.config import Experiment, OptimConfig, ParallelConfig
from sicog_mcore.errors import CheckpointError
from sicog_mcore.parallel.gradient_sums import sum_replicated_grads
from sicog_mcore.parallel.padding import count_foreign_masters, own_weights, repair_description
from sicog_mcore.parallel.param_groups import PARTS, ModelChunk, freeze_parts, group_overrides, mark_parts
from sicog_mcore.parallel.topology import Topology


@dataclass(frozen=True)
class TrainableModel:
    """The chunks of this rank, their gradient buffers, and the optimizer over them.

    With ``overlap_param_gather`` each data-parallel rank has, after a step, only its own share of the new weights; the rest
    arrives during the next forward pass of ``wrapped``. Whoever reads or writes weights in any other way goes through
    ``chunks``, which settles them before.

    Attributes:
        wrapped: for the schedules alone (DistributedDataParallel).
        optimizer: megatron.core.optimizer.MegatronOptimizer.
    """

    _chunks: tuple[ModelChunk, ...]
    wrapped: tuple[Any, ...]
    optimizer: Any
    config: TransformerConfig
    topology: Topology
    weight_decay: float

    @property
    def chunks(self) -> tuple[ModelChunk, ...]:
        """The chunks of this rank with the weights of the last step. Collective under ``overlap_param_gather``."""
        self.settle()
        return self._chunks

    def settle(self) -> None:
        """Brings every parameter of this rank to the last step; nothing arrives later. Collective under the same option."""
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def zero_grad(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def scale_gradients(self, factor: float) -> None:
        """Multiplies all gradients of this rank, after they were summed over ranks and before they are clipped."""
        for chunk in self.wrapped:
            chunk.scale_gradients(factor)

    def set_learning_rate(self, lr: float) -> None:
        """Gives each group its share of the scheduled learning rate and of the weight decay."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.weight_decay * group["wd_mult"]  # Megatron leaves this to its own scheduler

    @property
    def _trains_here(self) -> bool:
        """Whether this rank has a parameter that is trained; a pipeline stage of a frozen decoder has none."""
        return any(p.requires_grad for chunk in self._chunks for part in PARTS for p in chunk.parameters_of(part))

    def allocate_optimizer_state(self) -> None:
        """Creates Adam's moments, which otherwise appear at the first step; loading a checkpoint needs them before."""
        for member in self.optimizer.chained_optimizers:
            inner = member.optimizer
            if not inner.state:
                member.init_state_fn(inner, member.config)
            if isinstance(
                inner, torch.optim.Adam | torch.optim.AdamW
            ):  # Megatron expects Apex's or TE's, without a step
                for state in inner.state.values():
                    state.setdefault("step", torch.tensor(0.0))

    def sharded_optimizer_state(
        self, chunks: dict[str, Any], is_loading: bool, metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """Megatron's description of the optimizer; nothing on a rank that trains nothing, which Megatron cannot describe."""
        if not self._trains_here:
            return {}
        return {"optimizer": self.optimizer.sharded_state_dict(chunks, is_loading=is_loading, metadata=metadata)}

    def load_weights(self, states: Sequence[dict[str, Any]]) -> None:
        """Fills the chunks, one state each, and the optimizer's fp32 masters from them. Collective."""
        for chunk, state in zip(self.chunks, states, strict=True):
            chunk.load_state_dict(state, strict=True)
        if self._trains_here:
            self.optimizer.reload_model_params()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Takes masters, moments and steps of a checkpoint; betas and epsilon stay those of this run. Collective.

        The weights become what the masters say: a checkpoint may have been written while weights were a step behind.

        Raises:
            CheckpointError: masters are not those of the weights, which ``load_weights`` has filled before.
        """
        members = self.optimizer.chained_optimizers if self._trains_here else ()
        weights = [own_weights(member) for member in members]
        if self._trains_here:
            configured = [(group["betas"], group["eps"]) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state)
            for group, (betas, eps) in zip(self.optimizer.param_groups, configured, strict=True):
                group["betas"], group["eps"] = betas, eps
        foreign = sum(count_foreign_masters(member, own) for member, own in zip(members, weights, strict=True))
        total = self.topology.sum_over_world(torch.tensor(foreign, device=self.topology.device))
        if total:
            raise CheckpointError(
                f"the optimizer state of this checkpoint belongs to other weights ({int(total)} shares of tensors), as an "
                "older version wrote it; its weights are right: start a new run from them with init.checkpoint"
            )
        self.settle()
        for member in members:
            member._copy_main_params_to_model_params()  # of this rank's share
        for chunk in self.wrapped:
            chunk.start_param_sync(force_sync=True)

    def optimizer_step(self, may_apply: bool = True) -> tuple[bool, float]:
        """Clips and applies the gradients, if they are finite; otherwise weights and moments stay. The same on all ranks.

        Args:
            may_apply: False only measures the gradients.

        Returns:
            whether the step was taken, and the gradient norm.
        """
        norms: list[float] = []
        optimizer = self.optimizer
        prepare, measure = optimizer.prepare_grads, optimizer.get_grad_norm

        def prepare_and_judge() -> bool:
            refused = prepare()
            norms.append(measure())
            return refused or not may_apply or not math.isfinite(norms[0])

        # Megatron looks for what is not finite only where it scales the loss (fp16), and would write it into the weights.
        # Its step asks this first, and goes no further if told so; the norm, a collective, is measured once for both.
        optimizer.prepare_grads, optimizer.get_grad_norm = prepare_and_judge, lambda: norms[0]
        try:
            done = optimizer.step()[0]
        finally:
            del optimizer.prepare_grads, optimizer.get_grad_norm
        return bool(done), float(norms[0])

    def optimizer_tensors(self) -> list[Tensor]:
        """Masters and moments that this rank keeps."""
        kept: list[Tensor] = []
        for member in self.optimizer.chained_optimizers:
            inner = member.optimizer
            for parameter, state in inner.state.items() if inner is not None else ():
                kept += [parameter, *(value for value in state.values() if isinstance(value, Tensor))]
        return kept


def wrap_model(
    chunks: Sequence[ModelChunk], config: TransformerConfig, experiment: Experiment, topology: Topology
) -> TrainableModel:
    """Builds gradient buffers and optimizer; sets Megatron's hooks on ``config``."""
    freeze_parts(chunks, experiment.optim.freeze)
    parallel = experiment.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0, pg_collection=topology.groups)
        for i, chunk in enumerate(chunks)
    ]
    mark_parts(chunks)
    optimizer = get_megatron_optimizer(
        _optimizer_config(experiment.optim, parallel, experiment.train.precision),
        wrapped,
        config_overrides=group_overrides(experiment.optim),
        use_gloo_process_groups=False,
        pg_collection=topology.groups,
    )
    for member in optimizer.chained_optimizers:
        repair_description(member)
    model = TrainableModel(tuple(chunks), tuple(wrapped), optimizer, config, topology, experiment.optim.weight_decay)
    _set_schedule_hooks(config, model, parallel)
    return model


def _optimizer_config(optim: OptimConfig, parallel: ParallelConfig, precision: str) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        # set_learning_rate() replaces these in every step. Megatron tells groups of a checkpoint apart by the rate given
        # here (0.19), so it must not be one that a user may change between two runs.
        lr=0.0,
        min_lr=0.0,
        weight_decay=0.0,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad_norm,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=parallel.overlap_param_gather,
    )


def _set_schedule_hooks(config: TransformerConfig, model: TrainableModel, parallel: ParallelConfig) -> None:
    def finish(chunks: list, num_tokens: Tensor | None = None, pg_collection: Any = None, **options: Any) -> None:
        finalize_model_grads(chunks, num_tokens, pg_collection=model.topology.groups, **options)
        sum_replicated_grads(model._chunks, model.topology.groups.tp)

    config.finalize_model_grads_func = finish
    config.grad_scale_func = model.optimizer.scale_loss
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model.wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
