"""Which samples share a packed sequence, and their joining into one batch.

In: (tokens, slices) of samples; EncodedSample   Out: groups of samples; PackedBatch   Next: loader.py
Pure functions: the same sizes give the same packs everywhere. A sample is never split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PackPlan:
    """One packed sequence before anything is decoded: its place in the stream, and the rows of the data set in it."""

    epoch: int
    window: int
    pack: int
    members: tuple[int, ...]


@dataclass
class _OpenPack:
    tokens_left: int
    slices_left: int
    members: list[int] = field(default_factory=list)

    def fits(self, tokens: int, slices: int) -> bool:
        return tokens <= self.tokens_left and slices <= self.slices_left

    def add(self, member: int, tokens: int, slices: int) -> None:
        self.members.append(member)
        self.tokens_left -= tokens
        self.slices_left -= slices


def pack_window(sizes: Sequence[tuple[int, int]], token_budget: int, slice_budget: int) -> list[list[int]]:
    """Best-fit decreasing under two budgets: the largest samples first, each into the fullest pack that still takes it.

    Args:
        sizes: (tokens, slices) of each sample.
        token_budget: most tokens in a pack.
        slice_budget: most slices in a pack.

    Returns:
        Positions in ``sizes``, pack by pack; each exactly once, ascending inside a pack.

    Raises:
        ValueError: a sample alone exceeds a budget.
    """

    def share(position: int) -> float:
        tokens, slices = sizes[position]
        return max(tokens / token_budget, slices / slice_budget)

    packs: list[_OpenPack] = []
    for position in sorted(range(len(sizes)), key=share, reverse=True):
        tokens, slices = sizes[position]
        if tokens > token_budget or slices > slice_budget:
            budgets = f"{token_budget} tokens and {slice_budget} slices"
            raise ValueError(f"sample {position} has {tokens} tokens and {slices} slices, a pack takes {budgets}")
        roomy = [pack for pack in packs if pack.fits(tokens, slices)]
        if not roomy:
            packs.append(_OpenPack(token_budget, slice_budget))
            roomy = packs[-1:]
        min(roomy, key=lambda pack: pack.tokens_left).add(position, tokens, slices)
    return [sorted(pack.members) for pack in packs]
