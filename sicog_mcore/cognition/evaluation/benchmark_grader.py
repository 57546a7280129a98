"""A benchmark as questions for a model in training, and its answers judged as tools/evaluate.py judges them.

In: HeldOutConfig   Out: Requests, the accuracy of Results   Next: train/held_out_check.py (asks), judging.py (judges)
Rows and images are written as ``tools/evaluate.py prepare`` writes them, so the same questions can be asked again later.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sicog_mcore.cognition.evaluation.benchmark import read_items, write_rows
from sicog_mcore.cognition.evaluation.judging import Judging, judge
from sicog_mcore.cognition.generation.item_records import RecordFacts, split_items
from sicog_mcore.cognition.generation.items import read_items as read_rows
from sicog_mcore.cognition.prompts import find_prompt
from sicog_mcore.config import HeldOutConfig
from sicog_mcore.rollout.engine import NATIVE
from sicog_mcore.rollout.requests import Request, Result, Sampling

SEED = 0  # greedy answers do not depend on it


class BenchmarkGrader:
    """The questions of ``config.benchmark`` and their references.

    Args:
        folder: for rows.jsonl and images/.

    Raises:
        RecordError: no such benchmark, no such prompt, or rows or images that cannot be used.
    """

    def __init__(self, config: HeldOutConfig, folder: Path):
        prompt = find_prompt(config.prompt)
        sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=config.max_new_tokens)
        self._references = read_items(config.benchmark)
        write_rows(config.benchmark, Path(config.images), folder)
        self._items = {item.id: item for item in read_rows([folder / "rows.jsonl"], folder)}
        self._facts = RecordFacts(((prompt, 1),), sampling, SEED, NATIVE, "the model in training")
        self._requests, self._refused = split_items(self._facts, list(self._items.values()))

    def questions(self) -> tuple[Sequence[Request], Sampling]:
        """Every question that can be asked; the others count as wrong."""
        return self._requests, self._facts.sampling

    def accuracy(self, results: Sequence[Result]) -> tuple[float, int]:
        """The mean over all questions, and their number."""
        records = [self._facts.record(self._items[result.id], result) for result in (*results, *self._refused)]
        by_id = {record.id: record for record in records}
        outcomes = judge(self._references, by_id, self._facts.prompts[0][0].id, Judging())
        return sum(outcome.value for outcome in outcomes) / len(outcomes), len(outcomes)
