"""Megatron's faults that are mended here, on a GPU as well as without one; each says until which version it is needed.

In: Megatron's classes   Out: the same, mended for this process   Next: padding.py (the description of padded buckets)
A test of each holds the unmended code against the fault, and fails with the version of Megatron that no longer has it.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def install_fixes() -> None:
    """Mends Megatron in this process; safe to call more than once."""
    if not hasattr(DistributedOptimizer.load_state_dict, "__wrapped__"):
        _repair_adam_step()


def _repair_adam_step() -> None:
    """Gives every parameter its own Adam step again after Megatron's distributed optimizer loaded a state.

    Without Transformer Engine or Apex, torch's AdamW is used, which keeps a tensor ``step`` per parameter. Megatron (1) does
    not expect that key when it loads a reshardable checkpoint and (2) makes all parameters share one tensor, which then
    advances once per parameter: the resumed run drifts without an error. Both are in megatron-core 0.16.1 and 0.19.2; no
    issue of Megatron's names them, https://github.com/vllm-project/vime/pull/427 describes them.
    """
    optimizer: Any = DistributedOptimizer
    set_states, load_state = optimizer._set_main_param_and_optimizer_states, optimizer.load_state_dict

    @wraps(set_states)
    def set_states_with_step(self: Any, model_param: Any, tensors: dict) -> Any:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        step = {"step": state["step"]} if "step" in state and "step" not in tensors else {}
        return set_states(self, model_param, {**step, **tensors})

    @wraps(load_state)
    def load_state_with_own_steps(self: Any, state_dict: dict) -> None:
        load_state(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    optimizer._set_main_param_and_optimizer_states = set_states_with_step
    optimizer.load_state_dict = load_state_with_own_steps
