"""What a generation run is asked to do, checked before anything heavy is imported.

In: the command line of launch/generate.py   Out: GenerationOptions   Next: generate.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sicog_mcore.cognition.prompts import Prompt, find_prompt, load_prompts
from sicog_mcore.errors import ConfigError, ConfigProblem, RecordError
from sicog_mcore.rollout.requests import Sampling


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """One run.

    Attributes:
        checkpoint: output folder of a training run, or one of its ``step_N`` folders.
        rows: .json or .jsonl files of LLaVA rows.
        images: folder that their image paths are relative to.
        prompts: (id, candidates) of each prompt.
        seed: of the run; each candidate derives its own.
        out: folder of the records.
        batch: items that a copy of the model answers at the same time.
        engine: our own model, or vLLM with embeddings from our tower.
        tensor: ranks that share a copy of the model.
        precision: None for that of the checkpoint.
        tokenizer: empty for that of the checkpoint.
        limit: so many items at most; 0 for all.
        price_per_gpu_hour: 0 for unknown.
        tokens_per_s: drawn by one copy of the model, for the estimate of a dry run; 0 for unknown.
    """

    checkpoint: Path
    rows: tuple[Path, ...]
    images: Path
    prompts: tuple[tuple[str, int], ...]
    sampling: Sampling
    seed: int
    out: Path
    batch: int
    engine: Literal["native", "vllm"] = "native"
    tensor: int = 1
    precision: Literal["bf16", "fp32"] | None = None
    tokenizer: str = ""
    limit: int = 0
    price_per_gpu_hour: float = 0.0
    tokens_per_s: float = 0.0

    @property
    def uses(self) -> tuple[tuple[Prompt, int], ...]:
        return tuple((find_prompt(name), count) for name, count in self.prompts)

    def check(self) -> None:
        """Raises ConfigError with every problem that can be seen without reading rows or weights."""
        problems = [*self._check_numbers(), *self._check_prompts()]
        for name, path in (("checkpoint", self.checkpoint), ("images", self.images)):
            if not path.is_dir():
                problems.append(ConfigProblem(name, str(path), "is no folder", "correct the path"))
        problems += [
            ConfigProblem("rows", str(path), "does not exist", "correct the path")
            for path in self.rows
            if not path.is_file()
        ]
        if problems:
            raise ConfigError(problems)

    def _check_numbers(self) -> Iterator[ConfigProblem]:
        draw = self.sampling
        rules = (
            ("temperature", draw.temperature, draw.temperature >= 0, "give 0 or more"),
            ("top-p", draw.top_p, 0 < draw.top_p <= 1, "give more than 0 and at most 1"),
            ("top-k", draw.top_k, draw.top_k >= 0, "give 0 for all tokens, or a number of them"),
            ("max-new-tokens", draw.max_new_tokens, draw.max_new_tokens >= 1, "give 1 or more"),
            ("seed", self.seed, self.seed >= 0, "give 0 or more"),
            ("batch", self.batch, self.batch >= 1, "give 1 or more"),
            ("tensor", self.tensor, self.tensor >= 1, "give 1 or more"),
            ("limit", self.limit, self.limit >= 0, "give 0 for all items, or a number of them"),
            ("price-per-gpu-hour", self.price_per_gpu_hour, self.price_per_gpu_hour >= 0, "give 0 or more"),
            ("tokens-per-s", self.tokens_per_s, self.tokens_per_s >= 0, "give 0 or more"),
        )
        for name, value, holds, fix in rules:
            if not holds:
                yield ConfigProblem(name, value, "is out of range", fix)

    def _check_prompts(self) -> Iterator[ConfigProblem]:
        tasks = set()
        for name, count in self.prompts:
            try:
                tasks.add(find_prompt(name).task)
            except RecordError:
                yield ConfigProblem("prompts", name, "is no prompt", f"use one of {', '.join(load_prompts())}")
            if count < 1:
                yield ConfigProblem("prompts", f"{name}={count}", "asks for no candidate", "give 1 or more")
        names = [name for name, _ in self.prompts]
        if len(set(names)) < len(names) or not names:
            yield ConfigProblem("prompts", names, "must name each prompt once", "write e.g. cod=2 caption=1")
        if len(tasks) > 1:
            yield ConfigProblem("prompts", names, "mix captions and answers", "make a run of its own for each")
