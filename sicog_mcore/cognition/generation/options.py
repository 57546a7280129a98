"""Options of a generation run are checked here before anything heavy is imported.

In: a command line, or a loop   Out: GenerationOptions   Next: generate.py
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sicog_mcore.cognition.prompts import Prompt, find_prompt, load_prompts
from sicog_mcore.errors import ConfigError, ConfigProblem, RecordError
from sicog_mcore.flags import flag
from sicog_mcore.rollout.requests import Sampling


def read_prompt_count(word: str) -> tuple[str, int]:
    """Returns the prompt and the number of its candidates that a word such as ``cod=2`` names.

    Raises:
        ArgumentTypeError: it names none.
    """
    name, _, count = word.partition("=")
    if not name or not count.isdecimal():
        raise ArgumentTypeError(f"found {word!r}, expected a prompt and its candidates, e.g. cod=2")
    return name, int(count)


def prompt_count_word(prompt: tuple[str, int]) -> str:
    """Returns the word that ``read_prompt_count`` reads."""
    return f"{prompt[0]}={prompt[1]}"


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The options of one generation run.

    Attributes:
        checkpoint: output folder of a training run, or one of its ``step_N`` folders.
        rows: .json or .jsonl files of LLaVA rows; labels are not needed.
        images: folder that the rows' image paths are relative to.
        prompts: prompts and candidates of each.
        sampling: how tokens are drawn.
        seed: of the run; every candidate derives its own.
        out: folder of the records.
        batch: items that a replica of the model answers at the same time.
        engine: who answers: our own model, or vLLM with embeddings from our tower.
        tensor: ranks that share a replica of the model.
        precision: that of the checkpoint by default.
        tokenizer: that of the checkpoint by default.
        limit: so many items at most; 0 for all.
        price_per_gpu_hour: for the cost, in any currency; 0 for unknown.
        tokens_per_s: of one replica, for the time a dry run states; 0 for unknown.
        dry_run: only say what would be done, and about what it takes.
    """

    checkpoint: Path
    rows: tuple[Path, ...]
    images: Path
    prompts: tuple[tuple[str, int], ...] = flag(parse=read_prompt_count, write=prompt_count_word, metavar="ID=COUNT")
    sampling: Sampling = flag(needs_all=True)
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
    dry_run: bool = False

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
