"""A chain of commands that is never repeated in vain: what each step depends on, what it came to, what a change touches.

In: WorkflowStep (verb, options, files it reads and writes)   Out: Planned: done, to run, or open until a step before it ends
Next: workflow.py (the steps of the self-improvement loop), runner.py (runs them)
A step is done if its build record was written after success, with the fingerprint that it would have now, and its outputs
are what they were then. Fingerprints are of contents, so a step that ran again and wrote the same bytes ends the matter
there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from sicog_mcore import __version__
from sicog_mcore.checkpoint import commit
from sicog_mcore.checkpoint.locate import find_folder
from sicog_mcore.errors import EXIT_INTERRUPTED, CheckpointError, ConfigProblem
from sicog_mcore.files import hash_file, hash_json, write_json

FORMAT = 2  # raised when a fingerprint changes its meaning
FOLDER = "steps"  # below the folder of the loop
HASHES = "hashes.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
RACY_S = 2.0  # a file that changed so lately may change again without a new time: its hash is not kept

State = Literal["done", "run", "open"]


@dataclass(frozen=True, kw_only=True)
class WorkflowStep:
    """One verb with its options.

    Attributes:
        name: also of its log and its build record.
        verb: words that name what is done, such as ``("evaluate", "score")``.
        options: dataclass of that verb; what is started is made of it, so no word can be misspelt.
        inputs: files and folders whose contents count; of a training run those of its newest checkpoint's weights.
        images: folders of which only the images count.
        outputs: files and folders that exist when it has succeeded.
        leftovers: what else it may leave behind; removed, with the outputs, before it runs on other inputs.
        needs: names of the steps that write its inputs.
        cache_key: what its results depend on beside the inputs, where that is not all of its options.
        is_parallel: started on several processes where there are several.
        size: how much there is to do, for people.
        usage: file in which the command counts its tokens.
        headline: how the line of its log begins that says what came of it.
    """

    name: str
    verb: tuple[str, ...]
    options: Any
    inputs: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    outputs: tuple[Path, ...]
    leftovers: tuple[Path, ...] = ()
    needs: tuple[str, ...] = ()
    cache_key: tuple[str, ...] = ()
    is_parallel: bool = False
    size: str = ""
    usage: Path | None = None
    headline: str = ""


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """The build record that a run of a step leaves.

    Attributes:
        is_finished: False while it runs, and for ever if it was killed.
        inputs, outputs: hash of each, by path; the outputs once it is finished.
        seconds: of all attempts that ended by themselves.
        tokens: read and drawn, or trained on.
        device_seconds: seconds times processes, of steps that use the devices.
        exit_code: of the last attempt; None if it did not end.
    """

    fingerprint: str
    is_finished: bool
    inputs: Mapping[str, str]
    outputs: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    device_seconds: float = 0.0
    exit_code: int | None = None


@dataclass(frozen=True)
class Planned:
    """The state that the plan gives a step.

    Attributes:
        state: "open" if it depends on what a step before it will write.
        why: for people.
        record: of its last run, if there was one.
    """

    step: WorkflowStep
    state: State
    why: str
    record: BuildRecord | None


class ContentHashes:
    """Hashes of files by their bytes; those of files that kept size and time are remembered.

    Args:
        memory: JSON file; made if it does not exist, and of no use to anybody else.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = _read_json(memory) or {}

    def of(self, path: Path) -> str:
        """32 hexadecimal digits; empty if there is nothing, or a training run without a checkpoint."""
        if path.is_file():
            return self._file(path)
        try:
            if checkpoint := find_folder(path):
                return commit.fingerprint(checkpoint)
        except CheckpointError:  # none, or damaged: as if it were not there, so that it is made again
            return ""
        return self._folder(path, ()) if path.is_dir() else ""

    def of_images(self, folder: Path) -> str:
        """Digests the images below a folder; other files there do not count."""
        return self._folder(folder, IMAGE_SUFFIXES) if folder.is_dir() else ""

    def save(self) -> None:
        """Remembers what was hashed."""
        write_json(self._memory, self._known, shared=True)

    def _folder(self, folder: Path, suffixes: tuple[str, ...]) -> str:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        chosen = [file for file in files if not suffixes or file.suffix.lower() in suffixes]
        return hash_json([[file.relative_to(folder).as_posix(), self._file(file)] for file in chosen])

    def _file(self, path: Path) -> str:
        found = path.stat()
        known = self._known.get(str(path))
        if known is not None and known[:2] == [found.st_size, found.st_mtime_ns]:
            return str(known[2])
        content = hash_file(path)
        if time.time() - found.st_mtime > RACY_S:
            self._known[str(path)] = [found.st_size, found.st_mtime_ns, content]
        return content


