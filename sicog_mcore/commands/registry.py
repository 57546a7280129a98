"""All verbs by name: which module holds each, and one line of help. A module is imported when its verb is called.

In: name of a verb   Out: the module's VERB   Next: front.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, cast

from sicog_mcore.commands.verb import Startable

VerbGroup = Literal["train", "improve", "look", "tools"]


@dataclass(frozen=True)
class VerbEntry:
    """One verb of the command.

    Attributes:
        file: name of the module below sicog_mcore/commands that holds ``VERB``.
        script: the file of launch/ or tools/ that does the same, empty where there is none.
        holder: the name in the module, where it holds several verbs.
    """

    name: str
    file: str
    group: VerbGroup
    help: str
    script: str = ""
    holder: str = "VERB"

    def load(self) -> Startable:
        """Imports the verb's module and returns its VERB."""
        module = import_module(f"sicog_mcore.commands.{self.file}")
        return cast(Startable, getattr(module, self.holder))


VERBS: Sequence[VerbEntry] = (
    VerbEntry("demo", "demo", "train", "make a small data set and train on it, in minutes"),
    VerbEntry(
        "warmup",
        "train_stage",
        "train",
        "stage 0: steps of perception or reasoning",
        "launch/warmup_stage0.py",
        "WARMUP_VERB",
    ),
    VerbEntry("align", "train_stage", "train", "stage 1: the resampler alone", "launch/align_stage1.py", "ALIGN_VERB"),
    VerbEntry(
        "pretrain",
        "train_stage",
        "train",
        "stage 1.5: multimodal pre-training",
        "launch/pretrain_stage15.py",
        "PRETRAIN_VERB",
    ),
    VerbEntry(
        "finetune",
        "train_stage",
        "train",
        "stage 2: visual instruction tuning",
        "launch/finetune_stage2.py",
        "FINETUNE_VERB",
    ),
    VerbEntry(
        "dpo", "train_stage", "train", "preference training on pairs of answers", "launch/train_dpo.py", "DPO_VERB"
    ),
    VerbEntry("index", "index_data", "train", "index data sets before a training starts"),
    VerbEntry("loop", "loop", "improve", "the whole self-improvement loop, one command", "launch/self_improve.py"),
    VerbEntry("generate", "candidates", "improve", "draw candidates for unlabelled items", "launch/generate.py"),
    VerbEntry("score", "score", "improve", "score candidates by how far they agree", "tools/score.py"),
    VerbEntry("join-records", "join_records", "improve", "make one round of several runs", "tools/join_records.py"),
    VerbEntry("curate", "curate", "improve", "keep what agrees, as training rows and pairs", "tools/curate.py"),
    VerbEntry("evaluate", "evaluate", "look", "judge answers to a benchmark, compare two models", "tools/evaluate.py"),
    VerbEntry("report", "report", "look", "write the report of a round as one HTML file", "tools/report.py"),
    VerbEntry("bench", "bench", "look", "measure parts of the trainer: bench data"),
    VerbEntry("annotate", "annotate", "improve", "make warm-up rows in steps", "tools/annotate.py"),
    VerbEntry(
        "make-pairs", "make_pairs", "improve", "make preference pairs from spoiled images", "tools/make_pairs.py"
    ),
    VerbEntry("why", "why", "look", "walk back from a training row to its image", "tools/why.py"),
    VerbEntry("perplexity", "perplexity", "look", "measure how well answers are predicted", "launch/perplexity.py"),
    VerbEntry("recipes", "recipes", "tools", "list, show or copy the configurations that come along"),
    VerbEntry("convert", "convert", "tools", "import, export and list weights", "tools/convert.py"),
    VerbEntry("import-gguf", "import_gguf", "tools", "make a folder of a GGUF file", "tools/import_gguf.py"),
    VerbEntry("doctor", "doctor", "tools", "say what this machine can run", "tools/doctor.py"),
    VerbEntry("gpu-report", "gpu_report", "tools", "measure how fast this machine trains", "tools/gpu_report.py"),
    VerbEntry(
        "check-conformance",
        "check_conformance",
        "tools",
        "compare slicing and resampler with recorded files",
        "tools/check_conformance.py",
    ),
    VerbEntry("demo-data", "demo_data", "tools", "build a small real data set", "tools/prepare_demo_data.py"),
    VerbEntry(
        "loop-demo-data",
        "loop_demo_data",
        "tools",
        "build the data of the loop's demonstration",
        "tools/prepare_loop_demo.py",
    ),
)


def find_verb(name: str) -> VerbEntry | None:
    """Returns the verb of that name, None if there is none."""
    return next((entry for entry in VERBS if entry.name == name), None)
