"""Records are the rows that the loop writes: one typed row per item and step, joined by the item's id.

In: JSONL or Parquet files   Out: Generation, Scores, Decision   Next: generate.py, agreement.py, curated_round.py
A row holds all that its step depended on, so everything downstream is a pure function of files. A file is written under a
temporary name and appears by one rename; rows stand in the order of the items, whatever order they were made in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from sicog_mcore.decoding import decode, parse_json
from sicog_mcore.errors import RecordError
from sicog_mcore.files import whole_file
from sicog_mcore.rollout.requests import Finish, Sampling

FORMAT = 1  # raised when a field changes its meaning
PARQUET = ".parquet"
ROW = "record"  # the one column of a Parquet file

Task = Literal["caption", "answer"]


@dataclass(frozen=True)
class PromptUse:
    """A prompt that an item was asked with.

    Attributes:
        id, version: of prompts.py.
        count: candidates drawn with it.
    """

    id: str
    version: int
    count: int


@dataclass(frozen=True)
class Candidate:
    """One answer of the model.

    Attributes:
        prompt: id of its prompt.
        index: which of the prompt's candidates it is, from 0.
        seed: of its own random numbers, from the run's seed, the item's id, the prompt and the index alone.
        tokens: drawn, the one that ended the answer counted.
        log_prob: summed over these tokens under the unmodified model (temperature 1), rounded to 0.01.
    """

    prompt: str
    index: int
    seed: int
    text: str
    tokens: int
    log_prob: float
    finish: Finish


@dataclass(frozen=True)
class Generation:
    """All candidates of one item, or the reason why there are none.

    Attributes:
        image: path as the data set has it, relative to its folder of images; empty for an item of text only.
        image_hash: xxh128 of the file's bytes, in hexadecimal; empty without an image.
        question: the item's own, without placeholder.
        engine: name and version of what generated.
        checkpoint: fingerprint of the weights.
        seed: of the run.
        prompt_tokens: length of each prompt, visual tokens counted, in the order of ``prompts``.
        failure: reason code of an item without candidates; empty otherwise.
        detail: of the failure, for people.
    """

    id: str
    task: Task
    image: str
    image_hash: str
    question: str
    prompts: tuple[PromptUse, ...]
    engine: str
    checkpoint: str
    sampling: Sampling
    seed: int
    prompt_tokens: tuple[int, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    failure: str = ""
    detail: str = ""
    format: int = FORMAT


@dataclass(frozen=True)
class Scores:
    """How far the candidates of one item agree.

    Attributes:
        scorer: name and settings of what compared them.
        clauses: for each candidate the part that was compared, or None where it has no such part.
        matrix: [n, n] similarity of every pair, rounded to 1e-6.
        scores: [n] mean similarity to all candidates, itself among them.
        winner: index of the best candidate; the first of equals; -1 without candidates.
        agreement: score of the winner; 0 without candidates.
    """

    id: str
    scorer: str
    clauses: tuple[str | None, ...] = ()
    matrix: tuple[tuple[float, ...], ...] = ()
    scores: tuple[float, ...] = ()
    winner: int = -1
    agreement: float = 0.0
    failure: str = ""
    format: int = FORMAT


@dataclass(frozen=True)
class Decision:
    """The decision that curation made on one item.

    Attributes:
        reason: "kept", or the code of the filter that dropped it.
        detail: numbers behind the reason, for people.
        chosen, rejected: indices of candidates; -1 for none.
        rows: ids of the training rows made of it.
    """

    id: str
    kept: bool
    reason: str
    detail: str = ""
    chosen: int = -1
    rejected: int = -1
    rows: tuple[str, ...] = ()
    format: int = FORMAT


Record = TypeVar("Record", Generation, Scores, Decision)


def to_json(record: Generation | Scores | Decision) -> str:
    """One line without its end; equal records give equal bytes."""
    return json.dumps(asdict(record), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def from_json(line: str | bytes, kind: type[Record], origin: str) -> Record:
    """The record of a line.

    Args:
        origin: ``file:line`` for the message.

    Raises:
        RecordError: no JSON, another format, a field missing, unknown, or of another type.
    """
    try:
        row = parse_json(line)
    except ValueError as error:
        raise RecordError(f"{origin}: not JSON ({error}); remove the line, or make the file again") from error
    found = row.get("format") if isinstance(row, dict) else None
    if found != FORMAT:
        raise RecordError(
            f"{origin}: found format {found}, expected {FORMAT} of {kind.__name__}; make the file again with this version"
        )
    record = decode(kind, row, complete=True)
    if isinstance(record, list):
        first = record[0]
        found = f"{origin}: {first.path}: found {first.value!r} ({first.problem})"
        raise RecordError(f"{found}, expected the fields of {kind.__name__}; make the file again")
    return record


def read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    """All records of a .jsonl or .parquet file, in its order.

    Raises:
        RecordError: names file and line.
    """
    for number, line in enumerate(_lines(path), 1):
        yield from_json(line, kind, f"{path}:{number}")


def read_by_id(path: Path, kind: type[Record]) -> dict[str, Record]:
    """All records by the id of their item.

    Raises:
        RecordError: also for an id that occurs twice.
    """
    records: dict[str, Record] = {}
    for number, record in enumerate(read_records(path, kind), 1):
        if record.id in records:
            raise RecordError(f"{path}:{number}: {record.id!r} occurs twice; one row per item is expected")
        records[record.id] = record
    return records


def write_records(path: Path, records: Iterable[Generation | Scores | Decision]) -> int:
    """Writes a .jsonl or .parquet file that appears whole or not at all. Returns the number of records.

    Raises:
        MachineError: the disk is full or broken.
    """
    with whole_file(path) as temporary:
        return _write_parquet(temporary, records) if path.suffix == PARQUET else _write_jsonl(temporary, records)


def _write_jsonl(path: Path, records: Iterable[Generation | Scores | Decision]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(to_json(record) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, records: Iterable[Generation | Scores | Decision]) -> int:
    import pyarrow
    import pyarrow.parquet

    rows = [to_json(record) for record in records]
    pyarrow.parquet.write_table(pyarrow.table({ROW: pyarrow.array(rows, pyarrow.string())}), path, compression="zstd")
    return len(rows)


def _lines(path: Path) -> Iterator[str | bytes]:
    if not path.is_file():
        raise RecordError(f"{path} does not exist; run the step that writes it first")
    if path.suffix == PARQUET:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[ROW]):
                yield from batch.column(ROW).to_pylist()
        return
    with path.open("rb") as file:
        yield from file
