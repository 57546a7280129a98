"""Scores the candidates of each item by how far they agree: generations.jsonl to scores.jsonl.

In: Generations (launch/generate.py), maybe of further views of the images   Out: Scores   Next: tools/curate.py
Scorers: tfidf | sentence:FOLDER_OR_WHEEL | decoder:FOLDER | vote | attributes:FILE. A high score is agreement, not truth.
Embedding can be divided: `--shard i/n` in n processes or on n machines with a common folder, then `--merge`. Without
either, one process does all of it. A run that was stopped goes on where it was, whichever way it is started again.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sicog_mcore.errors import EXIT_OK, ConfigError, ConfigProblem, DataError, SicogError, exit_code, printable

if TYPE_CHECKING:
    from sicog_mcore.cognition.scoring.embed import Embedder

MODELS = ("sentence", "decoder")
NEEDS: Mapping[str, str] = {"tfidf": "sklearn", "sentence": "sentence_transformers", "decoder": "transformers"}
NOTE_EVERY = 30.0  # seconds
PARTS = ".vectors"  # behind the name of the output


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--generations", type=Path, required=True, help="records of candidates, .jsonl or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="records of scores to write, .jsonl or .parquet")
    parser.add_argument("--scorer", default="tfidf", help="see above")
    parser.add_argument(
        "--views", nargs="+", default=[], metavar="NAME=FILE", help="the same items from other views of the images"
    )
    parser.add_argument(
        "--across", choices=("styles", "within"), default="styles", help="compare all candidates, or by style"
    )
    parser.add_argument(
        "--pooling", type=Path, help="JSON settings of a decoder: append_eos, max_tokens, pooling, precision"
    )
    parser.add_argument("--batch", type=int, default=64, help="texts that a model sees at once")
    parser.add_argument("--device", default="auto", help="of a model: auto, cpu, cuda, cuda:1 ...")
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--shard", metavar="I/N", help="only embed, part I (from 0) of N")
    work.add_argument("--merge", action="store_true", help="only score; every shard has to be there")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Everything that can be told from the command line alone.

    Raises:
        ConfigError: all that is wrong.
    """
    kind, _, place = options.scorer.partition(":")
    problems = []
    known = kind in (*MODELS, "attributes") if place else options.scorer in ("tfidf", "vote")
    if not known:
        expected = "tfidf, sentence:FOLDER_OR_WHEEL, decoder:FOLDER, vote or attributes:FILE"
        problems.append(ConfigProblem("scorer", options.scorer, f"expected {expected}", "correct it"))
    elif kind in NEEDS and importlib.util.find_spec(NEEDS[kind]) is None:
        problems.append(
            ConfigProblem("scorer", options.scorer, f"{NEEDS[kind]} is missing", "pip install 'sicog_mcore[score]'")
        )
    if (options.shard or options.merge) and kind not in MODELS:
        problems.append(
            ConfigProblem("scorer", options.scorer, "it embeds nothing, so it has no shards", "run it as a whole")
        )
    if options.pooling and kind != "decoder":
        problems.append(ConfigProblem("pooling", str(options.pooling), "only a decoder is pooled", "leave it out"))
    if options.batch < 1:
        problems.append(ConfigProblem("batch", options.batch, "expected at least 1", "correct it"))
    if options.shard and read_shard(options.shard) is None:
        problems.append(ConfigProblem("shard", options.shard, "expected I/N with 0 <= I < N", "correct it"))
    names = [view.partition("=")[0] for view in options.views]
    if any("=" not in view or not name for view, name in zip(options.views, names, strict=True)) or len({*names}) < len(
        names
    ):
        problems.append(ConfigProblem("views", options.views, "expected NAME=FILE, each name once", "correct it"))
    if problems:
        raise ConfigError(problems)


def read_shard(text: str) -> tuple[int, int] | None:
    """I and N of "I/N"; None if it is not of that form."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        return None
    return int(index), int(count)


def run(options: argparse.Namespace) -> Iterator[str]:
    """Does the work; yields the lines to print."""
    from sicog_mcore.cognition.records import write_records
    from sicog_mcore.cognition.scoring.agreement import Tally, read_items, score
    from sicog_mcore.cognition.scoring.embed import TfIdf
    from sicog_mcore.cognition.scoring.similarity import AttributeF1, Cosine, Similarity, Vote, read_vocabulary
    from sicog_mcore.cognition.scoring.vectors import Shard, VectorStore, distinct

    kind, _, place = options.scorer.partition(":")
    views = {name: Path(file) for name, _, file in (view.partition("=") for view in options.views)}
    texts = (text for item in read_items(options.generations, views) for text in item.texts)
    folder = options.out.with_name(options.out.name + PARTS)
    similarity: Similarity
    work = ""
    if kind in MODELS:
        store = VectorStore(folder, load_embedder(options))
        if options.merge:
            store.check(texts)
        else:
            note_progress(store.fill(texts, Shard(*(read_shard(options.shard or "") or (0, 1)))))
        work = f"; {store.embedded} of {len(store)} distinct clauses embedded now"
        if options.shard:
            yield f"{folder}: shard {options.shard}{work}"
            return
        similarity = Cosine(store)
    elif kind == "attributes":
        similarity = AttributeF1(read_vocabulary(Path(place)))
    else:
        similarity = Vote() if kind == "vote" else Cosine(TfIdf(distinct(texts, {})))
    tally = Tally()
    verdicts = score(read_items(options.generations, views), similarity, options.across, tuple(views))
    count = write_records(options.out, tally.watch(verdicts))
    if kind in MODELS:
        shutil.rmtree(folder, ignore_errors=True)
    failed = ", ".join(f"{number} x {reason}" for reason, number in tally.failures.most_common())
    yield f"{options.out}: {count} items by {similarity.name}" + (f"; not scored: {failed}" if failed else "") + work
    yield from tally.lines()
    if not tally.items:
        raise DataError(f"{options.out}: 0 of {count} items were scored; `failure` of the generations says why")


def note_progress(counts: Iterable[int]) -> None:
    """Exhausts the counts; says now and then how far they are."""
    start = noted = time.monotonic()
    for count in counts:
        if time.monotonic() - noted > NOTE_EVERY:
            noted = time.monotonic()
            print(f"{count} clauses embedded, {count / (noted - start):.0f} per second", file=sys.stderr)


def load_embedder(options: argparse.Namespace) -> Embedder:
    """The embedder that the scorer names."""
    from transformers.utils import logging

    from sicog_mcore.cognition.scoring.embed import decoder_embedder, sentence_embedder
    from sicog_mcore.cognition.scoring.encoders import Pooling, read_pooling

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    kind, _, place = options.scorer.partition(":")
    if kind == "sentence":
        return sentence_embedder(place, options.device, options.batch)
    settings = read_pooling(options.pooling) if options.pooling else Pooling()
    return decoder_embedder(place, settings, options.device, options.batch)


def main(arguments: list[str] | None = None) -> int:
    """Checks the options and runs; returns the exit code."""
    options = parse(arguments)
    try:
        check(options)
        for line in run(options):
            print(printable(line))
    except (SicogError, OSError) as error:
        print(printable(f"score: {error}"), file=sys.stderr)
        return exit_code(error)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
