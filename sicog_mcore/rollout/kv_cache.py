"""The KV cache of generation: the decoder reads an item's prompts once, and all its answers attend to the same keys.

In: PromptTree of each item, then one token per answer and step   Out: logits of the next tokens
Next: rollout/engine.py
An item has one row of keys and values: the tokens that its prompts share (images, as a rule), the suffix of each prompt,
then the tokens of all its answers in the order they come. A mask says which answer attends to which entry, so nothing is
computed or stored twice, and a step reads every key once, whatever the number of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample, PackedBatch
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.model.attention import CachedPass, PackedAttention
from sicog_mcore.model.vlm import VisionLanguageModel

ROUNDING = 64  # the length of a cache, and of the part that is read, is a multiple of so many entries


@dataclass(frozen=True)
class PromptTree:
    """The prompts of one item as a prefix tree: the prefix that they share, once, then the suffix of each.

    Attributes:
        tokens: int64 [s]; the first ``prefix`` are shared, the suffixes follow, one after the other.
        prefix: number of shared tokens; every prompt has at least one of its own.
        suffixes: lengths of the suffixes.
        patches, grids, image_slots, visual_rows: as in EncodedSample; slots are positions in ``tokens``.
    """

    tokens: Tensor
    prefix: int
    suffixes: tuple[int, ...]
    patches: Tensor
    grids: Tensor
    image_slots: Tensor
    visual_rows: Tensor

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        return tuple(self.prefix + suffix for suffix in self.suffixes)


def join_prompts(prompts: Sequence[EncodedSample]) -> PromptTree:
    """Joins the prompts of an item at their common prefix; all of them show the same slices."""
    first = prompts[0]
    # Every image slot holds the padding id, whatever it shows. So prompts are compared by token and visual row
    # together: a shared beginning never mixes two images up.
    contents = [_content(prompt) for prompt in prompts]  # token, and the visual row in its place: [s, 2]
    # Every prompt keeps at least its last token for itself: the logits of an answer's first token are read there.
    prefix = min(len(content) for content in contents) - 1
    for content in contents[1:]:
        differs = (content[:prefix] != contents[0][:prefix]).any(-1).nonzero()
        prefix = min(prefix, int(differs[0])) if len(differs) else prefix
    joined = torch.cat([contents[0][:prefix], *(content[prefix:] for content in contents)])
    # The slots are searched anew, for joining has moved them.
    slots = (joined[:, 1] >= 0).nonzero().squeeze(-1)
    return PromptTree(
        tokens=joined[:, 0].contiguous(),
        prefix=prefix,
        suffixes=tuple(len(content) - prefix for content in contents),
        patches=first.patches,
        grids=first.grids,
        image_slots=slots,
        visual_rows=joined[slots, 1],
    )


def _content(prompt: EncodedSample) -> Tensor:
    rows = torch.full_like(prompt.tokens, -1).index_copy(0, prompt.image_slots, prompt.visual_rows)
    return torch.stack([prompt.tokens, rows], dim=-1)


class LayerCache:
    """The KV cache of one layer: keys and values, [items, length, g, d] each."""

    def __init__(self) -> None:
        self.key = self.value = torch.empty(0)

    def write(self, at: Tensor, key: Tensor, value: Tensor, shape: tuple[int, int]) -> None:
        """Stores entries, in a cache that is first made as long as ``shape`` says.

        Args:
            at: int64 [t] places, items one after the other.
            key: [t, g, d]
            value: [t, g, d]
            shape: (items, length) of the cache.
        """
        self.key, self.value = self._grown(self.key, key, shape), self._grown(self.value, value, shape)
        # A view of [items * length, g, d], so that one flat index per token reaches every item's row.
        self.key.flatten(0, 1).index_copy_(0, at, key)
        self.value.flatten(0, 1).index_copy_(0, at, value)

    @staticmethod
    def _grown(old: Tensor, entry: Tensor, shape: tuple[int, int]) -> Tensor:
        if old.shape[:2] == shape:
            return old
        # Zeros, not empty memory: a masked value is multiplied by the weight 0, and 0 * NaN would be NaN.
        new = entry.new_zeros(*shape, *entry.shape[1:])
        if old.numel():
            new[:, : old.shape[1]] = old
        return new


@dataclass
class _CommonPass(CachedPass):
    """Packed attention over the common prefixes of some items; their keys and values go into the KV cache."""

    caches: Sequence[LayerCache] = ()
    shape: tuple[int, int] = (0, 0)
    at: Tensor | None = None  # int64 [t] place of each token in the cache

    def attend(self, core: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends within each sequence, by the back end that training uses: [t, n, d]."""
        assert self.at is not None
        self.caches[core.layer_number - 1].write(self.at, key, value, self.shape)
        return core.attend(query, key, value, self)


