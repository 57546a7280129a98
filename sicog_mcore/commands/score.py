"""Scores the candidates of each item by how far they agree: generations.jsonl to scores.jsonl.

In: Generations (generate), maybe of further views of the images   Out: Scores   Next: curate.py
Scorers: tfidf | sentence:FOLDER_OR_WHEEL | decoder:FOLDER | vote | attributes:FILE. A high score is agreement, not truth.
Embedding can be divided: `--shard i/n` in n processes or on n machines with a common folder, then `--merge`. Without
either, one process does all of it. A run that was stopped goes on where it was, whichever way it is started again.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sicog_mcore.cognition.step_options import ScoreOptions
from sicog_mcore.commands.verb import Verb, VerbCall
from sicog_mcore.errors import EXIT_OK, ConfigError, ConfigProblem, DataError, SicogError, exit_code, printable

if TYPE_CHECKING:
    from sicog_mcore.cognition.scoring.agreement import Tally
    from sicog_mcore.cognition.scoring.embed import Embedder
    from sicog_mcore.cognition.scoring.similarity import Similarity
    from sicog_mcore.cognition.scoring.vectors import VectorStore

MODELS = ("sentence", "decoder")
NEEDS: Mapping[str, str] = {"tfidf": "sklearn", "sentence": "sentence_transformers", "decoder": "transformers"}
NOTE_EVERY = 30.0  # seconds
PARTS = ".vectors"  # behind the name of the output


@dataclass(frozen=True)
class ScoringResult:
    """The result that scoring came to.

    Attributes:
        out: file of the scores, or the folder of vectors where only a shard was embedded.
        records: items in the file; 0 of a shard.
        scorer: name of the similarity; of a shard its number.
        embedded, clauses: distinct clauses embedded in this run, and in all; 0 where nothing is embedded.
        tally: what was counted over all items; None of a shard.
    """

    out: Path
    records: int
    scorer: str
    embedded: int = 0
    clauses: int = 0
    tally: Tally | None = None

    def lines(self) -> list[str]:
        """The result for people."""
        work = f"; {self.embedded} of {self.clauses} distinct clauses embedded now" if self.clauses else ""
        if self.tally is None:
            return [f"{self.out}: shard {self.scorer}{work}"]
        failed = ", ".join(f"{number} x {reason}" for reason, number in self.tally.failures.most_common())
        failures = f"; not scored: {failed}" if failed else ""
        return [f"{self.out}: {self.records} items by {self.scorer}{failures}{work}", *self.tally.lines()]


def check(options: ScoreOptions) -> None:
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


def score_candidates(options: ScoreOptions) -> ScoringResult:
    """Embeds and scores, or embeds a shard.

    Raises:
        ConfigError: the options do not fit each other.
        RecordError: a file is missing or damaged.
    """
    check(options)
    from sicog_mcore.cognition.records import write_records
    from sicog_mcore.cognition.scoring.agreement import Tally, read_items, score
    from sicog_mcore.cognition.scoring.similarity import Cosine
    from sicog_mcore.cognition.scoring.vectors import Shard, VectorStore

    kind = options.scorer.partition(":")[0]
    views = {name: Path(file) for name, _, file in (view.partition("=") for view in options.views)}
    texts = (text for item in read_items(options.generations, views) for text in item.texts)
    folder = options.out.with_name(options.out.name + PARTS)
    store: VectorStore | None = None
    if kind in MODELS:
        store = VectorStore(folder, load_embedder(options))
        if options.merge:
            store.check(texts)
        else:
            note_progress(store.fill(texts, Shard(*(read_shard(options.shard or "") or (0, 1)))))
        if options.shard:
            return ScoringResult(folder, 0, options.shard, store.embedded, len(store))
    similarity = Cosine(store) if store else plain_similarity(options.scorer, texts)
    tally = Tally()
    verdicts = score(read_items(options.generations, views), similarity, options.across, tuple(views))
    count = write_records(options.out, tally.watch(verdicts))
    if store:
        shutil.rmtree(folder, ignore_errors=True)
    counts = (store.embedded, len(store)) if store else (0, 0)
    return ScoringResult(options.out, count, similarity.name, *counts, tally=tally)


def plain_similarity(scorer: str, texts: Iterable[str]) -> Similarity:
    """Returns the similarity of a scorer that needs no model."""
    from sicog_mcore.cognition.scoring.embed import TfIdf
    from sicog_mcore.cognition.scoring.similarity import AttributeF1, Cosine, Vote, read_vocabulary
    from sicog_mcore.cognition.scoring.vectors import distinct

    kind, _, place = scorer.partition(":")
    if kind == "attributes":
        return AttributeF1(read_vocabulary(Path(place)))
    return Vote() if kind == "vote" else Cosine(TfIdf(distinct(texts, {})))


def note_progress(counts: Iterable[int]) -> None:
    """Exhausts the counts; says now and then how far they are."""
    start = noted = time.monotonic()
    for count in counts:
        if time.monotonic() - noted > NOTE_EVERY:
            noted = time.monotonic()
            print(f"{count} clauses embedded, {count / (noted - start):.0f} per second", file=sys.stderr)


def load_embedder(options: ScoreOptions) -> Embedder:
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


def main(options: ScoreOptions, call: VerbCall) -> int:
    """Scores and prints; returns the exit code."""
    try:
        result = score_candidates(options)
        for line in result.lines():
            print(printable(line))
        if result.tally is not None and not result.tally.items:
            what = f"0 of {result.records} items were scored; `failure` of the generations says why"
            raise DataError(f"{options.out}: {what}")
    except (SicogError, OSError) as error:
        print(printable(f"score: {error}"), file=sys.stderr)
        return exit_code(error)
    return EXIT_OK


VERB = Verb(__doc__ or "", ScoreOptions, main, takes_abbreviations=False)
