"""Megatron-Core without CUDA: the one file that makes the GPU code path run on gloo. A no-op where CUDA exists.

Megatron names "cuda" as a device in many places. Under a TorchFunctionMode that word means the CPU; the few functions of
torch.cuda it calls get CPU meanings. The mode is off inside ``torch.autograd.backward``, so our own modules must never say
"cuda" in code that may be recomputed there.
Checked with megatron-core 0.16.1 and 0.19.2; delete a line here when upstream no longer needs it.
Faults that Megatron has on a GPU too are mended in upstream.py.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
# Megatron's optimizers tell parameters apart by the legacy name of their CUDA tensor type.
LEGACY_TYPE_NAMES = (
    ("torch.FloatTensor", "torch.cuda.FloatTensor"),
    ("torch.HalfTensor", "torch.cuda.HalfTensor"),
    ("torch.BFloat16Tensor", "torch.cuda.BFloat16Tensor"),
)


def _names_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class CudaMeansCpu(TorchFunctionMode):
    """Redirects every request for a CUDA tensor to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return dict(LEGACY_TYPE_NAMES).get(result, result)
        return result


class NullStream:
    """Stands in for a CUDA stream, an event, or the context manager that selects a stream."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __enter__(self) -> NullStream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _give_cuda_functions_cpu_meanings() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: NullStream()
    cuda.Stream = cuda.Event = cuda.stream = NullStream

    from megatron.core.tensor_parallel import random as megatron_random

    rng: Any = megatron_random
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # Megatron warns when the CPU generator moves inside its tracker; here that is the point.
    logging.getLogger(rng.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def install_cpu_support() -> None:
    """Makes Megatron-Core usable in this process when there is no CUDA device; safe to call more than once."""
    if not torch.cuda.is_available() and torch.cuda.Stream is not NullStream:
        _give_cuda_functions_cpu_meanings()
        CudaMeansCpu().__enter__()
