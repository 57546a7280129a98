"""Computes the next-token loss over supervised positions: a sum and a count, never a local mean.

In: logits [t_s, 1, v / tensor]   Out: (loss_sum, count); train/step.py divides once, over all ranks and micro-batches.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor

from sicog_mcore.data.batch import IGNORED_LABEL, PackedBatch


def supervised_rows(labels: Tensor) -> Tensor:
    """Returns the positions that have something to predict: int64 [t_s], of labels [t]."""
    return (labels != IGNORED_LABEL).nonzero().squeeze(-1)


def owners(batch: PackedBatch, rows: Tensor) -> Tensor:
    """The segment that each position belongs to: int64 in the shape of ``rows``; a search, nothing waits for the device."""
    return torch.searchsorted(batch.cu_seqlens.long(), rows, right=True) - 1


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes the cross entropy of each supervised position in fp32, over the vocabulary shards of all ranks.

    Args:
        logits: [t_s, 1, v / tensor].
        labels: int64 [t_s].

    Returns:
        [t_s]
    """
    # In fp32: a sum of exponentials over 150,000 logits loses digits in bf16 that the gradient of the loss needs.
    return vocab_parallel_cross_entropy(logits.float(), labels.unsqueeze(-1)).squeeze(-1)
