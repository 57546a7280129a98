"""Steps: what is repeated and what is not, what a change touches, what is left after any end. Commands are quick fakes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from rich.console import Console

from sicog_mcore.cognition.loop import steps as steps_module
from sicog_mcore.cognition.loop.loop_console import LiveLine, ledger_rows, plan_summary
from sicog_mcore.cognition.loop.runner import StepRunner
from sicog_mcore.cognition.loop.steps import (
    BuildRecords,
    ContentHashes,
    WorkflowStep,
    fingerprint,
    foreign_files,
    in_order,
    plan,
)
from sicog_mcore.errors import EXIT_CRASH, ConfigError
from sicog_mcore.files import hash_json
from tests.interrupts import heeded

# Joins the first lines of its inputs; "fail" in them ends it with exit code 7, "none" writes nothing, "wait" never ends.
FAKE = """
import pathlib, sys, time
*inputs, output = map(pathlib.Path, sys.argv[1:])
text = "+".join(path.read_text().splitlines()[0] for path in inputs)
with open("ran.txt", "a") as file:
    file.write(output.stem + "\\n")
print("one line"); print(f"result {text}", flush=True)
if "wait" in text:
    time.sleep(600)
if "fail" in text:
    sys.exit(7)
if "none" not in text:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\\n")
"""
OLD = 10**18  # ns; a time that is not lately


@dataclass(frozen=True)
class Words:
    """Options of a fake, as they are written."""

    words: tuple[str, ...]


def words_of(step: WorkflowStep) -> list[str]:
    return [str(Path.cwd() / step.verb[0]), *step.options.words]


def step(name: str, inputs: Sequence[str], needs: Sequence[str] = (), **more: Any) -> WorkflowStep:
    """One fake: reads ``inputs``, writes ``out/NAME.txt``."""
    output = Path("out") / f"{name}.txt"
    return WorkflowStep(
        name=name,
        verb=("fake.py",),
        options=Words(words=(*inputs, str(output))),
        inputs=tuple(map(Path, inputs)),
        outputs=(output,),
        needs=tuple(needs),
        headline="result",
        **more,
    )


# a and b read a file of the user's each; c reads both results; d reads c's, e reads b's.
STEPS = (
    step("a", ["first.txt"]),
    step("b", ["second.txt"]),
    step("c", ["out/a.txt", "out/b.txt"], ["a", "b"]),
    step("d", ["out/c.txt"], ["c"]),
    step("e", ["out/b.txt"], ["b"]),
)


class World:
    """A folder with fakes, and what was run in it."""

    def __init__(self, folder: Path) -> None:
        self.screen = io.StringIO()
        console = Console(file=self.screen, width=200)
        self.runner = StepRunner(words_of, Path("loop"), 1, LiveLine(console))

    def run(self, steps: Sequence[WorkflowStep] = STEPS) -> tuple[int, list[str]]:
        """Exit code, and the names of what ran."""
        Path("ran.txt").write_text("")
        exit_code = self.runner.run_all(steps)
        return exit_code, Path("ran.txt").read_text().split()

    def states(self, steps: Sequence[WorkflowStep] = STEPS) -> dict[str, str]:
        return {entry.step.name: entry.state for entry in self.runner.plan(steps)}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE)
    Path("first.txt").write_text("1\n")
    Path("second.txt").write_text("2\n")
    return World(tmp_path)


def test_steps_stand_behind_those_they_need_and_else_as_given() -> None:
    assert [s.name for s in in_order([STEPS[3], STEPS[2], STEPS[1], STEPS[4], STEPS[0]])] == ["b", "e", "a", "c", "d"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("a", [], ["b"]), step("b", [], ["a"])], "a, b can never run; they wait for each other"),
        ([step("a", [], ["x"])], "unknown: x"),
        ([step("a", []), step("a", [])], "occurs twice: a"),
    ],
)
def test_steps_that_can_never_run_are_refused(steps: list[WorkflowStep], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_order(steps)


def test_everything_runs_once_and_then_nothing(world: World) -> None:
    assert world.states() == dict.fromkeys("abcde", "run")
    assert world.run() == (0, ["a", "b", "c", "d", "e"])
    assert Path("out/d.txt").read_text() == "1+2\n"
    assert world.run() == (0, [])
    assert world.states() == dict.fromkeys("abcde", "done")


def test_a_changed_input_reruns_what_depends_on_it_and_nothing_else(world: World) -> None:
    world.run()
    Path("first.txt").write_text("3\n")
    assert world.states() == {"a": "run", "b": "done", "c": "open", "d": "open", "e": "done"}
    assert plan(STEPS, world.runner.records, world.runner.contents)[0].why == "changed: first.txt"
    assert world.run() == (0, ["a", "c", "d"])


def test_a_result_that_comes_out_equal_ends_the_matter(world: World) -> None:
    world.run()
    Path("first.txt").write_text("1\nanother second line\n")
    assert world.run() == (0, ["a"])
    assert world.states() == dict.fromkeys("abcde", "done")


def test_a_new_time_of_an_input_changes_nothing(world: World) -> None:
    world.run()
    os.utime("first.txt", ns=(OLD, OLD))
    assert world.run() == (0, [])


def test_another_command_or_version_runs_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    other = replace(STEPS[4], options=Words(words=(*STEPS[4].options.words[:-1], "./out/e.txt")))
    assert world.run([*STEPS[:4], other]) == (0, ["e"])
    meant = [replace(step, cache_key=("x",)) for step in STEPS]
    world.run(meant)
    moved = [*meant[:4], replace(meant[4], options=other.options)]
    assert world.run(moved) == (0, [])  # the options count no more, what it means does
    monkeypatch.setattr(steps_module, "__version__", "another")
    assert set(world.states(meant).values()) == {"run"}


@pytest.mark.parametrize("damage", ["removed", "edited"])
def test_a_result_that_is_not_what_it_was_is_made_again(world: World, damage: str) -> None:
    world.run()
    path = Path("out/b.txt")
    path.unlink() if damage == "removed" else path.write_text("by hand\n")
    assert world.states()["b"] == "run"
    assert world.run() == (0, ["b"])  # and the same bytes come out


def test_a_failing_step_shows_its_last_lines_and_the_next_run_goes_on_there(world: World) -> None:
    Path("second.txt").write_text("fail\n")
    assert world.run() == (7, ["a", "b"])
    shown = world.screen.getvalue()
    assert "  | result fail" in shown and "failed with exit code 7" in shown and "loop/logs/b.log" in shown
    assert world.runner.plan(STEPS)[1].why == "failed (7); goes on"
    assert world.run() == (7, ["b"])
    Path("second.txt").write_text("2\n")
    assert world.run() == (0, ["b", "c", "d", "e"])


def test_a_step_that_ends_well_without_its_result_has_failed(world: World) -> None:
    Path("second.txt").write_text("none\n")
    assert world.run()[0] == EXIT_CRASH
    assert "the step ended without out/b.txt" in world.screen.getvalue()


def test_a_line_says_what_came_of_a_step(world: World) -> None:
    world.run()
    assert "[3/5] c  0:00:00  result 1+2" in world.screen.getvalue()


def test_a_stopped_step_keeps_its_files_unless_its_inputs_changed(world: World) -> None:
    records, contents = world.runner.records, world.runner.contents
    records.begin(STEPS[0], contents)
    Path("out").mkdir()
    Path("out/a.txt").write_text("half\n")
    assert world.runner.plan(STEPS)[0].why == "goes on"
    records.begin(STEPS[0], contents)
    assert Path("out/a.txt").read_text() == "half\n"
    Path("first.txt").write_text("3\n")
    records.begin(STEPS[0], contents)
    assert not Path("out/a.txt").exists()


def test_killed_while_it_cleans_up_a_step_cleans_up_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    Path("first.txt").write_text("3\n")

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(steps_module, "_remove", die)
        with pytest.raises(KeyboardInterrupt):
            world.runner.records.begin(STEPS[0], world.runner.contents)
    assert Path("out/a.txt").exists()
    assert world.states()["a"] == "run"
    world.runner.records.begin(STEPS[0], world.runner.contents)
    assert not Path("out/a.txt").exists()


def test_what_others_put_where_a_step_writes_is_not_touched(world: World) -> None:
    Path("out").mkdir()
    Path("out/c.txt").write_text("precious\n")
    assert [problem.path for problem in foreign_files(STEPS, world.runner.records)] == ["c"]
    with pytest.raises(ConfigError, match="this loop has not written it"):
        world.runner.plan(STEPS)


def test_one_step_alone_needs_those_before_it(world: World) -> None:
    with pytest.raises(ConfigError, match="needs a, b, which are not done"):
        world.runner.run_only(STEPS, "c")
    with pytest.raises(ConfigError, match="use one of a, b, c, d, e"):
        world.runner.run_only(STEPS, "z")
    assert [world.runner.run_only(STEPS, name) for name in "abc"] == [0, 0, 0]
    assert world.states() == {"a": "done", "b": "done", "c": "done", "d": "run", "e": "run"}
    assert world.run() == (0, ["d", "e"])


def start_runner() -> subprocess.Popen[str]:
    """STEPS run by a process of its own, once the first of them waits; in a process group of its own."""
    code = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from tests.cognition.loop.test_steps import STEPS, words_of\n"
        "from sicog_mcore.cognition.loop.loop_console import LiveLine\n"
        "from sicog_mcore.cognition.loop.runner import StepRunner, interruptible\n"
        "with interruptible():\n"
        "    StepRunner(words_of, Path('loop'), 1, LiveLine(Console())).run_all(STEPS)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[3], "kernels")))}
    Path("first.txt").write_text("wait\n")
    with heeded():
        parent = subprocess.Popen(
            [sys.executable, "-c", code], env=env, start_new_session=True, stderr=subprocess.PIPE, text=True
        )
    while not Path("ran.txt").exists() or not Path("ran.txt").read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    return parent


@pytest.mark.slow
def test_an_interrupt_ends_the_step_and_the_next_run_goes_on_with_it(world: World) -> None:
    parent = start_runner()
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    assert "KeyboardInterrupt" in parent.communicate()[1]
    record = world.runner.records.read(STEPS[0])
    assert record is not None and not record.is_finished and record.exit_code == 130 and record.seconds > 0
    assert world.runner.plan(STEPS)[0].why == "interrupted; goes on"


@pytest.mark.slow
def test_two_processes_never_run_the_same_step_even_if_one_lost_its_parent(world: World) -> None:
    parent = start_runner()
    try:
        os.kill(parent.pid, signal.SIGKILL)  # the step itself lives on
        parent.wait()
        with pytest.raises(ConfigError, match="another process runs this step"):
            world.run()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
    Path("first.txt").write_text("1\n")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert world.run()[0] == 0
            return
        except ConfigError:
            time.sleep(0.05)  # the lock goes when the kernel has taken the process away
    raise AssertionError("the lock is still held")


def test_hashes_are_remembered_by_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"1")
    os.utime(file, ns=(OLD, OLD))
    contents = ContentHashes(tmp_path / "hashes.json")
    before = contents.of(file)
    file.write_bytes(b"2")
    os.utime(file, ns=(OLD, OLD))
    contents.save()
    assert ContentHashes(tmp_path / "hashes.json").of(file) == before  # nobody looked inside
    os.utime(file, ns=(OLD + 1, OLD + 1))
    assert ContentHashes(tmp_path / "hashes.json").of(file) != before


def test_a_file_written_just_now_is_always_read(tmp_path: Path) -> None:
    file, contents = tmp_path / "a.bin", ContentHashes(tmp_path / "hashes.json")
    found = set()
    for content in (b"1", b"2", b"3"):
        file.write_bytes(content)
        found.add(contents.of(file))
    assert len(found) == 3


def write_manifest(folder: Path, weights: str, rng: str) -> None:
    """A manifest of two files, as the first version wrote it."""
    texts = {"__0_0.distcp": weights, "rng/rank_0": rng}
    files = {
        name: {"bytes": len(text), "xxh3": xxhash.xxh3_128_hexdigest(text.encode())} for name, text in texts.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}, indent=1, sort_keys=True))


def test_the_manifest_stands_for_a_checkpoint_and_the_newest_for_a_run(tmp_path: Path) -> None:
    contents, run = ContentHashes(tmp_path / "hashes.json"), tmp_path / "run"
    first, second = (run / "checkpoints" / f"step_{number:08d}" for number in (1, 2))
    for folder in (first, second):
        folder.mkdir(parents=True)
        write_manifest(folder, weights=folder.name, rng="x")
        (folder / "__0_0.distcp").write_bytes(os.urandom(8))
    found = contents.of(run)
    assert found == contents.of(second) != contents.of(first)
    write_manifest(second, weights=second.name, rng="y")
    assert contents.of(run) == found  # the same weights
    (second / "manifest.json").unlink()  # no longer committed
    assert contents.of(run) == contents.of(first)
    (first / "manifest.json").unlink()
    assert contents.of(run) == ""


def test_of_a_folder_of_images_only_the_images_count(tmp_path: Path) -> None:
    contents, folder = ContentHashes(tmp_path / "hashes.json"), tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    (folder / "below/a.PNG").write_bytes(b"1")
    before = contents.of_images(folder)
    (folder / "rows.jsonl").write_text("{}")
    assert contents.of_images(folder) == before
    (folder / "b.jpg").write_bytes(b"2")
    assert contents.of_images(folder) != before


def test_a_stamp_of_another_form_counts_as_none(tmp_path: Path) -> None:
    records = BuildRecords(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"fingerprint": "x"}))
    assert records.read(STEPS[0]) is None
    (tmp_path / "a.json").write_text("{")
    assert records.read(STEPS[0]) is None


def test_the_fingerprint_is_of_all_that_counts() -> None:
    inputs = {"first.txt": hash_json("1")}
    prints = {
        fingerprint(STEPS[0], inputs),
        fingerprint(STEPS[0], {"first.txt": hash_json("2")}),
        fingerprint(STEPS[0], {**inputs, "more": hash_json("1")}),
        fingerprint(replace(STEPS[0], verb=("other.py",)), inputs),
        fingerprint(replace(STEPS[0], options=Words(words=("--x",))), inputs),
        fingerprint(replace(STEPS[0], cache_key=("x",)), inputs),
        fingerprint(STEPS[1], inputs),
    }
    assert len(prints) == 7


def test_the_ledger_has_time_tokens_and_device_seconds(world: World) -> None:
    Path("usage.jsonl").write_text('{"prefill_tokens": 5, "decode_tokens": 7}\n{"decoder_tokens": 30}\n{"torn')
    world.runner.ranks = 2
    counted = replace(STEPS[0], usage=Path("usage.jsonl"))
    world.run([counted, STEPS[1]])
    rows: list[Mapping[str, Any]] = ledger_rows(world.runner.plan([counted, STEPS[1]]))
    assert [row["tokens"] for row in rows] == [42, 0]
    assert [row["device_seconds"] for row in rows] == [0, 0]  # neither is parallel
    assert all(row["seconds"] > 0 for row in rows)
    assert plan_summary(world.runner.plan([counted, STEPS[1]])) == "2 steps: 2 done"


def test_steps_get_the_environment_that_is_meant_for_them(world: World) -> None:
    step = replace(STEPS[0], verb=("told.py",), outputs=(Path("told.txt"),))
    Path("told.py").write_text("import os; open('told.txt', 'w').write(os.environ['RANK'] + os.environ['PATH'])")
    runner = StepRunner(words_of, Path("loop2"), 1, world.runner.screen, {"RANK": "0", "PATH": "here"})
    assert runner.run_all([step]) == 0
    assert Path("told.txt").read_text() == "0here"


def test_parallel_steps_start_under_torchrun_and_count_every_process(world: World) -> None:
    parallel = replace(STEPS[0], is_parallel=True)
    alone = world.runner.command(parallel)
    world.runner.ranks = 4
    assert alone[2:] == world.runner.command(STEPS[0])[2:]
    assert world.runner.command(parallel)[2:7] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
    ]
    record = world.runner.records.begin(parallel, world.runner.contents)
    assert asdict(record)["device_seconds"] == 0
