"""normalise_patches against its formula, written out in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sicog_kernels import normalise_patches

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP
FP32_ERROR = 1e-6
SHAPES = [(1, 3), (5, 3 * 49), (7, 3 * 14**2), (0, 3 * 14**2)]


def random_patches(shape: tuple[int, int]) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def exact(patches: Tensor) -> Tensor:
    channels = patches.double().chunk(3, dim=1)
    return torch.cat([(x / 255 - m) / s for x, m, s in zip(channels, MEAN, STD, strict=True)], dim=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_result_is_the_formula(shape: tuple[int, int]) -> None:
    patches = random_patches(shape)
    result = normalise_patches(patches, MEAN, STD, torch.float32)
    assert result.dtype == torch.float32 and result.shape == patches.shape and result.is_contiguous()
    torch.testing.assert_close(result.double(), exact(patches), rtol=FP32_ERROR, atol=FP32_ERROR)


def test_rows_are_channel_major() -> None:
    rows = torch.tensor([[255, 255, 0, 0, 0, 0], [0, 0, 0, 0, 255, 0]], dtype=torch.uint8)
    result = normalise_patches(rows, (0.0, 0.5, 1.0), (1.0, 0.5, 0.25), torch.float32)
    assert result.tolist() == [[1, 1, -1, -1, -4, -4], [0, 0, -1, -1, 0, -4]]


def test_bf16_is_rounded_once_from_fp32() -> None:
    patches = random_patches((7, 3 * 14**2))
    full, half = (normalise_patches(patches, MEAN, STD, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(half, full.bfloat16())


def test_non_contiguous_rows_and_a_second_run_give_the_same_result() -> None:
    patches = random_patches((10, 3 * 49))
    expected = normalise_patches(patches[::2].contiguous(), MEAN, STD, torch.float32)
    assert torch.equal(normalise_patches(patches[::2], MEAN, STD, torch.float32), expected)
    assert torch.equal(normalise_patches(patches[::2], MEAN, STD, torch.float32), expected)


@pytest.mark.parametrize("patches", [torch.zeros(2, 6), torch.zeros(2, 7, dtype=torch.uint8), torch.zeros(6).byte()])
def test_wrong_rows_are_refused(patches: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[p, 3 \* P\]"):
        normalise_patches(patches, MEAN, STD, torch.float32)
