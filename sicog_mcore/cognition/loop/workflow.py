"""The self-improvement loop as steps: train on few labels, generate, agree, curate, train anew, and see whether it helped.

In: LoopConfig   Out: WorkflowSteps, in order   Next: steps.py (which of them must run), runner.py
The baseline is stages 1, 1.5 and 2 on labelled rows alone. Stage 0 warms it up, and the new model is held against it: that
one is trained by the same recipe, for as many steps, with the curated rows in stage 1.5. As in SICOG it starts from the
plain decoder and the resampler of stage 1; what generated only lives on in its answers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sicog_mcore.cli import load_experiment
from sicog_mcore.cognition.curation.filters import parse_per_prompt
from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.loop.loop_config import LoopConfig, StageConfig
from sicog_mcore.cognition.loop.steps import WorkflowStep
from sicog_mcore.cognition.prompts import load_prompts
from sicog_mcore.cognition.step_options import (
    BenchmarkOptions,
    CompareOptions,
    CurateOptions,
    JoinOptions,
    JudgeOptions,
    RoundReportOptions,
    ScoreOptions,
    TrainingOptions,
)
from sicog_mcore.config import Experiment, SourceConfig
from sicog_mcore.data.preflight import ROW_FILES, check_inputs
from sicog_mcore.data.tokenizer import find_tokenizer_file
from sicog_mcore.errors import ConfigError, ConfigProblem
from sicog_mcore.rollout.requests import Sampling
from sicog_mcore.stages import ALIGN, FINETUNE, PERCEPTION, PRETRAIN, REASONING, StageDefaults

ItemKind = Literal["captions", "answers"]

RECORDS, SCORES, METRICS, USAGE = "generations.jsonl", "scores.jsonl", "metrics.jsonl", "usage.jsonl"
REPORT, COMPARISON = "report.html", "comparison.json"
CURATED = "curated/train.jsonl"
WARM_UP: Mapping[ItemKind, str] = {"captions": "perception", "answers": "reasoning"}
STAGES: Mapping[str, tuple[tuple[str, ...], StageDefaults]] = {
    "perception": (("warmup", "perception"), PERCEPTION),
    "reasoning": (("warmup", "reasoning"), REASONING),
    "align": (("align",), ALIGN),
    "pretrain": (("pretrain",), PRETRAIN),
    "finetune": (("finetune",), FINETUNE),
}
NOT_IN_WEIGHTS = (
    "output",
    "parallel",
    "checkpoint",
    "held_out",
)  # groups of an Experiment without effect on what is learnt


@dataclass(frozen=True)
class _Made:
    """An output that other steps use: the name of its step, empty if the user brought it, and its path."""

    step: str
    path: Path


def build_steps(config: LoopConfig, ranks: int) -> list[WorkflowStep]:
    """All steps of all rounds.

    Args:
        ranks: processes of training and generation.

    Raises:
        ConfigError: everything that can be found before the first of them runs.
    """
    builder = _Builder(config, ranks)
    builder.build()
    if builder.problems:
        raise ConfigError(
            [
                ConfigProblem(f"{', '.join(names)}: {path}", value, problem, fix)
                for (path, value, problem, fix), names in builder.problems.items()
            ]
        )
    return builder.steps


def rounds_of(config: LoopConfig) -> list[Path]:
    """The folders of the rounds; each receives REPORT and COMPARISON."""
    return [Path(config.output) / f"round_{number}" for number in range(1, config.rounds + 1)]


class _Builder:
    """The steps so far; problems by what they say, with the names of the steps that have them."""

    def __init__(self, config: LoopConfig, ranks: int) -> None:
        self.config, self.ranks = config, ranks
        self.output = Path(config.output)
        self.images = Path(config.items.images)
        self.steps: list[WorkflowStep] = []
        self.problems: dict[tuple[str, object, str, str], list[str]] = {}

    def build(self) -> None:
        config = self.config
        self._check_ids()
        aligned = self._train("stage1", "align", {}, ())
        labelled = self._load("finetune", "baseline.stage2", {})
        unknown = SourceConfig(path=str(self.output / "unknown.jsonl"))  # why has been noted
        sources = [asdict(source) for source in (labelled.data.sources if labelled else [unknown])]
        baseline = self._train_anew("baseline", aligned, sources, ())
        base = _Made("", Path(config.base)) if config.base else baseline
        kinds: list[ItemKind] = [kind for kind in ("captions", "answers") if self._rows(kind)]
        warm = _whole(base)
        generators = {kind: self._train(f"stage0.{WARM_UP[kind]}", WARM_UP[kind], warm, (base,)) for kind in kinds}
        benchmark = self._prepare()
        judged = self._judge("baseline", baseline, benchmark)
        for number, folder in enumerate(rounds_of(config), 1):
            curated = self._curate(number, folder, generators, benchmark)
            source = {"path": str(curated.path), "images": config.items.images}
            model = self._train_anew(folder.name, aligned, [source], (curated,))
            self._compare(folder.name, judged, self._judge(folder.name, model, benchmark))
            self._report(number, folder, curated, next(iter(generators.values())))
            generators = dict.fromkeys(kinds, model)

    def _rows(self, kind: ItemKind) -> tuple[Path, ...]:
        return tuple(map(Path, self.config.items.captions if kind == "captions" else self.config.items.answers))

    def _note(self, name: str, problem: ConfigProblem) -> None:
        key = (problem.path, str(problem.value), problem.problem, problem.fix)
        names = self.problems.setdefault(key, [])
        if name not in names:
            names.append(name)

    def _check_ids(self) -> None:
        """Records are joined by id; finding out here costs seconds, after generation it would cost the generation."""
        files = [*self._rows("captions"), *self._rows("answers")]
        counts = Counter(name for file in files for name in _row_ids(file))
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            fix = "give each item an id of its own, in captions and answers alike"
            self._note("items", ConfigProblem("id", repeated[0], f"{len(repeated)} ids occur more than once", fix))

    def _load(self, stage: str, name: str, more: Mapping[str, Any]) -> Experiment | None:
        """The experiment of a stage; None if it cannot be read, with the reasons noted."""

        def check(experiment: Experiment) -> list[ConfigProblem]:
            return [p for p in check_inputs(experiment) if not self._will_exist(p.value)]

        options = _training(self.config.stages.common, getattr(self.config.stages, stage), more)
        try:
            return load_experiment(list(options.words()), self.ranks, check, STAGES[stage][1])
        except ConfigError as error:
            for problem in error.problems:
                self._note(name, problem)
            return None

    def _will_exist(self, value: object) -> bool:
        return isinstance(value, str) and Path(value).is_relative_to(self.output)

    def _train(self, name: str, stage: str, more: Mapping[str, Any], after: Sequence[_Made]) -> _Made:
        """A training run; its folder is named like the step."""
        folder = self.output.joinpath(*name.split("."))
        own: StageConfig = getattr(self.config.stages, stage)
        more = {**more, "output": str(folder)}
        for field in [field for field in own.set if field in more]:
            fix = "leave it out; what is given in `common` is replaced as well"
            self._note(f"stages.{stage}", ConfigProblem(field, own.set[field], "is set by the loop", fix))
        experiment = self._load(stage, name, more)
        if experiment:
            data, init = experiment.data, experiment.init
            tokenizer = find_tokenizer_file(data.tokenizer)
            weights = [path for path in (init.checkpoint, init.tower, init.resampler, init.decoder) if path]
            folders = {source.images: None for source in data.sources if Path(source.path).suffix in ROW_FILES}
            counted = {key: value for key, value in experiment.to_dict().items() if key not in NOT_IN_WEIGHTS}
            del counted["train"]["log_every"], counted["train"]["tensorboard"], counted["data"]["workers"]
            self.steps.append(
                WorkflowStep(
                    name=name,
                    verb=STAGES[stage][0],
                    options=_training(self.config.stages.common, own, more),
                    inputs=(
                        *(Path(source.path) for source in data.sources),
                        *([tokenizer] if tokenizer else []),
                        *map(Path, weights),
                    ),
                    images=tuple(map(Path, folders)),
                    outputs=(folder,),
                    needs=_names(after),
                    cache_key=(json.dumps(counted, sort_keys=True),),
                    is_parallel=True,
                    size=f"{experiment.train.steps:,} optimiser steps",
                    usage=folder / METRICS,
                    headline="loss ",
                )
            )
        return _Made(name, folder)

    def _train_anew(self, name: str, aligned: _Made, sources: Sequence[Any], after: Sequence[_Made]) -> _Made:
        """Stages 1.5 and 2 from the plain decoder."""
        start = {"data.sources": sources, "init.resampler": str(aligned.path)}
        pretrained = self._train(f"{name}.stage15", "pretrain", start, (aligned, *after))
        return self._train(f"{name}.stage2", "finetune", _whole(pretrained), (pretrained,))

    def _generate(self, name: str, model: _Made, options: GenerationOptions, after: Sequence[_Made] = ()) -> _Made:
        try:
            options.check()
        except ConfigError as error:
            for problem in error.problems:
                if not self._will_exist(problem.value):
                    self._note(name, problem)
        sampling = options.sampling
        self.steps.append(
            WorkflowStep(
                name=name,
                verb=("generate",),
                options=options,
                inputs=(options.checkpoint, *options.rows),
                images=(options.images,),
                outputs=(options.out / RECORDS,),
                leftovers=(options.out,),
                needs=_names((model, *after)),
                cache_key=(*_wordings(options.prompts), json.dumps(asdict(sampling)), str(options.seed)),
                is_parallel=True,
                size=f"{sum(count for _, count in options.prompts)} candidates an item",
                usage=options.out / USAGE,
                headline="tokens ",
            )
        )
        return _Made(name, options.out / RECORDS)

    def _candidates(self, number: int, kind: ItemKind, folder: Path, model: _Made) -> _Made:
        generation = self.config.generation
        prompts = generation.captions if kind == "captions" else generation.answers
        for name in prompts.keys() & load_prompts().keys():
            if f"{(task := load_prompts()[name].task)}s" != kind:
                fix = f"name prompts of {kind}"
                self._note(folder.name, ConfigProblem(f"generation.{kind}", name, f"is a prompt for {task}s", fix))
        sampling = Sampling(generation.temperature, generation.top_p, generation.top_k, generation.max_new_tokens)
        options = GenerationOptions(
            checkpoint=model.path,
            rows=self._rows(kind),
            images=self.images,
            prompts=tuple(prompts.items()),
            sampling=sampling,
            seed=self.config.seed + number - 1,
            out=folder / kind,
            batch=generation.batch,
            tensor=generation.tensor,
        )
        return self._generate(f"{folder.name}.{kind}", model, options)

    def _score(self, kind: ItemKind, folder: Path, records: _Made) -> _Made:
        scorer = self.config.scoring.captions if kind == "captions" else self.config.scoring.answers
        path = folder / f"{kind}_{SCORES}"
        place = Path(scorer.partition(":")[2] or "-")
        step = WorkflowStep(
            name=f"{records.step}_scores",
            verb=("score",),
            options=ScoreOptions(generations=records.path, out=path, scorer=scorer),
            inputs=(records.path, *([place] if place.exists() else [])),
            outputs=(path,),
            leftovers=(Path(f"{path}.vectors"),),
            headline=str(path),
            needs=_names((records,)),
        )
        self.steps.append(step)
        return _Made(step.name, path)

    def _curate(self, number: int, folder: Path, generators: Mapping[ItemKind, _Made], benchmark: _Made) -> _Made:
        """From the models that generate to the curated rows."""
        records = {kind: self._candidates(number, kind, folder, model) for kind, model in generators.items()}
        scores = [self._score(kind, folder, made) for kind, made in records.items()]
        generated, scored = (tuple(made.path for made in group) for group in (records.values(), scores))
        joined = WorkflowStep(
            name=f"{folder.name}.join",
            verb=("join-records",),
            options=JoinOptions(generations=generated, scores=scored, out=folder),
            inputs=(*generated, *scored),
            outputs=(folder / RECORDS, folder / SCORES),
            needs=_names((*records.values(), *scores)),
        )
        curation = self.config.curation
        for name in ("tau", "min_tokens", "max_tokens"):
            try:
                parse_per_prompt(f"curation.{name}", getattr(curation, name))
            except ConfigError as error:
                for problem in error.problems:
                    self._note(f"{folder.name}.curate", problem)
        named = [curation.text] if curation.text else []  # rows of text that are mixed in
        options = CurateOptions(
            round=folder,
            images=self.images,
            tau=curation.tau,
            evaluation=(benchmark.path / "images",),
            rules=curation.rules,
            seed=self.config.seed + number - 1,
        )
        curated = WorkflowStep(
            name=f"{folder.name}.curate",
            verb=("curate",),
            options=options,
            inputs=(*joined.outputs, benchmark.path / "images", *named),
            images=(self.images,),
            outputs=tuple(folder / name for name in ("decisions.jsonl", CURATED, "pairs.jsonl", "funnel.json")),
            leftovers=(folder / "curated", folder / ".curate.partial"),
            headline=str(folder / "curated"),
            needs=(joined.name, benchmark.step),
        )
        self.steps += [joined, curated]
        return _Made(curated.name, folder / CURATED)

    def _prepare(self) -> _Made:
        """The benchmark as rows and images; a folder."""
        evaluation, folder = self.config.evaluation, self.output / "evaluation"
        file = Path(evaluation.benchmark)
        step = WorkflowStep(
            name="evaluation",
            verb=("evaluate", "prepare"),
            options=BenchmarkOptions(benchmark=evaluation.benchmark, images=Path(evaluation.images), out=folder),
            inputs=(file,) if file.is_file() else (),
            images=(Path(evaluation.images),) if file.is_file() else (),
            outputs=(folder / "rows.jsonl", folder / "images"),
            leftovers=(folder,),
            headline=str(folder),
        )
        self.steps.append(step)
        return _Made(step.name, folder)

    def _judge(self, name: str, model: _Made, benchmark: _Made) -> _Made:
        """A model's greedy answers to the benchmark, and what they are worth; a folder of results."""
        evaluation, folder = self.config.evaluation, self.output / name / "evaluation"
        options = GenerationOptions(
            checkpoint=model.path,
            rows=(benchmark.path / "rows.jsonl",),
            images=benchmark.path,
            prompts=((evaluation.prompt, 1),),
            sampling=Sampling(0.0, 1.0, 0, evaluation.max_new_tokens),
            seed=0,
            out=folder / "answers",
            batch=self.config.generation.batch,
            tensor=self.config.generation.tensor,
        )
        answers = self._generate(f"{name}.evaluation", model, options, (benchmark,))
        file, results = Path(evaluation.benchmark), folder / "results"
        judging = JudgeOptions(
            benchmark=evaluation.benchmark, generations=answers.path, metric=evaluation.metric, out=results
        )
        step = WorkflowStep(
            name=f"{name}.evaluation_scores",
            verb=("evaluate", "score"),
            options=judging,
            inputs=(answers.path, *([file] if file.is_file() else [])),
            outputs=(results / "results.jsonl", results / "results.json"),
            leftovers=(results,),
            headline=str(results),
            needs=(answers.step,),
        )
        self.steps.append(step)
        return _Made(step.name, results)

    def _compare(self, name: str, before: _Made, after: _Made) -> None:
        path = self.output / name / COMPARISON
        step = WorkflowStep(
            name=f"{name}.compare",
            verb=("evaluate", "compare"),
            options=CompareOptions(first=before.path, second=after.path, out=path),
            inputs=(before.path / "results.jsonl", after.path / "results.jsonl"),
            outputs=(path,),
            needs=_names((before, after)),
        )
        self.steps.append(step)

    def _report(self, number: int, folder: Path, curated: _Made, model: _Made) -> None:
        earlier = rounds_of(self.config)[: number - 1]
        options = RoundReportOptions(
            round=folder,
            images=self.images,
            previous=tuple(earlier),
            checkpoint=model.path,
            max_items=self.config.report_items,
        )
        files = [place / name for place in (*earlier, folder) for name in (RECORDS, SCORES, "decisions.jsonl")]
        step = WorkflowStep(
            name=f"{folder.name}.report",
            verb=("report",),
            options=options,
            inputs=(*files, folder / "funnel.json", model.path),
            images=(self.images,),
            outputs=(folder / REPORT,),
            headline=str(folder / REPORT),
            needs=_names((curated, model)),
        )
        self.steps.append(step)


def _whole(model: _Made) -> dict[str, str]:
    """All first weights from one model."""
    return {"init.checkpoint": str(model.path)} | {f"init.{part}": "" for part in ("tower", "resampler", "decoder")}


def _names(made: Sequence[_Made]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.step for entry in made if entry.step))


def _training(common: StageConfig, own: StageConfig, more: Mapping[str, Any]) -> TrainingOptions:
    """Files and values of a stage; of a field that is given twice the last value."""
    return TrainingOptions(config=(*common.config, *own.config), values={**common.set, **own.set, **more})


def _wordings(prompts: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Prompts with their versions: another wording is another question."""
    for name, count in prompts:
        version = load_prompts()[name].version if name in load_prompts() else 0  # unknown ones are reported elsewhere
        yield f"{name}@{version}={count}"


def _row_ids(file: Path) -> Iterator[str]:
    """Ids of the rows that have one; what cannot be read is found, and counted, by generation."""
    text = file.read_bytes()
    lines = [text] if file.suffix == ".json" else text.splitlines()
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        for row in value if isinstance(value, list) else [value]:
            if isinstance(row, dict) and "id" in row:
                yield str(row["id"])
