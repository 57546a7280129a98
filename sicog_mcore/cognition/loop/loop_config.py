"""A self-improvement loop is configured by one YAML file, read strictly, all mistakes reported together.

In: YAML   Out: LoopConfig   Next: workflow.py (makes steps of it)
How models are trained stands in the files of the stages, see config.py; the loop adds first weights and curated data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sicog_mcore.cognition.step_options import CurationRules, JudgeMetric
from sicog_mcore.decoding import decode
from sicog_mcore.errors import ConfigError, ConfigProblem

WORDS_OF_CURATION = ("tau", "min_tokens", "max_tokens", "mix")
PLAIN_SCORERS, PLACED_SCORERS = ("tfidf", "vote"), ("sentence", "decoder", "attributes")


@dataclass(frozen=True, kw_only=True)
class ItemsConfig:
    """Items that the model is asked about; they need no labels.

    Attributes:
        images: folder that image paths are relative to.
        captions: files of LLaVA rows whose images are described.
        answers: files of LLaVA rows whose first questions are answered. Ids differ from those of ``captions``.
    """

    images: str
    captions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """How a stage is trained.

    Attributes:
        config: YAML files of a training run, read in order.
        set: values on top of them, by dotted path.
    """

    config: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """The training stages; output, first weights and curated data are set by the loop.

    Attributes:
        common: what all of them have in common, read first.
        perception, reasoning: stage 0, on annotated rows; one for each kind of items.
        align: stage 1.
        pretrain: stage 1.5; its data are the curated rows, or for the baseline those of ``finetune``.
        finetune: stage 2.
    """

    common: StageConfig = StageConfig()
    perception: StageConfig = StageConfig()
    reasoning: StageConfig = StageConfig()
    align: StageConfig = StageConfig()
    pretrain: StageConfig = StageConfig()
    finetune: StageConfig = StageConfig()


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How candidates are drawn.

    Attributes:
        captions, answers: prompts and their candidates, e.g. {cod: 2, caption: 1}.
        temperature, top_p, top_k, max_new_tokens: see records.Sampling.
        batch: items that a replica of the model answers at the same time.
        tensor: ranks that share a replica of the model.
    """

    captions: Mapping[str, int] = field(default_factory=lambda: {"cod": 2, "caption": 1})
    answers: Mapping[str, int] = field(default_factory=lambda: {"cot": 2, "direct": 1})
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 1200
    batch: int = 16
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Scorers of ``sicog score``.

    Attributes:
        captions, answers: tfidf, sentence:FOLDER_OR_WHEEL, decoder:FOLDER, vote, or attributes:FILE.
    """

    captions: str = "tfidf"
    answers: str = "vote"


@dataclass(frozen=True, kw_only=True)
class CurationConfig(CurationRules):
    """Which items are kept: the thresholds, and every rule of ``sicog curate`` by its name, e.g. ``image_radius: -1``.

    Attributes:
        tau: least agreement, for all prompts or by id or style, e.g. [cod=0.9, answer=0.8].
    """

    tau: tuple[str, ...] = ("0.85",)

    @property
    def rules(self) -> CurationRules:
        """Gives the rules that curation follows beside the thresholds."""
        return CurationRules(**{item.name: getattr(self, item.name) for item in fields(CurationRules)})


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Benchmarks that compare the new model with the baseline; both answer greedily.

    Attributes:
        benchmark: .tsv, .jsonl, easy-vqa:test or easy-vqa:train.
        images: folder that its image paths are relative to.
        prompt: whose answers are judged.
        metric: see ``sicog evaluate score --help``.
        max_new_tokens: of an answer.
    """

    benchmark: str
    images: str = "."
    prompt: str = "direct"
    metric: JudgeMetric = "auto"
    max_new_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """One loop, whole.

    Attributes:
        output: folder of everything that is written.
        items: what the model is asked about.
        stages: training.
        evaluation: what shows whether it helped.
        base: weights of the model that stage 0 warms up; empty for the baseline.
        rounds: from the second on, the model of the round before generates.
        seed: of generation and curation; stages have their own.
        generation, scoring, curation: how candidates become training data.
        report_items: items that the report shows in full.
    """

    output: str
    items: ItemsConfig
    stages: StagesConfig
    evaluation: EvaluationConfig
    base: str = ""
    rounds: int = 1
    seed: int = 42
    generation: GenerationConfig = GenerationConfig()
    scoring: ScoringConfig = ScoringConfig()
    curation: CurationConfig = CurationConfig()
    report_items: int = 500


