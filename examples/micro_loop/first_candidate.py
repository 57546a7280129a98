"""Keeps the first candidate of every item, as if no other had been drawn: what a loop without curation learns from.

In: generations.jsonl   Out: the same with one candidate each
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from sicog_mcore.cognition.records import Generation, read_records, write_records


def keep_first(record: Generation) -> Generation:
    """The record of a run that asked with its first prompt alone, once."""
    prompts = tuple(replace(use, count=1) for use in record.prompts[:1])
    return replace(record, prompts=prompts, prompt_tokens=record.prompt_tokens[:1], candidates=record.candidates[:1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generations", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_records(options.out, map(keep_first, read_records(options.generations, Generation)))
    sys.exit(0)
