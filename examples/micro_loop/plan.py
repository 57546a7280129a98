"""One seed of the experiment runs the framework's own stages, as lanes of steps.

In: Regime, seed   Out: Lanes   Next: lanes.py (runs them), results.py (reads what they wrote)
Every arm starts from the same first weights and ends with the same fine-tuning on the labels. Arms differ in what the model
is trained on before that, for equally many optimiser steps: nothing, the labels, or what the base model wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from examples.micro_loop.digits import SIZES
from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.loop.steps import WorkflowStep
from sicog_mcore.cognition.step_options import CurateOptions, CurationRules, ScoreOptions, TrainingOptions
from sicog_mcore.rollout.requests import Sampling

CONFIG = Path(__file__).with_name("model.yaml")
TAUS = ("0.8", "0.9", "0.95")
VIEWS_TAU = MIXED_TAU = "0.9"
BASE, EQUAL, LONG, UNCURATED = "base", "equal steps", "one long run", "uncurated"
BATCH = 128  # items that are answered at the same time
KEPT = "kept"  # folder of what was kept, below that of the seed
LONGEST = 32  # tokens of an answer; a chain has 20

# What an arm is trained on before the labels.
ARMS: Mapping[str, tuple[str, ...]] = {
    BASE: (),
    EQUAL: ("labelled",),
    LONG: (),  # the labels only, with as many steps in one schedule
    UNCURATED: ("uncurated",),
    **{f"curated {tau}": (f"curated-{tau}",) for tau in TAUS},
    f"curated {VIEWS_TAU}, from views": (f"curated-views-{VIEWS_TAU}",),
    f"curated {MIXED_TAU}, mixed with labels": (f"curated-{MIXED_TAU}", "labelled"),
    "oracle": ("truth",),
}


@dataclass(frozen=True)
class Regime:
    """All that was chosen, on the validation sets of other seeds.

    Attributes:
        pretrain_steps: optimiser steps of stage 1.5.
        finetune_steps: optimiser steps on the labels.
        candidates: of each of the two prompts.
        renderings: pictures made of each unlabelled digit.
        sizes: pictures of each pool.
        arms: that are run.
    """

    pretrain_steps: int = 500
    finetune_steps: int = 1200
    candidates: int = 6
    temperature: float = 1.0
    renderings: int = 1
    sizes: Mapping[str, int] = field(default_factory=lambda: dict(SIZES))
    arms: tuple[str, ...] = tuple(ARMS)


FAST = Regime(
    pretrain_steps=200,
    finetune_steps=600,
    candidates=4,
    sizes={"labelled": 300, "unlabelled": 400, "validation": 100, "test": 100},
    arms=(BASE, EQUAL, "curated 0.8"),
)


@dataclass(frozen=True)
class ScriptOptions:
    """Words for one of the experiment's own scripts, which is no verb.

    Attributes:
        given: as on a command line.
    """

    given: tuple[str, ...]


@dataclass(frozen=True)
class Lane:
    """Steps that run one after the other.

    Attributes:
        folder: of their build records and logs.
        after: folder of the lane that comes first; None for none.
    """

    folder: Path
    steps: tuple[WorkflowStep, ...]
    after: Path | None = None


def plan_seed(regime: Regime, seed: int, split: str, home: Path) -> list[Lane]:
    """The base model and what it writes, then one lane for each other arm.

    Args:
        split: "test", or "validation" while something is chosen.
        home: folder of the seed.
    """
    planner = _Seed(regime, seed, split, home)
    first = Lane(home, tuple(planner.first()))
    rest = [Lane(home / slug(arm), tuple(planner.arm(arm)), home) for arm in regime.arms if arm != BASE]
    return [first, *rest]


def slug(arm: str) -> str:
    """Folder of an arm."""
    return arm.replace(", ", "-").replace(" ", "-")


def is_written(source: str) -> bool:
    """Whether the base model wrote what is learnt."""
    return source.startswith(("curated", "uncurated"))


@dataclass(frozen=True)
class _Seed:
    regime: Regime
    seed: int
    split: str
    home: Path

    @property
    def task(self) -> Path:
        return self.home / "task"

    @property
    def sources(self) -> set[str]:
        return {source for arm in self.regime.arms for source in ARMS[arm]}

    def first(self) -> Iterator[WorkflowStep]:
        """All that arms share: task, first weights, the base model, its candidates, and what is kept of them."""
        sizes, renderings = json.dumps(dict(self.regime.sizes)), str(self.regime.renderings)
        words = ("--seed", str(self.seed), "--sizes", sizes, "--renderings", renderings, "--out", str(self.task))
        yield script_step("task", "digits.py", words, (), self.task)
        out = self.home / "weights"
        words = ("--config", str(CONFIG), "--seed", str(self.seed), "--out", str(out))
        yield script_step("weights", "weights.py", words, (CONFIG,), out)
        yield from self.arm(BASE)
        if any(map(is_written, self.sources)):
            yield from self.candidates()

    def candidates(self) -> Iterator[WorkflowStep]:
        """Steps that let the base model write about unlabelled pictures, measure its agreement, and keep a part."""
        yield self.generate("candidates", self.task)
        yield self.score("scores", "candidates")
        for tau in TAUS:
            if f"curated-{tau}" in self.sources:
                yield self.curate(f"curated-{tau}", "candidates", "scores", tau)
        if "uncurated" in self.sources:
            given, out = self.records("candidates"), self.records("first")
            words = ("--generations", str(given), "--out", str(out))
            yield script_step("first", "first_candidate.py", words, (given,), out)
            yield self.score("first-scores", "first")
            yield self.curate("uncurated", "first", "first-scores", "-1")
        if f"curated-views-{VIEWS_TAU}" in self.sources:
            out = self.home / "views"
            words = ("--seed", str(self.seed), "--views-of", str(self.task), "--out", str(out))
            yield script_step("views", "digits.py", words, (self.task,), out)
            yield self.generate("view-candidates", out)
            yield self.score("view-scores", "candidates", self.records("view-candidates"))
            yield self.curate(f"curated-views-{VIEWS_TAU}", "candidates", "view-scores", VIEWS_TAU)

    def records(self, step: str) -> Path:
        return self.home / step / ("scores.jsonl" if step.endswith("scores") else "generations.jsonl")

    def generate(self, step: str, images: Path) -> WorkflowStep:
        prompts = (("cod", self.regime.candidates), ("caption", self.regime.candidates))
        run, rows = self.home / slug(BASE) / "stage2", self.task / "unlabelled.jsonl"
        return self.answers(self.home / step, run, rows, images, prompts, self.regime.temperature)

    def answers(
        self, out: Path, run: Path, rows: Path, images: Path, prompts: tuple[tuple[str, int], ...], temperature: float
    ) -> WorkflowStep:
        """The step is named like the folder of its records."""
        options = GenerationOptions(
            checkpoint=run,
            rows=(rows,),
            images=images,
            prompts=prompts,
            sampling=Sampling(temperature, 1.0, 0, LONGEST),
            seed=self.seed,
            out=out,
            batch=BATCH,
        )
        return WorkflowStep(
            name=out.name,
            verb=("generate",),
            options=options,
            inputs=(run, rows),
            images=(images,),
            outputs=(out / "generations.jsonl",),
            leftovers=(out,),
        )

    def score(self, step: str, generations: str, view: Path | None = None) -> WorkflowStep:
        given, out = self.records(generations), self.records(step)
        views = (f"shifted={view}",) if view else ()
        options = ScoreOptions(generations=given, views=views, out=out)
        inputs = (given, *([view] if view else []))
        return WorkflowStep(name=step, verb=("score",), options=options, inputs=inputs, outputs=(out,))

    def curate(self, step: str, generations: str, scores: str, tau: str) -> WorkflowStep:
        files, out = (self.records(generations), self.records(scores)), self.home / KEPT / step
        # The pictures are so alike that filters against repetition would keep one of each digit.
        rules = CurationRules(image_radius=-1, text_similarity=0.0, min_share=0.0, forms=("chain", "plain"))
        source = (str(files[0]), str(files[1]), tau)
        return WorkflowStep(
            name=step,
            verb=("curate",),
            options=CurateOptions(round=out, images=self.task, source=(source,), rules=rules),
            inputs=files,
            images=(self.task,),
            outputs=(out / "decisions.jsonl", out / "curated"),
            leftovers=(out,),
        )

    def arm(self, arm: str) -> Iterator[WorkflowStep]:
        """Training of an arm, and its answers about the pictures that it is judged by."""
        regime, start, home = self.regime, self.home / "weights", self.home / slug(arm)
        steps = regime.finetune_steps + (regime.pretrain_steps if arm == LONG else 0)
        if ARMS[arm]:
            yield self.train(home / "stage15", ARMS[arm], start, regime.pretrain_steps)
            start = home / "stage15"
        yield self.train(home / "stage2", ("labelled",), start, steps)
        asked = ((self.split, (("caption", 1), ("cod", 1))), (f"{self.split}_questions", (("direct", 1),)))
        for name, prompts in asked:
            yield self.answers(home / name, home / "stage2", self.task / f"{name}.jsonl", self.task, prompts, 0.0)

    def train(self, out: Path, sources: tuple[str, ...], start: Path, steps: int) -> WorkflowStep:
        verb = {"stage15": "pretrain", "stage2": "finetune"}[out.name]
        files = [self.rows(source) for source in sources]
        tokenizer = self.task / "tokenizer.json"
        values = {
            "output": str(out),
            "init.checkpoint": str(start),
            "data.sources": [{"path": str(file), "images": str(self.task)} for file in files],
            "data.tokenizer": str(tokenizer),
            "train.steps": steps,
            "train.seed": self.seed,
        }
        return WorkflowStep(
            name=out.name,
            verb=(verb,),
            options=TrainingOptions(config=(str(CONFIG),), values=values),
            inputs=(CONFIG, start, tokenizer, *files),
            images=(self.task,),
            outputs=(out,),
        )

    def rows(self, source: str) -> Path:
        if is_written(source):
            return self.home / KEPT / source / "curated" / "train.jsonl"
        return self.task / {"labelled": "labelled.jsonl", "truth": "unlabelled_truth.jsonl"}[source]


def script_step(name: str, script: str, words: tuple[str, ...], inputs: tuple[Path, ...], out: Path) -> WorkflowStep:
    """A step of one of the experiment's own scripts, which lie beside this file."""
    verb = (f"examples/micro_loop/{script}",)
    return WorkflowStep(name=name, verb=verb, options=ScriptOptions(words), inputs=inputs, outputs=(out,))