class BuildRecords:
    """One JSON file per step; it appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, step: WorkflowStep) -> BuildRecord | None:
        """None if there is none, or one of another version of this program."""
        found = _read_json(self._path(step))
        return BuildRecord(**found) if found and found.keys() == {item.name for item in fields(BuildRecord)} else None

    def begin(self, step: WorkflowStep, contents: ContentHashes) -> BuildRecord:
        """Notes that a step starts. What it left when it ran on other inputs is removed first.

        A run that was stopped keeps its files: the command goes on with them.
        """
        inputs = _hashes(step, contents)
        now = BuildRecord(fingerprint=fingerprint(step, inputs), is_finished=False, inputs=inputs)
        before = self.read(step)
        if before is not None and before.fingerprint == now.fingerprint:
            now = BuildRecord(**asdict(before) | {"is_finished": False, "outputs": {}})
        else:
            # What is left of other inputs is no result any more, also if the process ends while it is removed.
            self._write(step, BuildRecord(fingerprint="", is_finished=False, inputs={}))
            for path in (*step.outputs, *step.leftovers):
                _remove(path)
        self._write(step, now)
        return now

    def end(self, step: WorkflowStep, record: BuildRecord, exit_code: int, contents: ContentHashes) -> None:
        """Notes how it ended; only with exit code 0 it is finished.

        Args:
            record: of ``begin``, with what the run took added.
        """
        outputs = {str(path): contents.of(path) for path in step.outputs} if exit_code == 0 else {}
        ended = {"is_finished": exit_code == 0, "outputs": outputs, "exit_code": exit_code}
        self._write(step, BuildRecord(**asdict(record) | ended))

    def _write(self, step: WorkflowStep, record: BuildRecord) -> None:
        write_json(self._path(step), asdict(record), shared=True)

    def _path(self, step: WorkflowStep) -> Path:
        return self.folder / f"{step.name}.json"


def in_order(steps: Sequence[WorkflowStep]) -> list[WorkflowStep]:
    """The steps, each behind those it needs; otherwise as they were given.

    Raises:
        ValueError: a name that occurs twice or is not there, or steps that wait for each other.
    """
    names = [step.name for step in steps]
    if len(set(names)) < len(names):
        raise ValueError(f"a name occurs twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    waiting, ordered = list(steps), list[WorkflowStep]()
    done: set[str] = set()
    while waiting:
        ready = next((step for step in waiting if done.issuperset(step.needs)), None)
        if ready is None:
            lacking = {need for step in waiting for need in step.needs} - set(names)
            problem = f"unknown: {', '.join(sorted(lacking))}" if lacking else "they wait for each other"
            raise ValueError(f"{', '.join(step.name for step in waiting)} can never run; {problem}")
        waiting.remove(ready)
        ordered.append(ready)
        done.add(ready.name)
    return ordered


def fingerprint(step: WorkflowStep, inputs: Mapping[str, str]) -> str:
    """Of verb, options, contents of inputs, and version: whatever changes the result changes it.

    Args:
        inputs: hashes by path. Where ``cache_key`` stands for the options, the paths themselves do not count.
    """
    told = step.cache_key or json.loads(json.dumps(asdict(step.options), default=str))  # paths as text
    return hash_json([FORMAT, __version__, step.name, step.verb, told, [*inputs.values()]])


def plan(steps: Sequence[WorkflowStep], records: BuildRecords, contents: ContentHashes) -> list[Planned]:
    """Plans each step in turn: done, to run, or open."""
    planned: list[Planned] = []
    ahead: dict[str, str] = {}  # names of steps that will run or may run
    for step in in_order(steps):
        record = records.read(step)
        waits = [name for name in step.needs if name in ahead]
        state, why = _judge(step, record, contents)
        if waits and (state == "done" or record is None):
            state, why = "open" if record else "run", "after those it needs"
        if state != "done":
            ahead[step.name] = why
        planned.append(Planned(step, state, why, record))
    contents.save()
    return planned


def foreign_files(steps: Sequence[WorkflowStep], records: BuildRecords) -> Iterator[ConfigProblem]:
    """Files in places where steps write that no step has written: they would be taken for results, or removed."""
    for step in steps:
        if records.read(step) is None:
            for path in (*step.outputs, *step.leftovers):
                if path.exists():
                    fix = "move it away, or choose another output"
                    yield ConfigProblem(step.name, str(path), "exists, but this loop has not written it", fix)


def _judge(step: WorkflowStep, record: BuildRecord | None, contents: ContentHashes) -> tuple[State, str]:
    """The state of a step as if nothing before it would run."""
    if record is None:
        return "run", "never ran"
    inputs = _hashes(step, contents)
    if fingerprint(step, inputs) != record.fingerprint:
        return "run", _what_changed(record.inputs, inputs)
    if not record.is_finished:
        ended = {None: "", EXIT_INTERRUPTED: "interrupted; "}.get(record.exit_code, f"failed ({record.exit_code}); ")
        return "run", f"{ended}goes on"
    for path in step.outputs:
        if (found := contents.of(path)) != record.outputs.get(str(path)):
            return "run", f"{path} {'changed' if found else 'is gone'}"
    return "done", ""


def _what_changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    if len(before) == len(now):
        changed = [path for (path, new), old in zip(now.items(), before.values(), strict=True) if new != old]
        if changed:
            return f"changed: {', '.join(changed)}"
    return "its options changed"


def _hashes(step: WorkflowStep, contents: ContentHashes) -> dict[str, str]:
    return {
        **{str(path): contents.of(path) for path in step.inputs},
        **{f"{folder} (images)": contents.of_images(folder) for folder in step.images},
    }


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    """None for a file that is not there or cannot be read as JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
