"""The native engine: our own model answers many items at a time from one KV cache.

In: Request per item   Out: Result per item, in the order they are done   Next: generate.py (records), parity.py
An item takes one slot; its prompts are read once and all its answers are drawn together. As soon as a quarter of the slots
is free, new items move in, so a long answer keeps nobody waiting but its own item.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sicog_mcore import __version__
from sicog_mcore.data.batch import EncodedSample
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, Turn
from sicog_mcore.errors import SampleError
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.rollout.kv_cache import CachedDecoder, PromptTree, join_prompts
from sicog_mcore.rollout.requests import Answer, Counters, Finish, Request, Result, Sampling, harmless
from sicog_mcore.rollout.sampling import draw, log_probs, random_numbers

NATIVE = f"native {__version__}"
READERS = 2  # threads that decode and slice images ahead
REFILL = 4  # new items move in when one slot of so many is free


def encode_request(encoder: Encoder, request: Request) -> list[EncodedSample]:
    """Encodes the prompts of an item, exactly as training would.

    Raises:
        SampleError: an image cannot be used, or the prompts do not have one placeholder for each.
    """
    for prompt in request.prompts:
        if prompt.count(IMAGE_PLACEHOLDER) != len(request.images):
            found = f"{prompt.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} for {len(request.images)} images"
            raise SampleError("image_count_mismatch", f"{found} in {prompt!r:.80}; write one per image")
    return encoder.encode_prompts(request.id, request.images, [(Turn("user", text),) for text in request.prompts])


@dataclass
class _Row:
    """One answer in the making.

    Attributes:
        numbers: fp64, one for each token that may come; empty where none are needed.
    """

    prompt: int
    numbers: NDArray[np.float64]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: Finish | None = None


@dataclass
class _Item:
    request: Request
    tree: PromptTree
    rows: list[_Row]

    @property
    def is_done(self) -> bool:
        return all(row.finish is not None for row in self.rows)


Encoded = tuple[Request, PromptTree | SampleError]


class NativeEngine:
    """Answers with our Megatron-Core model and its KV cache.

    Args:
        model: the only chunk of a model without pipeline stages, with its weights.
        encoder: of the configuration that the model was trained with.
        slots: items that are answered at the same time.
    """

    def __init__(self, model: VisionLanguageModel, encoder: Encoder, topology: Topology, slots: int):
        self.model = model.eval()
        self.encoder = encoder
        self.topology = topology
        self.slots = slots
        self.counters = Counters()

    @property
    def name(self) -> str:
        return NATIVE

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Result]:
        """One result per request, in the order they are done."""
        if not requests:
            return
        answers = max(sum(map(len, request.seeds)) for request in requests)
        slots = min(self.slots, len(requests))
        decoder = CachedDecoder(self.model, slots, answers)
        with ThreadPoolExecutor(READERS) as pool:
            ahead = ReadAhead(pool, self.encoder, requests, 2 * slots)
            yield from _Session(self, decoder, ahead, sampling, answers, slots).run()


class _Session:
    """The state of one call of ``generate``: the item in each slot, and its answers so far."""

    def __init__(
        self,
        engine: NativeEngine,
        decoder: CachedDecoder,
        ahead: ReadAhead,
        sampling: Sampling,
        answers: int,
        slots: int,
    ):
        self._topology, self._chat, self._counters = engine.topology, engine.encoder.chat, engine.counters
        self._decoder, self._ahead, self._sampling, self._answers = decoder, ahead, sampling, answers
        self._vocabulary = engine.model.model_config.decoder.vocab_size  # the table behind it is only padding
        self._ends = {self._chat.end_id, self._chat.pad_id}
        self._items: list[_Item | None] = [None] * slots
        self._has_more = True

    def run(self) -> Iterator[Result]:
        while True:
            free = [slot for slot, item in enumerate(self._items) if item is None]
            # Reading prompts holds up every answer under way. So new items wait until a quarter of the slots is free,
            # and are then read in one batch.
            if self._has_more and len(free) * REFILL >= len(self._items):
                yield from self._admit(free)
            elif len(free) == len(self._items):
                return
            else:
                self._step()
            # An item gives its slot back with its last answer; nothing in the cache has to be cleared for that.
            for slot, item in enumerate(self._items):
                if item is not None and item.is_done:
                    self._items[slot] = None
                    yield self._result(item)

    def _admit(self, free: Sequence[int]) -> Iterator[Result]:
        """Gives free slots to the next items; those that cannot be read are done at once."""
        # Read on one rank of each replica, for all of them: a file that fails on one rank only would part them.
        found = self._topology.share_object(self._ahead.take(len(free)) if self._topology.loads_data else None)
        self._has_more = bool(found)
        admitted: list[int] = []
        for request, content in found:
            if isinstance(content, SampleError):
                yield Result(request.id, failure=content.reason, detail=content.detail)
                continue
            # An item that cannot be read takes no slot, so slots are counted by those admitted.
            slot = free[len(admitted)]
            self._items[slot] = _Item(request, content, self._rows(request))
            admitted.append(slot)
        if admitted:
            self._read(admitted)

    def _rows(self, request: Request) -> list[_Row]:
        # All numbers of an answer are drawn before its first token: they then depend on its seed alone, not on its
        # neighbours.
        count = self._sampling.max_new_tokens if self._sampling.temperature else 0
        return [
            _Row(prompt, random_numbers(seed, count)) for prompt, seeds in enumerate(request.seeds) for seed in seeds
        ]

    def _read(self, slots: Sequence[int]) -> None:
        items = [item for slot in slots if (item := self._items[slot]) is not None]
        uses = [[row.prompt for row in item.rows] for item in items]
        logits = self._decoder.read(slots, [item.tree for item in items], uses)
        self._counters.prefill_tokens += sum(len(item.tree.tokens) for item in items)
        self._counters.slices += sum(len(item.tree.grids) for item in items)
        self._draw(logits, [row for item in items for row in item.rows])

    def _step(self) -> None:
        """One token more for every answer that has not ended."""
        open_rows = [
            (slot * self._answers + number, row)
            for slot, item in enumerate(self._items)
            if item is not None
            for number, row in enumerate(item.rows)
            if row.finish is None
        ]
        numbers, rows = zip(*open_rows, strict=True)
        self._draw(self._decoder.step(numbers, [row.tokens[-1] for row in rows]), rows)

    def _draw(self, logits: Tensor, rows: Sequence[_Row]) -> None:
        """Adds a token to each of these rows; every tensor-parallel rank adds the same."""
        numbers = [float(row.numbers[len(row.tokens)]) if len(row.numbers) else 0.0 for row in rows]
        # Rows of the table beyond the vocabulary are padding: a token without a meaning must not be drawn.
        drawn = draw(
            logits[:, : self._vocabulary],
            torch.tensor(numbers, dtype=torch.float64, device=logits.device),
            self._sampling,
        )
        # The ranks' logits may differ in the last bit. One different token would part their caches for good, so the
        # first rank's tokens count.
        drawn = self._topology.share_over_tensor(drawn)
        # Over all rows of the table, padding too, as the training loss has them: parity compares the two.
        found = zip(rows, drawn.tolist(), log_probs(logits, drawn).tolist(), strict=True)
        for row, token, log_prob in found:
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            if token in self._ends:
                row.finish = "stop"
            elif len(row.tokens) == self._sampling.max_new_tokens:
                row.finish = "length"
        self._counters.decode_tokens += len(rows)

    def _result(self, item: _Item) -> Result:
        answers: list[list[Answer]] = [[] for _ in item.request.prompts]
        for row in item.rows:
            assert row.finish is not None
            text = harmless(self._chat.decode(token for token in row.tokens if token not in self._ends))
            answers[row.prompt].append(Answer(tuple(row.tokens), text, tuple(row.log_probs), row.finish))
        self._counters.items += 1
        return Result(item.request.id, item.tree.prompt_lengths, tuple(map(tuple, answers)))


class ReadAhead:
    """Encodes prompts in threads, some of them before they are asked for.

    Args:
        pool: threads that read.
        most: items that wait, read, at any time.
    """

    def __init__(self, pool: ThreadPoolExecutor, encoder: Encoder, requests: Iterable[Request], most: int):
        self._pool, self._encoder, self._requests, self._most = pool, encoder, iter(requests), most
        self._waiting: deque[Future[Encoded]] = deque()

    def take(self, count: int) -> list[Encoded]:
        """Returns the next ``count`` items, fewer only at the end."""
        self._fill(count)
        taken = [self._waiting.popleft().result() for _ in range(min(count, len(self._waiting)))]
        self._fill(self._most)  # what is read while the model is busy
        return taken

    def _fill(self, count: int) -> None:
        for request in islice(self._requests, max(0, count - len(self._waiting))):
            self._waiting.append(self._pool.submit(self._read, request))

    def _read(self, request: Request) -> Encoded:
        try:
            return request, join_prompts(encode_request(self._encoder, request))
        # Returned, not raised: the rank that admits the item reports it, and the threads go on.
        except SampleError as error:
            return request, error
