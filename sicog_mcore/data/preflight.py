"""Is everything that data loading needs in place? Asked before processes start, with a quick check of each file.

In: Experiment   Out: every ConfigProblem found   Next: sources.py (opens the data sets), chat.py
"""

from __future__ import annotations

import codecs
import json
import os
import re
from itertools import chain, islice
from pathlib import Path

from sicog_mcore.config import Experiment, HeldOutConfig, InitConfig, SourceConfig
from sicog_mcore.data.chat import LEGACY_COMMA, TEMPLATES, find_separators
from sicog_mcore.data.rows import MAX_ROW_BYTES
from sicog_mcore.data.shards import compression, quick_check
from sicog_mcore.data.tokenizer import Tokenizer, find_tokenizer_file, load_tokenizer
from sicog_mcore.errors import ConfigProblem

ROW_FILES = (".json", ".jsonl")
SHARD = ".tar"
PEEK_BYTES = 4096
CHUNK_BYTES = 1 << 20
UTF16 = re.compile(rb"\xff\xfe[\[{\s]\0|\xfe\xff\0[\[{\s]")
LIST_OF_OBJECTS = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
NO_ROW = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*\])?\s*")
TOKENIZER_FILES = "give a Hugging Face tokenizer.json, a SentencePiece .model, or the folder of one"
SOURCE_EXAMPLE = 'name at least one, e.g. --data.sources \'[{"path": "train.jsonl", "images": "images"}]\''


def check_inputs(experiment: Experiment) -> list[ConfigProblem]:
    """Looks at data sets, image folders and the tokenizer; returns all problems, none if training can start."""
    sources = experiment.data.sources
    problems = [
        problem
        for number, source in enumerate(sources)
        for problem in check_source(number, source) or check_content(number, source)
    ]
    if not sources:
        problems.append(ConfigProblem("data.sources", (), "no data set is named", SOURCE_EXAMPLE))
    if experiment.held_out.every_steps > 0:
        problems += _check_held_out(experiment.held_out)
    return [*problems, *_check_tokenizer(experiment), *_check_init(experiment.init), *_check_output(experiment.output)]


def check_source(number: int, source: SourceConfig, group: str = "data.sources") -> list[ConfigProblem]:
    """Finds the problems that keep data set ``number`` of a field from being opened: its path, its image folder."""
    problems: list[ConfigProblem] = []

    def report(field: str, value: str, problem: str, fix: str) -> None:
        problems.append(ConfigProblem(f"{group}[{number}].{field}", value, problem, fix))

    path = Path(source.path)
    has_rows = path.suffix in ROW_FILES
    kinds = f"give a {', '.join(ROW_FILES)} or {SHARD} file, or a folder of {SHARD} shards"
    if not path.exists():
        report("path", source.path, "does not exist", _relative_to_here())
    elif not _is_readable(path):
        report("path", source.path, "cannot be read", "give this user the right to read it")
    elif path.is_dir() and not any(path.glob(f"*{SHARD}")):
        inner = next(path.glob(f"*/*{SHARD}"), None)
        fix = f"name the folder that holds them, e.g. {inner.parent}" if inner else kinds
        report("path", source.path, f"is a folder without {SHARD} shards", fix)
    elif path.is_file() and not has_rows and path.suffix != SHARD:
        report("path", source.path, "is no known kind of data set", kinds)
    elif has_rows and path.is_file() and path.stat().st_size == 0:  # an empty shard is one bad row among its like
        report("path", source.path, "is empty", "prepare the data again or remove this source")
    elif has_rows and path.is_file() and (found := _foreign_format(path)):
        report("path", source.path, *found)
    images = Path(source.images)
    if has_rows and not images.is_dir():
        problem = "is not a folder" if images.exists() else "does not exist"
        report(
            "images",
            source.images,
            problem,
            f"give the folder that image paths are relative to ({_relative_to_here()})",
        )
    elif has_rows and not _is_readable(images):
        report("images", source.images, "cannot be read", "give this user the right to list and open it")
    return problems


def check_content(number: int, source: SourceConfig, group: str = "data.sources") -> list[ConfigProblem]:
    """Checks the first and last bytes of a data set: it may have no row at all, or shards that are cut off."""
    path, problems = Path(source.path), []
    for file in sorted(path.glob(f"*{SHARD}")) if path.is_dir() else [path]:
        try:
            found = quick_check(file) if file.suffix == SHARD else _emptiness(file)
        except OSError as error:
            found = str(error)
        if found:
            fix = f"write {'the shard' if file.suffix == SHARD else 'the file'} again, or move it out of the way"
            problems.append(ConfigProblem(f"{group}[{number}].path", str(file), found, fix))
    return problems


