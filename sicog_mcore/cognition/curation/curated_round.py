"""Curates a round: every generated item is kept for training, or dropped for a reason that is counted.

In: generations and scores of one or several sources, images, maybe rows of text and evaluation images
Out: decisions.jsonl, curated/, pairs.jsonl, funnel.json in one folder   Next: launch/pretrain_stage15.py, tools/why.py
Filters, in order: filters.py, the rows (codes of rows.py and codec.py, no_form), the image (codes of decode.py,
image_changed), evaluation_image, near_duplicate_image, near_duplicate_text, mix. Equal files give equal bytes.
Memory: records are streamed twice; an item that passes filters.py stays as about 1 kB plus 8 bytes per word, any other
as its id and reason, an image as about 600 bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from math import log
from pathlib import Path
from typing import Any, TextIO

from sicog_mcore.cognition.curation.conversations import find_rejected, make_pair, make_rows, text_row
from sicog_mcore.cognition.curation.datasets import RowWriter, encode, open_writers
from sicog_mcore.cognition.curation.funnel import Funnel, StarvedFunnel
from sicog_mcore.cognition.curation.near_duplicates import BITS, EXACT
from sicog_mcore.cognition.curation.selection import Curation, Selection, read_source, select
from sicog_mcore.cognition.records import Decision, Generation, Scores, to_json
from sicog_mcore.config import DataConfig, SourceConfig
from sicog_mcore.data.sources import SampleIndex, open_sources
from sicog_mcore.errors import ConfigError, ConfigProblem, SampleError
from sicog_mcore.files import hash_file, move, sync, sync_tree, whole_folder

DECISIONS, CURATED, PAIRS, FUNNEL = "decisions.jsonl", "curated", "pairs.jsonl", "funnel.json"
TEMPORARY = ".curate.partial"
NOT_IN_FUNNEL = ("sources", "images", "text", "evaluation", "workers")  # paths, and what has no effect


def curate(curation: Curation, out: Path) -> Funnel:
    """Writes decisions, training rows, pairs and funnel into ``out``; all of them, or nothing.

    funnel.json is taken away first and appears last: where it stands, the other files belong to it.

    Raises:
        ConfigError: options, or evaluation images, that cannot work.
        RecordError: files that are damaged, or do not belong together.
        StarvedFunnel: too little is left, or suspiciously much.
        MachineError: the disk is full or broken; what was there before is untouched.
    """
    if problems := _problems(curation):
        raise ConfigError(problems)
    texts = _open_text(curation)
    funnel = Funnel(settings=_settings(curation), inputs=_inputs(curation))
    text_ids = _usable_text(texts, funnel)
    # First pass over the records: it decides and keeps little of each. The second, in ``_write``, writes what is kept.
    selection = select(curation, text_ids)
    funnel.evaluation = selection.evaluation
    for task, drop in zip(selection.tasks, selection.drops, strict=True):
        funnel.count(task, drop)
    funnel.text["kept"] = len(selection.text_rows)
    funnel.text["mix"] = len(text_ids) - len(selection.text_rows)
    _require_enough(curation, selection, funnel)
    # Written beside the final place, on the same file system, so that moving it is a rename.
    temporary = out / TEMPORARY
    with whole_folder(temporary):
        (temporary / CURATED).mkdir()
        _write(curation, selection, texts, funnel, temporary)
        (temporary / FUNNEL).write_text(funnel.to_json(), encoding="utf-8")
        sync_tree(temporary)
    _commit(temporary, out)
    return funnel


def _problems(curation: Curation) -> list[ConfigProblem]:
    problems: list[ConfigProblem] = []

    def require(fits: bool, option: str, value: object, problem: str, fix: str) -> None:
        if not fits:
            problems.append(ConfigProblem(option, value, problem, fix))

    parts, pairs = dict(curation.mix), curation.pairs
    require(bool(curation.sources), "--source", (), "no source is named", "name generations and their scores")
    require(curation.images.is_dir(), "--images", str(curation.images), "is no folder", "give the items' image folder")
    radii = {"--image-radius": curation.image_radius, "--evaluation-radius": curation.evaluation_radius}
    for option, radius in radii.items():
        fix = f"give 0 to {BITS // 4} bits, or {EXACT} for equal bytes"
        require(EXACT <= radius <= BITS // 4, option, radius, "is no useful radius", fix)
    shares = {
        "--text-similarity": curation.text_similarity,
        "--max-repetition": curation.limits.max_repetition,
        "--min-share": curation.min_share,
        "--max-share": curation.max_share,
    }
    for option, share in shares.items():
        require(0 <= share <= 1, option, share, "is no share", "give a number from 0 to 1")
    require(curation.min_share <= curation.max_share, "--min-share", curation.min_share, "exceeds --max-share", "swap")
    require(curation.min_rows >= 1, "--min-kept", curation.min_rows, "is below 1", "give at least 1")
    require(curation.workers >= 1, "--workers", curation.workers, "is below 1", "give at least 1")
    require(pairs.margin > 0, "--pair-margin", pairs.margin, "is not above 0", "a pair needs a better and a worse side")
    require(pairs.length_ratio >= 1, "--pair-length-ratio", pairs.length_ratio, "is below 1", "1.5 is usual")
    require(min(parts.values(), default=1) >= 0, "--mix", parts, "has a negative part", "give parts from 0 on")
    require(max(parts.values(), default=1) > 0, "--mix", parts, "has no part above 0", "give one, or no mix")
    require(len(parts) == len(curation.mix), "--mix", curation.mix, "names a kind twice", "name each once")
    for option, names in (("--forms", curation.forms), ("--formats", curation.formats)):
        require(len(set(names)) == len(names) > 0, option, names, "names one twice, or none", "name each once")
    return problems


def _settings(curation: Curation) -> Mapping[str, Any]:
    thresholds = [[asdict(file.threshold) for file in source.scores] for source in curation.sources]
    options = {name: value for name, value in asdict(curation).items() if name not in NOT_IN_FUNNEL}
    return {"thresholds": thresholds, **options}


def _inputs(curation: Curation) -> Mapping[str, Any]:
    """Hashes of the files; images are held against the hashes in the records."""
    return {
        "generations": [_hash(source.generations) for source in curation.sources],
        "scores": [[_hash(file.path) for file in source.scores] for source in curation.sources],
        "text": _hash(curation.text) if curation.text else "",
    }


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        fix = "run the step that writes it first, or name another file"
        raise ConfigError([ConfigProblem("--source", str(path), str(error), fix)]) from error


def _open_text(curation: Curation) -> SampleIndex:
    if curation.text is None:
        return SampleIndex([], [], "quarantine")
    source = SourceConfig(path=str(curation.text), images=str(curation.text.parent))
    return open_sources([source], DataConfig())


def _usable_text(texts: SampleIndex, funnel: Funnel) -> dict[int, str]:
    """Ids of the rows of text that can be learnt, by their number; the others are counted."""
    usable: dict[int, str] = {}
    for number in range(len(texts)):
        try:
            sample = texts.read(number)
        except SampleError as error:
            funnel.text[error.reason] += 1
            continue
        if sample.images:
            funnel.text["has_image"] += 1
        else:
            usable[number] = sample.id
    return usable


def _require_enough(curation: Curation, selection: Selection, funnel: Funnel) -> None:
    if selection.num_rows < curation.min_rows:
        found = f"{selection.num_rows} rows are left, at least {curation.min_rows} expected"
        raise StarvedFunnel(funnel, f"{found}; nothing was written: see which filter took them, or lower --min-kept")
    if not curation.min_share <= funnel.share <= curation.max_share:
        bounds = f"{curation.min_share:.1%} to {curation.max_share:.1%}"
        found = f"{funnel.share:.1%} of the items passed, {bounds} expected"
        raise StarvedFunnel(funnel, f"{found}; nothing was written: change thresholds, or --min-share and --max-share")


def _write(curation: Curation, selection: Selection, texts: SampleIndex, funnel: Funnel, folder: Path) -> None:
    with ExitStack() as stack:
        decisions = stack.enter_context((folder / DECISIONS).open("w", encoding="utf-8"))
        pairs = stack.enter_context((folder / PAIRS).open("w", encoding="utf-8"))
        writers = stack.enter_context(open_writers(folder / CURATED, curation.formats, curation.images))
        drops = iter(selection.drops)
        for source in curation.sources:
            for generation, scores in read_source(source):
                drop = next(drops)
                if drop:
                    decision = Decision(generation.id, False, drop.reason, drop.detail)
                else:
                    decision = _keep(curation, generation, scores[0], writers, pairs, funnel)
                decisions.write(to_json(decision) + "\n")
        for number in sorted(selection.text_rows):
            row = text_row(texts.read(number))
            funnel.rows[row.form] += 1
            for writer in writers:
                writer.write(row)


def _keep(
    curation: Curation,
    generation: Generation,
    scores: Scores,
    writers: list[RowWriter],
    pairs: TextIO,
    funnel: Funnel,
) -> Decision:
    """Writes the rows of an item, and its pair if it makes one."""
    winner = generation.candidates[scores.winner]
    rows = make_rows(generation, winner, curation.forms)
    for row in rows:
        funnel.rows[row.form] += 1
        for writer in writers:
            writer.write(row)
    # An item is kept for its rows; a pair is made if it has one.
    rejected, missing = find_rejected(generation, scores, curation.pairs, curation.seed)
    if not missing:
        try:
            pairs.write(encode(make_pair(generation, scores.winner, rejected)) + "\n")
        except SampleError as error:
            rejected, missing = -1, error.reason
    funnel.pairs[missing or "written"] += 1
    if not missing:
        # The mean of this logarithm tells whether the better answers are simply the longer ones.
        funnel.length_ratios += log(winner.tokens / max(generation.candidates[rejected].tokens, 1))
    score = f"score {scores.scores[scores.winner]:.4f} by {scores.scorer}"
    detail = f"{score}; no pair: {missing}" if missing else score
    return Decision(generation.id, True, "kept", detail, scores.winner, rejected, tuple(row.id for row in rows))


def _commit(temporary: Path, out: Path) -> None:
    """Moves finished files to their places. Cut off anywhere, it leaves no funnel.json, and the next run starts anew."""
    # Without its funnel the folder counts as unfinished; the folder's entry is synced before anything else moves.
    (out / FUNNEL).unlink(missing_ok=True)
    sync(out)
    if (out / CURATED).exists():
        move(out / CURATED, temporary / "old")
    # The funnel is last: it vouches for the others.
    for name in (CURATED, DECISIONS, PAIRS, FUNNEL):
        move(temporary / name, out / name)
    shutil.rmtree(temporary)
