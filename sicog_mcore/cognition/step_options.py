"""Options of the steps that make files of files: what each is asked to do, as the command line and the loop both hold it.

In: a command line or a loop   Out: options   Next: commands/ (what is done with them), loop/workflow.py
Generation has its own in generation/options.py. Words that stand for values of several parts, such as ``cod=0.9``, are
kept as they were written; the step reads them and reports all mistakes together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sicog_mcore.cognition.curation.conversations import RowForm
from sicog_mcore.cognition.curation.datasets import Format
from sicog_mcore.flags import flag
from sicog_mcore.presets import PRESETS

JudgeMetric = Literal["auto", "exact", "numeric", "choice", "yes_no", "attributes"]
PER_PROMPT = ("NUMBER", "PROMPT=NUMBER")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options that a training stage takes: files of values, and values on top of them, see cli.py.

    Attributes:
        config: YAML files, read in order.
        values: by dotted path, e.g. {"train.steps": 80}; they win over the files.
    """

    config: tuple[str, ...] = ()
    values: Mapping[str, Any]

    def words(self) -> Sequence[str]:
        """The command line of the configuration: files, then one word for each value."""
        files = [word for file in self.config for word in ("--config", file)]
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.values.items()}
        return [*files, *(f"{name}={text}" for name, text in texts.items())]


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """Options that ``join-records`` takes.

    Attributes:
        generations: records, .jsonl or .parquet.
        scores: their scores, in the same order.
        out: folder of the round.
    """

    generations: tuple[Path, ...]
    scores: tuple[Path, ...]
    out: Path

    def mistake(self) -> str:
        """Names the mistake that several options make together; empty if they make none."""
        if len(self.scores) == len(self.generations):
            return ""
        return f"found {len(self.generations)} generations and {len(self.scores)} scores; give as many"


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options that ``score`` takes.

    Attributes:
        generations: records of candidates, .jsonl or .parquet.
        out: records of scores to write, .jsonl or .parquet.
        scorer: tfidf, sentence:FOLDER_OR_WHEEL, decoder:FOLDER, vote, or attributes:FILE.
        views: the same items from other views of the images.
        across: compare all candidates, or by style.
        pooling: JSON settings of a decoder: append_eos, max_tokens, pooling, precision.
        batch: texts that a model sees at once.
        device: of a model: auto, cpu, cuda, cuda:1 ...
        shard: only embed, part I (from 0) of N.
        merge: only score; every shard has to be there.
    """

    generations: Path
    out: Path
    scorer: str = "tfidf"
    views: tuple[str, ...] = flag((), metavar="NAME=FILE")
    across: Literal["styles", "within"] = "styles"
    pooling: Path | None = None
    batch: int = 64
    device: str = "auto"
    shard: str | None = flag(None, metavar="I/N", group="work")
    merge: bool = flag(False, group="work")


@dataclass(frozen=True, kw_only=True)
class CurationRules:
    """Which rows are made of a round and what is kept: all that curation may be told beside its files and thresholds.

    Attributes:
        text: LLaVA rows without images, to be mixed in.
        min_tokens: least length of a winner.
        max_tokens: largest length of a winner; 0 for any.
        max_repetition: largest share of repeated runs of four words in a step.
        image_radius: bits of 64 in which repeated images may differ; -1: equal bytes.
        evaluation_radius: the same for images of the evaluation.
        text_similarity: from which on texts are repeated; 0 compares none.
        text_min_words: shorter texts are never compared.
        min_kept: fewer training rows end with exit code 17.
        min_share: so does a smaller share of items that pass all filters.
        max_share: and a larger one.
        forms: rows that are made of each item.
        formats: files in curated/.
        mix: ratio of rows by kind, caption, answer or text; unnamed: none.
        pair_margin: by which a rejected answer scores lower.
        pair_length_ratio: by which chosen and rejected may differ in length.
        workers: threads that decode images; the result does not depend on them.
    """

    text: Path | None = None
    min_tokens: tuple[str, ...] = flag(("2",), metavar=PER_PROMPT)
    max_tokens: tuple[str, ...] = flag(("0",), metavar=PER_PROMPT)
    max_repetition: float = 0.3
    image_radius: int = 4
    evaluation_radius: int = 8
    text_similarity: float = 0.9
    text_min_words: int = 20
    min_kept: int = 1
    min_share: float = 0.05
    max_share: float = 1.0
    forms: tuple[RowForm, ...] = ("chain",)
    formats: tuple[Format, ...] = ("jsonl",)
    mix: tuple[str, ...] = flag((), metavar="KIND=PART")
    pair_margin: float = 0.05
    pair_length_ratio: float = 1.5
    workers: int = 4


@dataclass(frozen=True, kw_only=True)
class CurateOptions:
    """Options that ``curate`` takes.

    Attributes:
        round: folder of the round; receives what is written.
        images: folder that the items' image paths are relative to.
        tau: least score of a winner, e.g. 0.85 cod=0.9 plain=0.8 (ids or styles of prompts).
        source: instead of --tau and the round's own files; SCORES TAU may come again, then each scorer may object.
        evaluation: images, folders or TSV files of evaluation images; nothing like them is kept.
        rules: what is made and kept.
        seed: of what is drawn and mixed.
    """

    round: Path
    images: Path
    tau: tuple[str, ...] = flag((), short="-t", metavar=PER_PROMPT)
    source: tuple[tuple[str, ...], ...] = flag((), metavar=("GENERATIONS", "SCORES TAU"), is_repeated=True)
    evaluation: tuple[Path, ...] = flag((), short="-e")
    rules: CurationRules = CurationRules()
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Options that ``evaluate prepare`` takes.

    Attributes:
        images: folder that the benchmark's image paths are relative to.
        benchmark: .tsv, .jsonl, easy-vqa:test or easy-vqa:train.
        out: folder to write to.
    """

    images: Path | None = None
    benchmark: str
    out: Path


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Options that ``evaluate score`` takes.

    Attributes:
        generations: generations.jsonl or .parquet.
        prompt: whose answers are judged; needed where several were asked.
        metric: auto: choice with options, yes_no by the reference, else exact.
        tolerance: of numeric, relative.
        vocabulary: of attributes, a JSON file: {"colour": ["red", ...], ...}.
        benchmark: .tsv, .jsonl, easy-vqa:test or easy-vqa:train.
        out: folder to write to.
        seed: of the bootstrap.
    """

    generations: Path
    prompt: str | None = None
    metric: JudgeMetric = "auto"
    tolerance: float = 0.05
    vocabulary: Path | None = None
    benchmark: str
    out: Path
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options that ``evaluate compare`` takes.

    Attributes:
        first: results.jsonl, or the folder that holds it.
        second: the same.
        out: JSON file for the numbers of the table.
        seed: of the bootstrap.
    """

    first: Path = flag(is_positional=True)
    second: Path = flag(is_positional=True)
    out: Path | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RoundReportOptions:
    """Options that ``report`` takes.

    Attributes:
        round: folder of the round.
        images: folder that the records' image paths are relative to.
        source: instead of the round's own files, as they were curated: again for each source, in the same order.
        out: file to write; ROUND/report.html without it.
        previous: folders of earlier rounds, oldest first.
        preset: model that cut the images.
        checkpoint: its step_N folder, or the output folder of its run.
        thresholds: drawn in the histograms; 0.8 0.85 0.9 without it.
        max_items: items shown in full; of more, a sample is.
        seed: of that sample.
    """

    round: Path
    images: Path
    source: tuple[tuple[Path, Path], ...] = flag((), metavar=("GENERATIONS", "SCORES"), is_repeated=True)
    out: Path | None = None
    previous: tuple[Path, ...] = ()
    preset: str | None = flag(None, choices=tuple(sorted(PRESETS)), group="model!")
    checkpoint: Path | None = flag(None, group="model!")
    thresholds: tuple[float, ...] = ()
    max_items: int = 500
    seed: int = 0

    def mistake(self) -> str:
        """Names the mistake in the options; empty if there is none."""
        for folder in (self.round, self.images, *self.previous):
            if not folder.is_dir():
                return f"{folder} is no folder"
        if self.max_items < 1:
            return f"--max-items is {self.max_items}; at least 1 is needed"
        if not all(0 <= threshold <= 1 for threshold in self.thresholds):
            return f"--thresholds are {list(self.thresholds)}; each must lie between 0 and 1"
        return ""
