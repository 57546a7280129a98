"""Megatron's CUDA code path on the CPU: what names a CUDA device gets a CPU tensor, and Adam keeps a step per parameter."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from sicog_mcore.parallel.cpu import CudaMeansCpu, NullStream, install_cpu_support
from tests.dist import Rank, run_ranks


def test_a_request_for_cuda_gives_the_cpu() -> None:
    with CudaMeansCpu():
        tensors = [
            torch.zeros(2, device="cuda"),
            torch.zeros(2, device="cuda:1"),
            torch.zeros(2, device=torch.device("cuda", 0)),
            torch.zeros(2).to("cuda"),
            torch.zeros(2).cuda(),
            torch.empty(2, pin_memory=True),
        ]
        assert [tensor.device.type for tensor in tensors] == ["cpu"] * 6
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"  # by which optimizers tell parameters apart
        assert torch.zeros(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(2, dtype=torch.int64).type() == "torch.LongTensor"
        assert torch.zeros(2).type(torch.float64).dtype == torch.float64


def test_a_stream_does_nothing_whatever_it_is_asked() -> None:
    with NullStream(device=0) as stream:
        stream.wait_event(NullStream(enable_timing=True))
        assert stream.synchronize() is None


def _installed(_: Rank) -> Mapping[str, object]:
    install_cpu_support()
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    once = DistributedOptimizer.load_state_dict
    install_cpu_support()
    torch.cuda.synchronize()
    torch.cuda.manual_seed(5)
    drawn = torch.rand(3, device="cuda").tolist()
    torch.manual_seed(5)
    return {
        "same": DistributedOptimizer.load_state_dict is once,
        "drawn alike": drawn == torch.rand(3).tolist(),
        "device": str(torch.cuda.current_device()),
    }


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU keeps its own meanings")
def test_installing_twice_changes_nothing_more() -> None:
    (found,) = run_ranks(_installed, 1)  # a process of its own: what is installed stays
    assert found == {"same": True, "drawn alike": True, "device": "cpu"}
