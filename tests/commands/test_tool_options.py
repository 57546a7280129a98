"""Options of the verbs that are tools: their words give them back, and what does not fit together is refused.

Of every verb the options that have all fields set, and those that have only what is needed.
"""

from __future__ import annotations

from dataclasses import MISSING
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.commands.annotate import DescribeOptions, ReasonOptions
from sicog_mcore.commands.check_conformance import ConformanceOptions
from sicog_mcore.commands.convert import make_weight_parser
from sicog_mcore.commands.demo_data import DemoDataOptions
from sicog_mcore.commands.doctor import DoctorOptions
from sicog_mcore.commands.gpu_report import GpuReportOptions
from sicog_mcore.commands.import_gguf import GgufOptions
from sicog_mcore.commands.loop_demo_data import LoopDemoDataOptions
from sicog_mcore.commands.make_pairs import PairOptions, SpoilOptions
from sicog_mcore.commands.parser import options_from, read_options, to_words
from sicog_mcore.commands.perplexity import PerplexityOptions
from sicog_mcore.commands.weight_options import (
    ImportFlags,
    ImportOptions,
    InspectOptions,
    UnpickleOptions,
    WeightExportOptions,
)
from sicog_mcore.commands.why import WhyOptions

ROWS: dict[str, Path] = {"rows": Path("r.jsonl"), "images": Path("i"), "out": Path("o")}
EVERY_FIELD: tuple[Any, ...] = (
    DescribeOptions(
        **ROWS,
        endpoint="http://x/v1",
        model="m",
        key_file=Path("k"),
        price_prompt=Decimal("0.15"),
        price_completion=Decimal("2.50"),
        max_cost=Decimal("1E+1"),
        dry_run=True,
        retry_failed=True,
        concurrency=3,
        calls=2,
        answers=1,
        first_wait_s=0.0,
        timeout_s=1.5,
        temperature=-0.5,
        max_tokens=7,
        max_side_px=64,
        image_tokens=9,
        prefill=False,
        take=5,
        seed=-1,
    ),
    ReasonOptions(**ROWS, take=2, seed=0),
    SpoilOptions(**ROWS, seed=3, kinds=("mask",)),
    PairOptions(**ROWS, rejected=Path("bad"), chosen=Path("good")),
    WhyOptions(
        sample="s#chain", round=Path("r"), run=(Path("a"), Path("b")), images=Path("i"), generations=(Path("g"),)
    ),
    PerplexityOptions(
        checkpoint=Path("c"), rows="r", images="i", out=Path("o"), tokenizer="t.json", tensor=2, pipeline=3
    ),
    WeightExportOptions(
        checkpoint=Path("c"),
        out=Path("o"),
        what="tower",
        dtype="bf16",
        tokenizer="t",
        fill_from=Path("f"),
        shard_gb=0.5,
        tensor=2,
        pipeline=2,
        verify=True,
    ),
    ImportFlags(out=Path("o"), dry_run=True, verify=True, tensor=2, pipeline=4),
    InspectOptions(path=Path("-odd name")),
    UnpickleOptions(path=Path("p.bin"), out=Path("o.safetensors")),
    DoctorOptions(json=True),
    ConformanceOptions(slices=Path("s"), resampler=Path("r")),
    GgufOptions(out=Path("o"), gguf=Path("g")),
    GpuReportOptions(preset="tiny", packs=2, out=Path("o")),
    DemoDataOptions(out=Path("o"), vqa_images=0),
    LoopDemoDataOptions(out=Path("o")),
)


@pytest.mark.parametrize("options", EVERY_FIELD, ids=lambda options: type(options).__name__)
def test_words_give_options_back(options: Any) -> None:
    assert read_options(type(options), to_words(options)) == options


@pytest.mark.parametrize("options", EVERY_FIELD, ids=lambda options: type(options).__name__)
def test_words_of_what_must_be_given_are_enough(options: Any) -> None:
    kinds = type(options).__dataclass_fields__
    given = {name: vars(options)[name] for name, field in kinds.items() if _is_needed(field)}
    if type(options) is ConformanceOptions:
        given = {"slices": Path("s")}  # one of two
    fewest = type(options)(**given)
    words = to_words(fewest)
    assert read_options(type(options), words) == fewest and len(words) <= 2 * len(given)


def _is_needed(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        (DescribeOptions, "--max-cost 1", "--max-cost needs --price-prompt and --price-completion"),
        (DescribeOptions, "--price-prompt -1", "argument --price-prompt: "),
        (DescribeOptions, "--price-prompt nan", "argument --price-prompt: invalid usd value: 'nan'"),
        (DescribeOptions, "--calls 0", "argument --calls: invalid positive value: '0'"),
        (DescribeOptions, "--first-wait-s inf", "argument --first-wait-s: invalid seconds value: 'inf'"),
        (SpoilOptions, "--kinds mask burn", "argument --kinds: invalid choice: 'burn'"),
        (ConformanceOptions, "", "nothing to check; pass --slices FILE, --resampler FILE, or both"),
        (DemoDataOptions, "--vqa-images -1", "--vqa-images -1: expected 0 or more"),
        (GpuReportOptions, "--preset huge", "argument --preset: invalid choice: 'huge'"),
        (PerplexityOptions, "", "the following arguments are required: --checkpoint, --rows, --out"),
    ],
)
def test_what_does_not_fit_is_refused(kind: type, words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = "--rows r --images i --out o" if kind in (DescribeOptions, SpoilOptions) else ""
    needed += " --endpoint http://x --model m" if kind is DescribeOptions else ""
    with pytest.raises(SystemExit) as end:
        read_options(kind, [*needed.split(), *words.split()])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_import_takes_the_fields_of_an_experiment_beside_its_own() -> None:
    words = "import --preset tiny --out o --init.tower clip --tensor 2 --model.decoder.hidden=64".split()
    found, rest = make_weight_parser("about", "convert").parse_known_args(words)
    options = ImportOptions(flags=options_from(ImportFlags, found), experiment=tuple(rest))
    assert options.flags == ImportFlags(out=Path("o"), tensor=2)
    assert options.experiment == ("--preset", "tiny", "--init.tower", "clip", "--model.decoder.hidden=64")
    again, rest = make_weight_parser("about", "convert").parse_known_args(["import", *to_words(options)])
    assert ImportOptions(flags=options_from(ImportFlags, again), experiment=tuple(rest)) == options
