"""Benches: what the data plane makes of rows of a known kind, beside what it made of them before.

data: In: names of mixes, sizes drawn from seeds   Out: a table of fill, evenness and speed, and JSON   Next: stream_bench.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sicog_mcore.commands.verb import Verb, VerbCall, VerbFamily, reporting
from sicog_mcore.flags import flag
from sicog_mcore.presets import PRESETS

if TYPE_CHECKING:
    from sicog_mcore.data.stream_bench import StreamFigures

MixName = Literal["align", "recap", "cod", "sft"]


@dataclass(frozen=True, kw_only=True)
class StreamBenchOptions:
    """Options that ``bench data`` takes.

    Attributes:
        mixes: kinds of rows.
        rows: rows of an epoch.
        repeats: seeds; the medians are shown.
        token_budget: length of a packed sequence (tokens).
        slice_budget: most slices in a packed sequence.
        window_samples: rows of the shuffle buffer.
        preset: the model whose FLOPs are shared out evenly, all parts trained.
        out: JSON file with the same figures; none is written without it.
    """

    mixes: tuple[MixName, ...] = ("align", "recap", "cod", "sft")
    rows: int = 65_536
    repeats: int = 3
    token_budget: int = 8192
    slice_budget: int = 64
    window_samples: int = 8192
    preset: str = flag("uhd_qwen2_7b", choices=tuple(PRESETS))
    out: Path | None = None

    def mistake(self) -> str:
        """Names the mistake that several options make together; empty if they make none."""
        numbers = (self.rows, self.repeats, self.token_budget, self.slice_budget, self.window_samples)
        return "" if min(numbers) > 0 else f"found {min(numbers)} among the numbers; each must be at least 1"


def bench_stream(options: StreamBenchOptions) -> list[StreamFigures]:
    """Measures both planners on every mix."""
    from sicog_mcore.config import DataConfig
    from sicog_mcore.data.stream_bench import bench_data
    from sicog_mcore.train.flops import pack_cost

    data = DataConfig(
        token_budget=options.token_budget, slice_budget=options.slice_budget, window_samples=options.window_samples
    )
    cost = pack_cost(PRESETS[options.preset]().model, ())
    return bench_data(cost, options.mixes, options.rows, options.repeats, data)


def main(options: StreamBenchOptions, call: VerbCall) -> int:
    """Measures, writes the JSON file if one is wanted, and prints the table; returns the exit code."""

    def work() -> str:
        from sicog_mcore.data.stream_bench import plain_figures, show_figures

        figures = bench_stream(options)
        if options.out:
            _write(options.out, plain_figures(figures))
        return show_figures(figures)

    return reporting("bench data", work)


def _write(path: Path, figures: list[dict[str, object]]) -> None:
    import json

    from sicog_mcore.files import whole_file

    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


VERB = VerbFamily(
    "Measures parts of the trainer, each beside what it is compared with.",
    {"data": Verb("fill, evenness and speed of the planned stream of packs", StreamBenchOptions, main)},
)
