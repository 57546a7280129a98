"""Every kind of mapping moves every number exactly once, for any number of shards, and is its own inverse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sicog_mcore.checkpoint.mapping import (
    QKV,
    Fused,
    GatedMLP,
    Mapping,
    OneToOne,
    PaddedVocabulary,
    Target,
    Transfer,
    bind,
    matches,
)
from sicog_mcore.errors import CheckpointError

WIDTH, HEAD_DIM, GROUPS, QUERIES = 6, 3, 4, 2
QKV_ROWS = GROUPS * (QUERIES + 2) * HEAD_DIM
CASES: list[tuple[Mapping, tuple[int, ...], int]] = [
    (OneToOne("t", "s"), (8, WIDTH), 0),
    (OneToOne("t", "s"), (WIDTH, 8), 1),
    (OneToOne("t", "s"), (8,), 0),
    (QKV("t", ("q", "k", "v"), GROUPS, QUERIES), (QKV_ROWS, WIDTH), 0),
    (QKV("t", ("q", "k", "v"), GROUPS, QUERIES), (QKV_ROWS,), 0),
    (GatedMLP("t", ("gate", "up")), (16, WIDTH), 0),
    (PaddedVocabulary("t", "s", 11), (16, WIDTH), 0),
    (PaddedVocabulary("t", "s", 3), (16, WIDTH), 0),
    (PaddedVocabulary("t", "s", 16), (16, WIDTH), 0),
]


def transfer_of(mapping: Mapping, shape: tuple[int, ...], axis: int, shards: int) -> Transfer:
    return Transfer(mapping, Target("t", shape, axis, tuple(range(shards)), torch.float32), mapping.sources)


def numbered(transfer: Transfer) -> dict[str, Tensor]:
    """Sources in which no number occurs twice, and none is zero."""
    start, sources = 1, {}
    for name, shape in zip(transfer.sources, transfer.shapes, strict=True):
        size = torch.Size(shape).numel()
        sources[name] = torch.arange(start, start + size).float().reshape(shape)
        start += size
    return sources


def filled(transfer: Transfer, sources: dict[str, Tensor]) -> Iterator[Tensor]:
    for shard in range(transfer.target.shards):
        parameter = torch.full(transfer.target.shard_shape, torch.nan)
        transfer.fill(parameter, shard, lambda name, axis, start, length: sources[name].narrow(axis, start, length))
        yield parameter


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("mapping, shape, axis", CASES)
def test_every_number_arrives_once_and_comes_back(
    mapping: Mapping, shape: tuple[int, ...], axis: int, shards: int
) -> None:
    transfer = transfer_of(mapping, shape, axis, shards)
    sources = numbered(transfer)
    parts = list(filled(transfer, sources))
    arrived = torch.cat([part.flatten() for part in parts])
    sent = torch.cat([tensor.flatten() for tensor in sources.values()])
    assert torch.equal(arrived[arrived != 0].sort().values, sent)
    assert (arrived == 0).sum() == torch.Size(shape).numel() - sent.numel()
    back = transfer.assemble(parts)
    assert back.keys() == sources.keys()
    assert all(torch.equal(back[name], sources[name]) for name in sources)


def test_query_heads_stand_in_front_of_their_key_and_value_head() -> None:
    transfer = transfer_of(QKV("t", ("q", "k", "v"), GROUPS, QUERIES), (QKV_ROWS, WIDTH), 0, 1)
    sources = numbered(transfer)
    (parameter,) = filled(transfer, sources)
    groups = parameter.reshape(GROUPS, QUERIES + 2, HEAD_DIM, WIDTH)
    assert torch.equal(groups[:, :QUERIES].flatten(0, 2), sources["q"])
    assert torch.equal(groups[:, QUERIES].flatten(0, 1), sources["k"])
    assert torch.equal(groups[:, QUERIES + 1].flatten(0, 1), sources["v"])


def test_a_cut_of_the_gated_layer_holds_its_gate_and_then_its_up_projection() -> None:
    transfer = transfer_of(GatedMLP("t", ("gate", "up")), (16, WIDTH), 0, 2)
    sources = numbered(transfer)
    second = list(filled(transfer, sources))[1]
    assert torch.equal(second, torch.cat([sources["gate"][4:], sources["up"][4:]]))


def test_padding_of_the_vocabulary_is_zero_and_not_exported() -> None:
    transfer = transfer_of(PaddedVocabulary("t", "s", 11), (16, WIDTH), 0, 2)
    parts = list(filled(transfer, numbered(transfer)))
    assert not parts[1][3:].any() and parts[1][:3].all()
    assert transfer.assemble(parts)["s"].shape == (11, WIDTH)


def test_a_convolution_becomes_a_matrix_of_patches() -> None:
    transfer = transfer_of(Fused("t", "s"), (5, 3 * 4 * 4), 0, 1)
    assert transfer.shapes == ((5, 3, 4, 4),)
    sources = numbered(transfer)
    (parameter,) = filled(transfer, sources)
    image = torch.arange(48.0).reshape(1, 3, 4, 4)  # whole numbers, so both sides are exact
    convolved = torch.nn.functional.conv2d(image, sources["s"])[0, :, 0, 0]
    assert torch.equal(parameter @ image.flatten(), convolved)
    assert torch.equal(transfer.assemble([parameter])["s"], sources["s"])


def test_numbers_are_converted_to_the_dtype_of_the_parameter() -> None:
    transfer = transfer_of(OneToOne("t", "s"), (4,), 0, 1)
    parameter = torch.empty(4, dtype=torch.bfloat16)
    transfer.fill(parameter, 0, lambda *_: torch.full((4,), 1.001))
    assert parameter.dtype is torch.bfloat16 and parameter.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "pattern, name, number",
    [
        ("a.*.b", "a.12.b", "12"),
        ("a.*.b", "a.x.b", None),
        ("a.*.b", "aa.1.b", None),
        ("a.**", "a.1.b.c", ""),
        ("a.**", "ab", None),
    ],
)
def test_a_star_stands_for_a_layer_and_two_for_any_rest(pattern: str, name: str, number: str | None) -> None:
    match = matches(pattern, name)
    assert (match is not None) == (number is not None)
    if match and number:
        assert match.group(1) == number


def test_binding_numbers_the_layers_and_adds_the_prefix() -> None:
    target = Target("ours.7.w", (4,), 0, (0,), torch.float32)
    (transfer,) = bind((OneToOne("ours.*.w", "theirs.*.x"),), [target], "model.")
    assert transfer.sources == ("model.theirs.7.x",)


def test_a_parameter_without_a_row_is_an_error_that_names_it() -> None:
    target = Target("ours.7.v", (4,), 0, (0,), torch.float32)
    with pytest.raises(CheckpointError, match=r"ours\.7\.v \(0 rows\)"):
        bind((OneToOne("ours.*.w", "theirs.*.x"),), [target], "")
