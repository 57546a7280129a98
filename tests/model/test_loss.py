"""Losses of supervised positions, each by itself: a sum and a count, no mean."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from sicog_mcore.config import ParallelConfig
from sicog_mcore.data.batch import IGNORED_LABEL
from sicog_mcore.model.loss import supervised_rows, token_losses
from sicog_mcore.parallel.topology import start_topology, stop_topology


@pytest.fixture(autouse=True, scope="module")
def started() -> Iterator[None]:
    start_topology(ParallelConfig(), seed=0)
    yield
    stop_topology()


def test_supervised_rows_are_those_with_a_label_in_order() -> None:
    labels = torch.tensor([IGNORED_LABEL, 5, 0, IGNORED_LABEL, 7])
    assert supervised_rows(labels).tolist() == [1, 2, 4]
    assert supervised_rows(torch.full((3,), IGNORED_LABEL)).shape == (0,)


def test_each_loss_is_the_cross_entropy_of_its_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 1, 50, generator=generator) * 5, torch.randint(0, 50, (7,), generator=generator)
    expected = F.cross_entropy(logits[:, 0], labels, reduction="none")
    torch.testing.assert_close(token_losses(logits.clone(), labels), expected)


def test_gradient_is_that_of_the_sum() -> None:
    logits, labels = torch.randn(4, 1, 9, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 0, 8, 3])
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_losses(ours, labels).sum().backward()
    F.cross_entropy(theirs[:, 0], labels, reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_bf16_logits_give_fp32_losses() -> None:
    assert token_losses(torch.zeros(2, 1, 8, dtype=torch.bfloat16), torch.tensor([1, 2])).dtype == torch.float32


def test_nothing_supervised_gives_an_empty_loss_that_can_go_backward() -> None:
    logits = torch.empty(0, 1, 8, requires_grad=True)
    losses = token_losses(logits, torch.empty(0, dtype=torch.int64))
    assert losses.shape == (0,) and float(losses.sum()) == 0
    losses.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 1, 8)
