"""Makes one round of several generation runs: their records, and the scores of these, behind each other.

In: generations and scores, as many of one as of the other   Out: generations.jsonl and scores.jsonl in one folder
Next: tools/curate.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from sicog_mcore.cognition.records import Generation, Scores, read_records, write_records
from sicog_mcore.errors import EXIT_OK, DataError, RecordError, SicogError, exit_code, printable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generations", type=Path, nargs="+", required=True, help="records, .jsonl or .parquet")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="their scores, in the same order")
    parser.add_argument("--out", type=Path, required=True, help="folder of the round")
    options = parser.parse_args(arguments)
    if len(options.scores) != len(options.generations):
        parser.error(f"found {len(options.generations)} generations and {len(options.scores)} scores; give as many")
    return options


def require_unique(records: Iterable[Generation], ids: set[str]) -> Iterator[Generation]:
    """The records as they are.

    Raises:
        RecordError: an id that occurred before.
    """
    for record in records:
        if record.id in ids:
            raise RecordError(f"found {record.id!r} twice; ids of items must be unique within a round")
        ids.add(record.id)
        yield record


def join(options: argparse.Namespace) -> int:
    """Writes both files, scores last. Returns the number of items.

    Raises:
        RecordError: a file that is damaged, scores of other items, or an id that occurs twice.
        DataError: there are no items.
    """
    total = 0
    for generations, scores in zip(options.generations, options.scores, strict=True):
        asked = [record.id for record in read_records(generations, Generation)]
        if asked != [record.id for record in read_records(scores, Scores)]:
            raise RecordError(f"{scores} has other items than {generations}; score again")
        total += len(asked)
    if not total:
        raise DataError("the files hold no items; generate first")
    ids: set[str] = set()
    records = (record for path in options.generations for record in read_records(path, Generation))
    count = write_records(options.out / "generations.jsonl", require_unique(records, ids))
    found = (record for path in options.scores for record in read_records(path, Scores))
    write_records(options.out / "scores.jsonl", found)
    return count


def main(arguments: list[str] | None = None) -> int:
    """Joins; returns the exit code."""
    options = parse(arguments)
    try:
        print(printable(f"{options.out}: {join(options)} items of {len(options.generations)} runs"))
    except (SicogError, OSError) as error:
        print(printable(f"join_records: {error}"), file=sys.stderr)
        return exit_code(error)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