def is_lines(path: Path) -> bool:
    """Whether a file named .json holds one object per line, and more than one line."""
    with path.open("rb") as file:
        lines = (line.strip() for line in iter(lambda: file.readline(MAX_ROW_BYTES), b""))
        first, second = islice(chain((line for line in lines if line), (b"", b"")), 2)
    try:
        return second.startswith(b"{") and isinstance(json.loads(first.removeprefix(codecs.BOM_UTF8)), dict)
    except (ValueError, RecursionError):
        return False


def _foreign_format(path: Path) -> tuple[str, str] | None:
    """Names the format that a file of rows has instead, and the remedy."""
    with path.open("rb") as file:
        start = file.read(PEEK_BYTES)
    if packed := compression(start):
        return f"is compressed ({packed})", "unpack it: rows are read in place"
    if start.startswith(b"PAR1"):
        return "is Parquet", "write its rows as JSON, e.g. with datasets: Dataset.to_json"
    if UTF16.match(start):
        return "is UTF-16", "convert it to UTF-8"
    if path.suffix == ".jsonl" and LIST_OF_OBJECTS.match(start):
        return "is a JSON list, expected one row per line", "rename it to .json"
    return None


def _emptiness(path: Path) -> str:
    """Says that a file has no row; empty if it may have one. Reads on only over white space."""
    with path.open("rb") as file:
        seen = b""
        while len(seen) < PEEK_BYTES and (chunk := file.read(CHUNK_BYTES)):
            seen += chunk.strip() if not seen else chunk
    return "holds no row" if NO_ROW.fullmatch(seen) else ""


def _relative_to_here() -> str:
    return f"relative paths start at the current folder, {Path.cwd()}"


def _is_readable(path: Path) -> bool:
    return os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK)


def _check_held_out(held_out: HeldOutConfig) -> list[ConfigProblem]:
    group = "held_out.sources"
    problems = [
        problem
        for number, source in enumerate(held_out.sources)
        for problem in check_source(number, source, group) or check_content(number, source, group)
    ]
    if held_out.benchmark and ":" not in held_out.benchmark and not Path(held_out.benchmark).is_file():
        problems.append(ConfigProblem("held_out.benchmark", held_out.benchmark, "is no file", _relative_to_here()))
    if held_out.benchmark and not Path(held_out.images).is_dir():
        problems.append(ConfigProblem("held_out.images", held_out.images, "is no folder", _relative_to_here()))
    return problems


def _check_init(init: InitConfig) -> list[ConfigProblem]:
    return [
        ConfigProblem(f"init.{name}", path, "does not exist", _relative_to_here())
        for name, path in vars(init).items()
        if path and not Path(path).exists()
    ]


def _check_output(output: str) -> list[ConfigProblem]:
    """Nothing is created: the nearest folder that exists must allow it later."""
    folder = Path(output).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return []
    problem = f"{existing} is {'not writable for this user' if existing.is_dir() else 'not a folder'}"
    return [ConfigProblem("output", output, problem, "give a folder that can be created or written to")]


def _check_tokenizer(experiment: Experiment) -> list[ConfigProblem]:
    path = experiment.data.tokenizer
    if find_tokenizer_file(path) is None:
        problem = "holds no tokenizer" if path else "no tokenizer is named"
        return [ConfigProblem("data.tokenizer", path, problem, TOKENIZER_FILES)]
    try:
        tokenizer = load_tokenizer(path)
    except Exception as error:  # the tokenizers library raises nothing narrower
        return [ConfigProblem("data.tokenizer", path, f"cannot be used: {error}", TOKENIZER_FILES)]
    return _check_vocabulary(experiment, tokenizer)


def _check_vocabulary(experiment: Experiment, tokenizer: Tokenizer) -> list[ConfigProblem]:
    problems: list[ConfigProblem] = []
    data, rows = experiment.data, experiment.model.decoder.vocab_size
    kind = experiment.model.slicing.separators
    needed = tokenizer.size
    if needed > rows:
        fix = f"make it at least {needed}, or give the tokenizer of this decoder"
        problems.append(ConfigProblem("model.decoder.vocab_size", rows, f"the tokenizer needs {needed} tokens", fix))
    template = TEMPLATES.get(data.template)
    if template is None:
        problems.append(
            ConfigProblem("data.template", data.template, "is unknown", f"use one of {', '.join(TEMPLATES)}")
        )
    elif missing := [token for token in template.controls if tokenizer.token_to_id(token) is None]:
        problem = f"the tokenizer has no {', '.join(missing)}"
        problems.append(ConfigProblem("data.template", data.template, problem, "give the template of this tokenizer"))
    if kind == "legacy" and rows <= LEGACY_COMMA:
        problem = f"needs token {LEGACY_COMMA}, the decoder has {rows}"
        problems.append(ConfigProblem("model.slicing.separators", kind, problem, "use real"))
        return problems
    try:
        find_separators(tokenizer, kind)
    except ValueError as error:
        fix = "use a tokenizer that has both"
        problems.append(ConfigProblem("model.slicing.separators", kind, str(error), fix))
    return problems