def read_loop(path: Path) -> LoopConfig:
    """The loop that a YAML file describes.

    Raises:
        ConfigError: all that is wrong with the file, its fields and their values.
    """
    problems: list[ConfigProblem] = []
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text)
        problems += _repeated(yaml.compose(text, yaml.SafeLoader), "")
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = f"cannot be read: {' '.join(str(error).split())}"
        raise ConfigError([ConfigProblem("config", str(path), problem, "give a YAML file")]) from error
    if isinstance(value, dict):
        value, replaced = _today(value)
        problems += replaced
    config = decode(LoopConfig, value)
    if isinstance(config, list):
        raise ConfigError([*problems, *config])
    if not problems:
        problems += [*_check_values(config), *_check_words(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _today(value: Mapping[str, Any]) -> tuple[dict[str, Any], list[ConfigProblem]]:
    """The values with words of curation as text, and what an earlier version of the file still says."""
    curation = value.get("curation")
    if not isinstance(curation, dict):
        return dict(value), []
    # YAML reads 0.8 as a number; here it is a word, for cod=0.8 is one too.
    texts = {
        name: [str(word) if type(word) in (int, float) else word for word in words]
        for name, words in curation.items()
        if name in WORDS_OF_CURATION and isinstance(words, list)
    }
    problems = []
    if "options" in curation:
        known = ", ".join(item.name for item in fields(CurationRules))
        fix = f"write each as a field, e.g. image_radius: -1 for --image-radius -1; known here: {known}"
        problems.append(ConfigProblem("curation.options", curation["options"], "is now a field for each option", fix))
    return {**value, "curation": {k: v for k, v in (curation | texts).items() if k != "options"}}, problems


def _repeated(node: yaml.Node | None, path: str) -> Iterator[ConfigProblem]:
    """Names that a group has twice; YAML would take the last one without a word."""
    if isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            yield from _repeated(child, f"{path}[{number}]")
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            name = f"{path}.{key.value}" if path else str(key.value)
            if name in seen:
                place = f"is given twice, again in line {key.start_mark.line + 1}"
                yield ConfigProblem(
                    name, child.value if isinstance(child, yaml.ScalarNode) else None, place, "keep one of the two"
                )
            seen.add(name)
            yield from _repeated(child, name)


def _check_words(config: LoopConfig) -> Iterator[ConfigProblem]:
    """Words that a step behind hours of training would refuse, or that would take the place of what the loop sets."""
    for name, scorer in vars(config.scoring).items():
        kind, colon, place = scorer.partition(":")
        if kind not in (PLACED_SCORERS if colon else PLAIN_SCORERS):
            fix = f"use {', '.join(PLAIN_SCORERS)}, or one of {', '.join(PLACED_SCORERS)} with : and a place"
            yield ConfigProblem(f"scoring.{name}", scorer, "is no scorer", fix)
        elif colon and not Path(place).exists():
            yield ConfigProblem(f"scoring.{name}", scorer, f"{place or 'its place'} does not exist", "correct the path")
    if config.evaluation.metric == "attributes":
        fix = "use another; sicog evaluate score judges by attributes afterwards"
        yield ConfigProblem("evaluation.metric", "attributes", "needs a vocabulary, which a loop cannot name", fix)


def _check_values(config: LoopConfig) -> Iterator[ConfigProblem]:
    items, output = config.items, Path(config.output)
    for name, number in (("rounds", config.rounds), ("report_items", config.report_items)):
        if number < 1:
            yield ConfigProblem(name, number, "is below 1", "give 1 or more")
    if not (items.captions or items.answers):
        yield ConfigProblem("items", "", "names no rows", "give captions, answers, or both")
    for name, files in (("items.captions", items.captions), ("items.answers", items.answers)):
        for file in files:
            if not Path(file).is_file():
                yield ConfigProblem(name, file, "is no file", "correct the path")
    for name, folder in (("items.images", items.images), ("evaluation.images", config.evaluation.images)):
        if not Path(folder).is_dir():
            yield ConfigProblem(name, folder, "is no folder", "correct the path")
    if output.resolve().is_relative_to(Path(items.images).resolve()):
        fix = "write to a folder outside of it: the images there count as inputs"
        yield ConfigProblem("output", config.output, "lies in items.images", fix)
    if not config.evaluation.benchmark.startswith("easy-vqa:") and not Path(config.evaluation.benchmark).is_file():
        yield ConfigProblem("evaluation.benchmark", config.evaluation.benchmark, "is no file", "correct the path")
    text = config.curation.text
    if text and not text.is_file():
        yield ConfigProblem("curation.text", str(text), "is no file", "correct the path")
    if config.base and not Path(config.base).is_dir():
        yield ConfigProblem("base", config.base, "is no folder", "give a run or a checkpoint of ours, or leave it out")
