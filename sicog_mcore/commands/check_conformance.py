"""Compares slicing and resampler with files recorded from the released implementation.

In: --slices slice_plans.json, --resampler resampler.safetensors   Out: a line for each case   Next: conformance.py (how)
Exit code 0: conforms; 1: a slice plan differs, or a resampler case by more than 2e-4; 2: a file cannot be used.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.flags import flag


@dataclass(frozen=True, kw_only=True)
class ConformanceOptions:
    """Options that ``check-conformance`` takes.

    Attributes:
        slices: recorded slice plans (.json).
        resampler: recorded resampler (.safetensors).
    """

    slices: Path | None = flag(None, metavar="FILE")
    resampler: Path | None = flag(None, metavar="FILE")

    def mistake(self) -> str:
        """Returns what is wrong with the options, empty if nothing is."""
        if self.slices is None and self.resampler is None:
            return "nothing to check; pass --slices FILE, --resampler FILE, or both"
        return ""


def main(options: ConformanceOptions, call: VerbCall) -> int:
    """Compares each file that is given; returns the exit code."""
    from sicog_mcore.commands.conformance import UnusableFile, compare_resampler, compare_slices

    checks = ((compare_slices, options.slices), (compare_resampler, options.resampler))
    try:
        found = [compare(path, print) for compare, path in checks if path is not None]
    except UnusableFile as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if any(each.failures for each in found) else 0


VERB = Verb((__doc__ or "").strip(), ConformanceOptions, main)
