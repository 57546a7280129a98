"""Makes one round of several generation runs: their records, and the scores of these, behind each other.

In: generations and scores, as many of one as of the other   Out: generations.jsonl and scores.jsonl in one folder
Next: curate.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sicog_mcore.cognition.records import Generation, Scores, read_records, write_records
from sicog_mcore.cognition.step_options import JoinOptions
from sicog_mcore.commands.verb import Verb, VerbCall, reporting
from sicog_mcore.errors import DataError, RecordError

GENERATIONS, SCORES = "generations.jsonl", "scores.jsonl"


@dataclass(frozen=True)
class JoinedRound:
    """Records that were joined into a round.

    Attributes:
        out: folder of both files.
        items: records in each of them.
        runs: generation runs that they came from.
    """

    out: Path
    items: int
    runs: int


def require_unique(records: Iterable[Generation], ids: set[str]) -> Iterator[Generation]:
    """Yields the records as they are.

    Raises:
        RecordError: an id that occurred before.
    """
    for record in records:
        if record.id in ids:
            raise RecordError(f"found {record.id!r} twice; ids of items must be unique within a round")
        ids.add(record.id)
        yield record


def join_records(options: JoinOptions) -> JoinedRound:
    """Writes both files, scores last.

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
    count = write_records(options.out / GENERATIONS, require_unique(records, ids))
    found = (record for path in options.scores for record in read_records(path, Scores))
    write_records(options.out / SCORES, found)
    return JoinedRound(options.out, count, len(options.generations))


def main(options: JoinOptions, call: VerbCall) -> int:
    """Joins and prints a line; returns the exit code."""

    def work() -> str:
        joined = join_records(options)
        return f"{joined.out}: {joined.items} items of {joined.runs} runs"

    return reporting("join_records", work)


VERB = Verb((__doc__ or "").splitlines()[0], JoinOptions, main)
