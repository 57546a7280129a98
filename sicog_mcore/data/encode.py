"""A sample as numbers: text, labels, patch rows, and which visual token goes where.

In: Sample   Out: Measured (headers only), EncodedSample (pixels too)   Next: packing.py
Both come from the same token stream, so what was measured is what is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sicog_mcore.config import DataConfig, ModelConfig
from sicog_mcore.data.batch import IGNORED_LABEL, EncodedSample, Segment
from sicog_mcore.data.chat import IMAGE_MARKER, Chat, ChatTokens, find_separators
from sicog_mcore.data.decode import decode_image, read_bytes, read_size, read_stored_size
from sicog_mcore.data.pairs import conversations
from sicog_mcore.data.patches import cut_patches
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample, Size, Turn
from sicog_mcore.data.slicing import COMMA, NEWLINE, SlicePlan, VisualLayout, lay_out, plan_slices
from sicog_mcore.data.text_bound import num_bytes
from sicog_mcore.errors import SampleError

MAX_CHARACTER_BYTES = 4  # of UTF-8
TEXT = -1  # in _Stream.rows: this position is no visual token


@dataclass(frozen=True)
class Measured:
    """Numbers of tokens and slices that a sample takes of the budgets.

    Attributes:
        num_tokens: tokens with visual ones, of all its answer segments.
        num_slices: slices, once for all segments.
        attention: sum of the squared lengths of the segments (tokens squared).
        image_sizes: upright size of each image (px).
    """

    id: str
    num_tokens: int
    num_slices: int
    attention: int
    is_truncated: bool
    image_sizes: tuple[Size, ...] = ()


@dataclass(frozen=True)
class _Stream:
    """The token stream of one sample.

    Attributes:
        tokens: int64 [s].
        supervised: bool [s].
        rows: int64 [s]; row of the resampler's output [k * q] that replaces the token, or TEXT.
    """

    tokens: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    rows: NDArray[np.int64]

    def part(self, start: int, stop: int) -> _Stream:
        return _Stream(self.tokens[start:stop], self.supervised[start:stop], self.rows[start:stop])


class Encoder:
    """Encodes samples for one model; picklable, so that workers can have it.

    Args:
        model: slicing and sizes.
        data: tokenizer, template, budgets and limits.
    """

    def __init__(self, model: ModelConfig, data: DataConfig) -> None:
        self._model = model
        self._data = data
        self.token_budget = data.token_budget
        self.chat = Chat(data.tokenizer, data.template, data.system_prompt)
        separators = find_separators(self.chat.tokenizer, model.slicing.separators)
        self._separator_ids = {NEWLINE: separators.newline, COMMA: separators.comma}

    def measure(self, sample: Sample) -> Measured:
        """Length of a sample, from its text and the headers of its images.

        Raises:
            SampleError: whatever makes the sample unusable and can be seen without decoding pixels.
        """
        plans = [self._plan_stored(image) for image in sample.images]
        chats = self._tokenize(sample)
        num_visual = sum(self._lay_out(plan).num_tokens for plan in plans)
        lengths = full = [len(chat.ids) - len(plans) + num_visual for chat in chats]
        has_labels = all(True in chat.supervised[1:] for chat in chats)
        if sum(full) > self._data.token_budget or _num_slices(plans) > self._data.slice_budget or not has_labels:
            # Only the streams themselves tell what is left of them.
            lengths = [len(part.tokens) for part in self._fit([self._write(chat, plans) for chat in chats])]
        return Measured(
            id=sample.id,
            num_tokens=sum(lengths),
            num_slices=_num_slices(plans),
            attention=sum(length**2 for length in lengths),
            is_truncated=sum(lengths) < sum(full),
            image_sizes=tuple(plan.image for plan in plans),
        )

    def encode(self, sample: Sample) -> EncodedSample:
        """The sample with its pixels cut into patches; as many tokens and slices as ``measure`` says.

        Raises:
            SampleError: as ``measure``, and images whose pixels cannot be decoded.
        """
        chats = self._tokenize(sample)
        images = [read_bytes(image) for image in sample.images]
        plans = [self._plan(image) for image in images]
        streams = self._fit([self._write(chat, plans) for chat in chats])
        return self._assemble(sample.id, streams, plans, self._cut(images, plans), sample.weights)

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """The sample without its last answer, open for generation; no position is supervised.

        Raises:
            SampleError: as ``encode``.
        """
        turns = sample.turns[:-1] if sample.turns[-1].role == "assistant" else sample.turns
        return self.encode_prompts(sample.id, sample.images, [turns])[0]

    def encode_prompts(
        self, id: str, images: Sequence[ImageRef], prompts: Sequence[Sequence[Turn]]
    ) -> list[EncodedSample]:
        """Several prompts about the same images, open for generation; the images are decoded once.

        Args:
            id: of the sample, for messages.
            images: in the order of their placeholders, which each conversation has all of.
            prompts: turns of each, the last one a user's.

        Raises:
            SampleError: as ``encode``; too_long only where a text alone surely exceeds the token budget.
        """
        for turns in prompts:
            self._refuse_long([turns])
        raw = [read_bytes(image) for image in images]
        plans = [self._plan(image) for image in raw]
        streams = [self._write(self.chat.open_prompt(turns), plans) for turns in prompts]
        patches = self._cut(raw, plans)
        return [self._assemble(id, [stream], plans, patches) for stream in streams]

    def measure_prompts(self, images: Sequence[ImageRef], prompts: Sequence[Sequence[Turn]]) -> tuple[int, int]:
        """Measures prompts: tokens, with the common prefix counted once, and slices; no pixel is decoded.

        Raises:
            SampleError: as ``measure``.
        """
        for turns in prompts:
            self._refuse_long([turns])
        plans = [self._plan_stored(image) for image in images]
        streams = [self._write(self.chat.open_prompt(turns), plans).tokens for turns in prompts]
        shortest = min(len(stream) for stream in streams)
        differs = np.any([stream[:shortest] != streams[0][:shortest] for stream in streams], axis=0)
        common = int(differs.argmax()) if differs.any() else shortest
        return common + sum(len(stream) - common for stream in streams), _num_slices(plans)

    def _tokenize(self, sample: Sample) -> list[ChatTokens]:
        """The conversations as tokens. What surely exceeds the budget is refused before that, or cut if it may be cut."""
        told = conversations(sample)
        if self._data.too_long == "truncate" and len(told) == 1 and told[0][-1].role == "assistant":
            *prompt, answer = told[0]
            self._refuse_long([prompt])
            told = [(*prompt, replace(answer, text=self._shorten(answer.text)))]
        else:
            self._refuse_long(told)
        return [self.chat.tokenize(turns) for turns in told]

    def _refuse_long(self, told: Sequence[Sequence[Turn]]) -> None:
        """Refuses conversations that cannot fit together; no text is tokenised for that."""
        texts, limit = [turn.text for turns in told for turn in turns], self._data.token_budget
        if sum(map(len, texts)) * MAX_CHARACTER_BYTES <= limit or (bound := self.chat.tokenizer.bound) is None:
            return
        texts = [text.replace(IMAGE_PLACEHOLDER, "") for text in texts]
        least = sum(map(bound.least_tokens, texts))
        if least > limit:
            found = f"{sum(map(num_bytes, texts)):,} bytes of text are at least {least:,} tokens"
            raise SampleError("too_long", f"{found}, at most {limit} fit; raise data.token_budget")

    def _shorten(self, answer: str) -> str:
        """The beginning of an answer that is far too long: surely more than the budget, which ``_fit`` cuts it to."""
        bound = self.chat.tokenizer.bound if len(answer) > self._data.token_budget else None
        if bound is None:
            return answer
        kept = (self._data.token_budget + 1) * bound.bytes_per_token(answer) + MAX_CHARACTER_BYTES
        return answer.encode()[:kept].decode(errors="ignore") if num_bytes(answer) > kept else answer

    def _cut(self, images: Sequence[bytes], plans: Sequence[SlicePlan]) -> Tensor:
        """Patches of all slices of all images: uint8 [p, 3 * patch_px**2]."""
        no_pixels = torch.empty(0, self._model.tower.patch_dim, dtype=torch.uint8)
        return torch.cat(
            [no_pixels, *(cut_patches(decode_image(i, self._data), p) for i, p in zip(images, plans, strict=True))]
        )

    def _assemble(
        self,
        id: str,
        streams: Sequence[_Stream],
        plans: Sequence[SlicePlan],
        patches: Tensor,
        weights: Sequence[float] = (),
    ) -> EncodedSample:
        """The conversations of a sample one after the other; all of them show the same slices.

        Args:
            weights: one for each stream; () where all are 1.
        """
        stream = _join(streams)
        is_visual = stream.rows != TEXT
        return EncodedSample(
            id=id,
            tokens=torch.from_numpy(stream.tokens),
            labels=torch.from_numpy(np.concatenate([_shifted_labels(part) for part in streams])),
            patches=patches,
            grids=torch.tensor([size for plan in plans for size in plan.encoded], dtype=torch.int64).reshape(-1, 2),
            image_slots=torch.from_numpy(np.flatnonzero(is_visual)),
            visual_rows=torch.from_numpy(stream.rows[is_visual]),
            num_images=len(plans),
            segments=tuple(
                Segment(len(part.tokens), weight)
                for part, weight in zip(streams, weights or [1.0] * len(streams), strict=True)
            ),
        )

    def _plan(self, image: bytes) -> SlicePlan:
        return plan_slices(read_size(image, self._data), self._model.slicing, self._model.tower.patch_px)

    def _plan_stored(self, image: ImageRef) -> SlicePlan:
        """Plans the slices of an image whose pixels nobody needs; only its header is read."""
        return plan_slices(read_stored_size(image, self._data), self._model.slicing, self._model.tower.patch_px)

    def _write(self, chat: ChatTokens, plans: list[SlicePlan]) -> _Stream:
        """Puts each image's visual tokens and separators where its marker stands."""
        ids, supervised = np.array(chat.ids, dtype=np.int64), np.array(chat.supervised, dtype=np.bool_)
        markers = np.flatnonzero(ids == IMAGE_MARKER).tolist()
        if _num_slices(plans) > self._data.slice_budget:
            found = f"{_num_slices(plans)} slices, at most {self._data.slice_budget} fit"
            raise SampleError("too_many_slices", f"{found}; raise data.slice_budget or lower model.slicing.max_slices")
        text = _Stream(ids, supervised, np.full_like(ids, TEXT))
        parts: list[_Stream] = []
        start = first_row = 0
        for marker, plan in zip(markers, plans, strict=True):
            parts += [text.part(start, marker), self._write_image(plan, first_row)]
            start = marker + 1
            # The resampler's output [k * q] counts on over all images of the sample.
            first_row += len(plan.encoded) * self._model.resampler.queries
        parts.append(text.part(start, len(ids)))
        return _join(parts)

    def _write_image(self, plan: SlicePlan, first_row: int) -> _Stream:
        """The stream of one image, whose first slice's output starts at ``first_row``."""
        layout = self._lay_out(plan).rows
        tokens = np.full_like(layout, self.chat.pad_id)
        for separator, token in self._separator_ids.items():
            tokens[layout == separator] = token
        rows = np.where(layout >= 0, layout + first_row, TEXT)
        return _Stream(tokens, np.zeros(len(layout), dtype=np.bool_), rows)

    def _lay_out(self, plan: SlicePlan) -> VisualLayout:
        return lay_out(plan, self._model.resampler.query_grid, self._model.slicing.layout)

    def _fit(self, streams: list[_Stream]) -> list[_Stream]:
        """Holds a sample's streams against the token budget and makes sure that something is left to learn.

        A group of several answers is never cut: its loss compares whole answers.
        """
        length, limit = _length(streams), self._data.token_budget
        if length > limit:
            last = streams[-1]
            is_fixed = self._data.too_long == "quarantine" or len(streams) > 1
            # Cut where some of the last answer stays, and no visual token goes: half an image would be learnt as a
            # whole one.
            if is_fixed or limit <= _last_answer(last) or (last.rows[limit:] != TEXT).any():
                raise SampleError("too_long", f"{length} tokens, at most {limit} fit; raise data.token_budget")
            streams = [last.part(0, limit)]
        # A first token has no position before it that could predict it.
        if not all(stream.supervised[1:].any() for stream in streams):
            raise SampleError("no_labels", "no token is supervised; the sample needs an answer of the assistant")
        return streams


def _join(parts: Sequence[_Stream]) -> _Stream:
    return _Stream(
        tokens=np.concatenate([part.tokens for part in parts]),
        supervised=np.concatenate([part.supervised for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
    )


def _length(streams: list[_Stream]) -> int:
    return sum(len(stream.tokens) for stream in streams)


def _num_slices(plans: list[SlicePlan]) -> int:
    return sum(len(plan.encoded) for plan in plans)


def _last_answer(stream: _Stream) -> int:
    """Where the last answer starts; the stream's end if there is none."""
    starts = np.flatnonzero(np.diff(stream.supervised, prepend=False) & stream.supervised)
    return int(starts[-1]) if len(starts) else len(stream.tokens)


def _shifted_labels(stream: _Stream) -> NDArray[np.int64]:
    """For each position the token after it, where that one is supervised."""
    labels = np.full_like(stream.tokens, IGNORED_LABEL)
    labels[:-1] = np.where(stream.supervised[1:], stream.tokens[1:], IGNORED_LABEL)
    return labels
