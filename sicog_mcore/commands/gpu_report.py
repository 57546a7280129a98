"""How fast this machine trains: median step time, tokens/s, TFLOP/s, MFU and peak memory of one device, in one line.

In: a preset   Out: a line on the screen; with --out also a JSON file   Next: device_speed.py (how it is measured)
Weights, pixels and text are random; image sizes are those of photographs, cut into slices as in training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.errors import EXIT_OK
from sicog_mcore.files import write_json
from sicog_mcore.flags import flag
from sicog_mcore.presets import PRESETS
from sicog_mcore.ranks import silence_megatron

if TYPE_CHECKING:
    from sicog_mcore.commands.device_speed import SpeedMeasurement  # imports torch


@dataclass(frozen=True, kw_only=True)
class GpuReportOptions:
    """Options that ``gpu-report`` takes.

    Attributes:
        preset: sizes of the model.
        packs: packed sequences per step.
        out: JSON file to write, e.g. benchmarks/results/h100.json.
    """

    preset: str = flag("uhd_qwen2_0_5b", choices=tuple(PRESETS))
    packs: int = 4
    out: Path | None = None


def report_speed(options: GpuReportOptions) -> SpeedMeasurement:
    """Measures one device, writes the file that is asked for, and returns the numbers."""
    from sicog_mcore.commands.device_speed import measure_speed

    experiment = PRESETS[options.preset]()
    measured = measure_speed(replace(experiment, train=replace(experiment.train, packs_per_step=options.packs)))
    if options.out is not None:
        write_json(options.out, asdict(measured))
    return measured


def main(options: GpuReportOptions, call: VerbCall) -> int:
    """Measures and prints one line; returns the exit code."""
    silence_megatron()
    print(report_speed(options).line())
    return EXIT_OK


VERB = Verb((__doc__ or "").strip(), GpuReportOptions, main)
