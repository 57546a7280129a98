"""Scales pixels to the numbers that the vision tower was trained on.

In: uint8 patch rows (PackedBatch.patches)   Out: normalised rows   Next: sicog_mcore/model/vision_tower.py
Pixels travel as uint8, a quarter of the bytes of fp32, and become floating point only on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

Channels = tuple[float, float, float]


def normalise_patches(patches: Tensor, mean: Channels, std: Channels, dtype: torch.dtype) -> Tensor:
    """Scales pixels to [0, 1] and normalises each channel.

        out[i, c * P + j] = (patches[i, c * P + j] / 255 - mean[c]) / std[c]

    computed in fp32 and rounded once, to ``dtype``. Elementwise, hence deterministic. Pixels have no gradient, so
    nothing is saved for a backward pass.

    Args:
        patches: uint8 [p, 3 * P]; P pixels per patch, channel-major: P entries of red, then green, then blue.
        mean: of each channel, for pixels in [0, 1].
        std: of each channel, for pixels in [0, 1].
        dtype: of the result.

    Returns:
        [p, 3 * P], contiguous, on the device of ``patches``.

    Raises:
        ValueError: not uint8, or a row that is not three channels of equal length.
    """
    if patches.dtype != torch.uint8 or patches.dim() != 2 or patches.shape[1] % len(mean):
        raise ValueError(
            f"patches are {patches.dtype} {list(patches.shape)}, expected uint8 [p, 3 * P]; "
            "pass the rows as the loader made them, one patch each"
        )
    per_channel = patches.shape[1] // len(mean)  # P
    shift, scale = torch.tensor((mean, std), dtype=torch.float32, device=patches.device).unbind(0)  # [3], [3]
    # Rows are channel-major, so one axis splits into channels and pixels, and shift and scale broadcast over the
    # pixels.
    pixels = patches.unflatten(1, (len(mean), per_channel)).float() / 255  # [p, 3, P]
    return ((pixels - shift[:, None]) / scale[:, None]).to(dtype).flatten(1)  # [p, 3 * P]