@dataclass
class _TreePass(CachedPass):
    """Attention of new tokens over the KV cache of their item, with a mask for each query.

    Attributes:
        at: int64 [t] place of each token in the cache.
        grid: int64 [t] place of each query among [items, queries].
        items: int64 [i] items whose cache is read; None for all.
        visible: bool [i, queries, seen], the mask: which entries a query attends to.
        mask: ``visible`` repeated for the heads that share a key; the first layer makes it for all layers.
    """

    caches: Sequence[LayerCache] = ()
    shape: tuple[int, int] = (0, 0)
    at: Tensor | None = None
    grid: Tensor | None = None
    items: Tensor | None = None
    visible: Tensor | None = None
    mask: Tensor | None = None

    def attend(self, core: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to the cache: [t, n, d]. Heads that share a key become further queries, so each key is read once."""
        assert self.at is not None and self.grid is not None and self.visible is not None
        cache = self.caches[core.layer_number - 1]
        # Written before reading: a new token attends to its own key too.
        cache.write(self.at, key, value, self.shape)
        num_items, queries, seen = self.visible.shape
        groups, heads, d = key.shape[1], query.shape[1] // key.shape[1], query.shape[2]
        if self.mask is None:
            # [i, 1, heads * queries, seen]. Head by head, as in ``grouped`` below; the axis of 1 is broadcast over the
            # g key heads.
            self.mask = self.visible.repeat(1, heads, 1)[:, None]
        # A step reads all items: slicing the cache copies nothing. Reading prompts picks the new items' rows, which
        # copies them.
        keys, values = (x[:, :seen] if self.items is None else x[self.items, :seen] for x in (cache.key, cache.value))
        # [t, n, d] -> [items * queries, n, d]. Items have different numbers of tokens; a place without a token stays
        # zero, and its output is never picked.
        padded = query.new_zeros(num_items * queries, *query.shape[1:]).index_copy(0, self.grid, query)
        # Grouped-query attention without repeating keys: [i, queries, g, heads, d] -> [i, g, heads * queries, d]. So a
        # step reads each key from memory once, for all heads of its group and all answers of its item.
        grouped = padded.view(num_items, queries, groups, heads, d).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(
            grouped,  # [i, g, heads * queries, d]
            keys.transpose(1, 2),  # [i, g, seen, d]
            values.transpose(1, 2),
            attn_mask=self.mask,
            scale=core.softmax_scale,
        )
        # Back to [items * queries, n, d], then only the places that hold a token: [t, n, d].
        out = out.view(num_items, groups, heads, queries, d).permute(0, 3, 1, 2, 4).reshape(padded.shape)
        return out.index_select(0, self.grid)


class CachedDecoder:
    """The model with its KV cache: it reads prompts once, and then answers token by token.

    Rows are answers: row ``item * answers + number``. An item's slot may be given to another at any time. All
    tensor-parallel ranks must make the same calls.

    Args:
        model: the only chunk of a model without pipeline stages.
        items: slots for items.
        answers: most answers of an item.

    Raises:
        ConfigError: the model is cut into pipeline stages.
    """

    def __init__(self, model: VisionLanguageModel, items: int, answers: int):
        if not (model.pre_process and model.post_process):
            fix = "set it to 1 for generation; checkpoints of any layout load"
            size = model.config.pipeline_model_parallel_size
            raise ConfigError([ConfigProblem("parallel.pipeline", size, "generation needs whole models", fix)])
        self._model = model
        self._items, self._answers = items, answers
        self._device = next(model.parameters()).device
        self._caches = [LayerCache() for _ in range(model.config.num_layers)]
        self._length = 0  # of the caches
        self._filled = [0] * items  # entries of each item
        self._position = [0] * (items * answers)  # of the next token of each row
        self._visible = torch.zeros(items, answers, 0, dtype=torch.bool, device=self._device)

    @torch.no_grad()
    def read(self, items: Sequence[int], trees: Sequence[PromptTree], uses: Sequence[Sequence[int]]) -> Tensor:
        """Reads the prompts of new items.

        Args:
            items: the slots they get.
            trees: their prompts.
            uses: for each item the prompt of each of its answers.

        Returns:
            fp32 [rows, v]: for every answer of every item the logits of its first token.
        """
        self._reserve(max(len(tree.tokens) for tree in trees))
        batch = _pack(trees, self._model.model_config.resampler.queries, self._device)
        embeddings = self._model.embed(batch)  # [t, 1, h]
        self._read_prefixes(items, trees, embeddings)
        hidden = self._read_suffixes(items, trees, embeddings)
        last, done = [], 0
        for item, tree, prompts in zip(items, trees, uses, strict=True):
            self._admit(item, tree, prompts)
            # ``hidden`` holds the suffixes of all items, one after the other; an answer starts at the last token of the
            # prompt it uses.
            ends = torch.tensor(tree.suffixes).cumsum(0) - 1 + done
            last.append(ends[list(prompts)])
            done += sum(tree.suffixes)
        return self._logits(hidden, torch.cat(last).to(self._device))

    @torch.no_grad()
    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One more token for each of these rows.

        Args:
            rows: distinct.
            tokens: as many.

        Returns:
            fp32 [len(rows), v] logits of the tokens after these.
        """
        # Room for one more token of every answer of the fullest item.
        self._reserve(max(self._filled[row // self._answers] for row in rows) + self._answers)
        places, positions = [], []
        for row in rows:
            # A token is appended to its item's row, whichever answer it belongs to. Its position, which rotary
            # embedding needs, counts along its own answer and not along the row.
            item = row // self._answers
            places.append(self._filled[item])
            positions.append(self._position[row])
            self._filled[item] += 1
            self._position[row] += 1
        # Entries behind the fullest row are not read. Rounding lets shapes repeat from step to step.
        seen = _rounded(max(places) + 1)
        numbers = torch.tensor([[*rows], places, positions, [*tokens]]).to(self._device)  # one copy to the device
        grid, place, position, token = numbers.unbind(0)
        # From now on the answer attends to its new token; the other answers of the item never do.
        self._visible.flatten(0, 1).index_put_((grid, place), torch.tensor(True, device=self._device))
        plan = _TreePass(
            qkv_format="sbhd",
            max_seqlen_q=_rounded(max(positions) + 1),
            caches=self._caches,
            shape=(self._items, self._length),
            at=grid // self._answers * self._length + place,
            grid=grid,
            visible=self._visible[:, :, :seen],
        )
        embeddings = self._model.language_model.embedding(token[None], position[None])
        hidden = self._model.language_model(embeddings, position, plan)
        return self._logits(hidden, torch.arange(len(rows), device=self._device))

    def _read_prefixes(self, items: Sequence[int], trees: Sequence[PromptTree], embeddings: Tensor) -> None:
        lengths = [tree.prefix for tree in trees]
        # First row of each item among the embeddings [t, 1, h] of all trees.
        starts = torch.tensor([0, *(len(tree.tokens) for tree in trees)]).cumsum(0)[:-1].tolist()
        rows = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
        if not len(rows):
            return
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self._device)
        # An item without a common prefix has no sequence in this pass.
        borders = torch.tensor([0, *(n for n in lengths if n)]).cumsum(0).to(torch.int32)
        plan = _CommonPass(
            qkv_format="sbhd",
            cu_seqlens_q=borders.to(self._device),
            cu_seqlens_kv=borders.to(self._device),
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            caches=self._caches,
            shape=(self._items, self._length),
            at=self._places(items, lengths) + positions,
        )
        self._model.language_model(embeddings[rows.to(self._device)], positions, plan)

    def _read_suffixes(self, items: Sequence[int], trees: Sequence[PromptTree], embeddings: Tensor) -> Tensor:
        lengths = [sum(tree.suffixes) for tree in trees]
        starts = torch.tensor([0, *(len(tree.tokens) for tree in trees)]).cumsum(0)[:-1].tolist()
        own = [torch.arange(tree.prefix, len(tree.tokens)) for tree in trees]  # places in the item's cache
        rows = torch.cat([start + places for start, places in zip(starts, own, strict=True)]).to(self._device)
        # Each suffix goes on counting where the common prefix ended, whatever suffix stands before it in the row of the
        # cache.
        positions = torch.cat([tree.prefix + _restarting(tree.suffixes) for tree in trees]).to(self._device)
        seen, queries = _rounded(max(len(tree.tokens) for tree in trees)), max(lengths)
        plan = _TreePass(
            qkv_format="sbhd",
            max_seqlen_q=_rounded(max(max(tree.prompt_lengths) for tree in trees)),
            caches=self._caches,
            shape=(self._items, self._length),
            at=self._places(items, lengths) + torch.cat(own).to(self._device),
            # [items, queries]: items with fewer tokens leave their last places empty.
            grid=torch.cat([i * queries + torch.arange(n) for i, n in enumerate(lengths)]).to(self._device),
            items=torch.tensor(list(items), device=self._device),
            visible=torch.stack([_visible_to_suffixes(tree, queries, seen) for tree in trees]).to(self._device),
        )
        return self._model.language_model(embeddings[rows], positions, plan)

    def _places(self, items: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Gives the flat place at which each item's row begins, once for every token: int64 [sum of lengths]."""
        first = torch.tensor(list(items)) * self._length
        return first.repeat_interleave(torch.tensor(list(lengths))).to(self._device)

    def _admit(self, item: int, tree: PromptTree, prompts: Sequence[int]) -> None:
        """Sets the mask of an item's answers, and their positions, as they are before the first token."""
        self._filled[item] = len(tree.tokens)
        # Keys of the item that had this slot before stay in memory; the mask hides them until they are overwritten.
        self._visible[item] = False
        self._visible[item, :, : tree.prefix] = True
        for number, prompt in enumerate(prompts):
            start = tree.prefix + sum(tree.suffixes[:prompt])
            self._visible[item, number, start : start + tree.suffixes[prompt]] = True
            self._position[item * self._answers + number] = tree.prompt_lengths[prompt]

    def _reserve(self, length: int) -> None:
        """Makes room for items of this length; each layer's cache follows when it is written to."""
        if length > self._length:
            # Growing copies the whole cache, so it grows by half at least: copies stay rare however long the answers
            # become.
            self._length = _rounded(max(length, self._length + self._length // 2))
            added = self._length - self._visible.shape[2]
            self._visible = F.pad(self._visible, (0, added))

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        cut = self._model.language_model.project(hidden, rows)  # [r, 1, v / tensor]
        return gather_from_tensor_model_parallel_region(cut, group=self._model.groups.tp)[:, 0].float()


@torch.no_grad()
def prompt_embeddings(model: VisionLanguageModel, trees: Sequence[PromptTree]) -> list[list[Tensor]]:
    """Embeds every prompt of every item for another engine: [s, h] each, images encoded once."""
    device = next(model.parameters()).device
    embeddings = model.embed(_pack(trees, model.model_config.resampler.queries, device))[:, 0]  # [t, h]
    found = []
    for tree, rows in zip(trees, embeddings.split([len(tree.tokens) for tree in trees]), strict=True):
        prefix, *suffixes = rows.split([tree.prefix, *tree.suffixes])
        found.append([torch.cat([prefix, suffix]) for suffix in suffixes])
    return found


def _rounded(length: int) -> int:
    return -(-length // ROUNDING) * ROUNDING


def _restarting(lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def _visible_to_suffixes(tree: PromptTree, queries: int, seen: int) -> Tensor:
    """Masks the suffixes: each attends to the common prefix and, causally, to itself: bool [queries, seen]."""
    visible = torch.zeros(queries, seen, dtype=torch.bool)
    # The common prefix comes before every suffix, so all of it is visible; queries behind the last suffix see nothing.
    visible[: sum(tree.suffixes), : tree.prefix] = True
    start = 0
    for length in tree.suffixes:
        # Blocks on the diagonal, each a lower triangle: a suffix never sees the suffix of another prompt.
        block = torch.ones(length, length, dtype=torch.bool).tril()
        visible[start : start + length, tree.prefix + start : tree.prefix + start + length] = block
        start += length
    return visible


def _pack(trees: Sequence[PromptTree], queries: int, device: torch.device) -> PackedBatch:
    """Packs all trees into one batch, with the fields that ``embed`` needs; a slice has ``queries`` visual tokens."""
    lengths = [len(tree.tokens) for tree in trees]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    slices = torch.tensor([0, *(len(tree.grids) for tree in trees)]).cumsum(0)
    tokens = torch.cat([tree.tokens for tree in trees])
    return PackedBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORED_LABEL),
        positions=_restarting(lengths),
        cu_seqlens=starts.to(torch.int32),
        patches=torch.cat([tree.patches for tree in trees]),
        grids=torch.cat([tree.grids for tree in trees]),
        # Both count from the start of their own tree: slots move by the tokens before it, rows by the resampler's
        # output [k * queries] of the slices before it.
        image_slots=torch.cat([tree.image_slots + starts[i] for i, tree in enumerate(trees)]),
        visual_rows=torch.cat([tree.visual_rows + queries * slices[i] for i, tree in enumerate(trees)]),
        group_sizes=torch.ones(len(trees), dtype=torch.int64),
        num_tokens=len(tokens),
        num_images=0,
        max_seqlen=max(lengths),
        sample_ids=(),
    ).to(device)
