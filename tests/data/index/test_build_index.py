"""An index is built block by block, goes on where it was killed, and what did not change is not indexed again.

Tested with it: block_jobs.py, block_rows.py, image_recheck.py, index_settings.py, index_store.py, row_blocks.py.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sicog_mcore.config import Experiment, SourceConfig
from sicog_mcore.data.index import build_index as building
from sicog_mcore.data.index import image_recheck, index_store, row_blocks
from sicog_mcore.data.index.block_rows import BlockIndexer
from sicog_mcore.data.index.block_table import BlockTable, BlockUnreadable
from sicog_mcore.data.index.build_index import IndexOptions, IndexProgress, IndexReport, build_index
from sicog_mcore.data.index.index_store import IndexStore
from sicog_mcore.data.index.indexed_files import open_index
from sicog_mcore.data.resume import open_rows
from sicog_mcore.data.rows import build_sample
from sicog_mcore.data.sources import list_files, new_survey
from sicog_mcore.errors import EXIT_CONFIG, ConfigError
from tests.builders import QUESTIONS, tiny_experiment, write_image

NUM_ROWS = 300
RESTED = index_store.RESTED_NS
ALONE = IndexOptions(processes=1)


def text_row(number: int, word: str = "red") -> str:
    turns = [{"from": "human", "value": QUESTIONS[number % 3]}, {"from": "gpt", "value": f"It is {word} {number}."}]
    return json.dumps({"id": f"s{number}", "conversations": turns})


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_ROWS", 16)
    monkeypatch.setattr(row_blocks, "ENDS_ONE_IN", 8)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    (tmp_path / "images").mkdir()
    (tmp_path / "data.jsonl").write_text("".join(text_row(i) + "\n" for i in range(NUM_ROWS)))
    return tiny_experiment(tmp_path)


def blocks(experiment: Experiment) -> dict[str, bytes]:
    folder = IndexStore(experiment).folder / "blocks"
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def rows_file(experiment: Experiment) -> Path:
    return Path(experiment.data.sources[0].path)


def test_a_second_build_does_nothing_and_reads_no_row(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_store, "RESTED_NS", -1)
    first = build_index(experiment, ALONE)
    assert (first.rows, first.built_rows, first.blocks) == (NUM_ROWS, NUM_ROWS, first.built_blocks)
    assert 9 <= first.blocks <= NUM_ROWS // 16 and len(blocks(experiment)) == first.blocks
    (line,) = first.lines()
    assert f"data.index={Path(experiment.output) / 'index'} shares it between runs" in line
    monkeypatch.setattr(building, "cut_blocks", None)  # reading the file would fail
    again = build_index(experiment, ALONE)
    assert (again.rows, again.blocks, again.built_rows, again.built_blocks) == (NUM_ROWS, first.blocks, 0, 0)
    assert again.lines() == [f"the index in {first.folder} has all 300 rows in {first.blocks} blocks"]


def test_a_file_that_has_not_rested_is_read_again_but_not_indexed_again(experiment: Experiment) -> None:
    build_index(experiment, ALONE)
    assert IndexStore(experiment).known(building.list_files(experiment.data.sources, _survey())[0][0]) is None
    assert build_index(experiment, ALONE).built_rows == 0


def _survey() -> object:
    from sicog_mcore.data.rows import build_sample
    from sicog_mcore.data.sources import new_survey

    return new_survey(build_sample)


def change_one(text: str) -> str:
    return text.replace("It is red 150.", "It is tan 150.")


CHANGES: dict[str, tuple[Callable[[str], str], int]] = {
    # A block ends where the bytes of a row say so; if that row changes, the blocks behind it are others until they meet.
    "edited in place": (change_one, 3),
    "put in front": (lambda text: text_row(1000) + "\n" + text, 3),
    "taken out": (lambda text: text.replace(text_row(150) + "\n", ""), 3),
    "a blank line put in": (lambda text: text.replace(text_row(150), "\n" + text_row(150)), 1),
    "appended": (lambda text: text + "".join(text_row(i) + "\n" for i in range(1000, 1010)), 2),
    "touched": (lambda text: text, 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_only_changed_blocks_are_indexed_again(
    name: str, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_store, "RESTED_NS", -1)
    change, most = CHANGES[name]
    path = rows_file(experiment)
    before = build_index(experiment, ALONE)
    kept, status = blocks(experiment), path.stat()
    text = change(path.read_text())
    path.write_text(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # nobody goes by the time of modification
    after = build_index(experiment, ALONE)
    assert after.rows == len([line for line in text.splitlines() if line])
    assert after.built_blocks <= most and (after.built_blocks > 0) == (most > 0)
    assert blocks(experiment).items() >= kept.items()
    fresh = replace(experiment, output=f"{experiment.output}-fresh")
    build_index(fresh, ALONE)
    assert blocks(fresh).items() <= blocks(experiment).items() and before.rows == NUM_ROWS


def test_an_interrupted_build_goes_on_and_equals_one_go(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(experiment, output=f"{experiment.output}-whole")
    built = build_index(whole, ALONE).built_blocks
    index_rows, calls = BlockIndexer.index_rows, []

    def interrupted(self: BlockIndexer, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        index_rows(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockIndexer, "index_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_index(experiment, ALONE)
    assert len(blocks(experiment)) == 3
    assert build_index(experiment, ALONE).built_blocks == built - 3 == len(calls) - 4
    assert blocks(experiment) == blocks(whole)


SCRIPT = """
import sys
from pathlib import Path
from sicog_mcore.data.index import row_blocks
from sicog_mcore.data.index.build_index import IndexOptions, build_index
from tests.builders import tiny_experiment
row_blocks.BLOCK_ROWS, row_blocks.ENDS_ONE_IN = 16, 8
if __name__ == "__main__":
    build_index(tiny_experiment(Path(sys.argv[1])), IndexOptions(processes=2), lambda p: print(p.rows, flush=True))
"""


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_build_goes_on_equals_one_go_and_leaves_no_process(experiment: Experiment, tmp_path: Path) -> None:
    path = rows_file(experiment)
    path.write_text("".join(text_row(i) + "\n" for i in range(40_000)))
    (tmp_path / "build.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "build.py"), str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 1000:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _group(process.pid) == []
    done = len([name for name in blocks(experiment) if name.endswith(".arrow")])
    assert done > 0
    rest = build_index(experiment, ALONE)
    assert 0 < rest.built_blocks <= rest.blocks - done + 2 and rest.rows == 40_000
    whole = replace(experiment, output=f"{experiment.output}-whole")
    build_index(whole, ALONE)
    found = {name: data for name, data in blocks(experiment).items() if name.endswith(".arrow")}
    assert found == blocks(whole)


def _group(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
def test_processes_build_what_one_builds(experiment: Experiment) -> None:
    told: list[IndexProgress] = []
    report = build_index(experiment, IndexOptions(processes=2), told.append)
    whole = replace(experiment, output=f"{experiment.output}-whole")
    assert build_index(whole, ALONE).blocks == report.built_blocks
    assert blocks(experiment) == blocks(whole)
    assert told[-1].rows == NUM_ROWS and told[-1].done_bytes == told[-1].total_bytes
    assert str(told[-1]).startswith("indexing: 100%, 300 rows, ")


def test_what_would_take_too_long_is_refused_with_the_command(experiment: Experiment) -> None:
    experiment = replace(experiment, output=f"{experiment.output} of today")
    with pytest.raises(ConfigError) as caught:
        build_index(experiment, IndexOptions(processes=1, limit_s=1e-6))
    config = IndexStore(experiment).folder / "experiment.yaml"
    assert f"sicog index --config '{config}'" in str(caught.value) and caught.value.exit_code == EXIT_CONFIG
    assert json.loads(config.read_text()) == json.loads(json.dumps(experiment.to_dict()))
    assert blocks(experiment) == {}
    assert build_index(experiment, IndexOptions(processes=1, limit_s=1000.0)).built_rows == NUM_ROWS


def test_other_settings_have_an_index_of_their_own(experiment: Experiment) -> None:
    build_index(experiment, ALONE)
    slicing = replace(experiment.model.slicing, max_slices=3)
    others = [
        replace(experiment, data=replace(experiment.data, **change))  # type: ignore[arg-type]
        for change in ({"token_budget": 777}, {"system_prompt": "Be kind."}, {"too_long": "truncate"})
    ]
    others.append(replace(experiment, model=replace(experiment.model, slicing=slicing)))
    for other in others:
        assert build_index(other, ALONE).built_rows == NUM_ROWS
    same = replace(experiment, train=replace(experiment.train, steps=7), data=replace(experiment.data, workers=0))
    assert build_index(same, ALONE).built_rows == 0


def test_two_runs_share_an_index(experiment: Experiment, tmp_path: Path) -> None:
    data = replace(experiment.data, index=str(tmp_path / "shared"))
    report = build_index(replace(experiment, data=data), ALONE)
    assert report.folder.parent == tmp_path / "shared" and not Path(experiment.output).exists()
    other = replace(experiment, data=data, output=str(tmp_path / "other"))
    assert build_index(other, ALONE).built_rows == 0 and len(open_index(other).files[0].sizes) == NUM_ROWS


def test_a_damaged_or_missing_block_is_built_again(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_store, "RESTED_NS", -1)
    build_index(experiment, ALONE)
    good = blocks(experiment)
    folder = IndexStore(experiment).folder / "blocks"
    first, second, third = sorted(good)[:3]
    (folder / first).write_bytes(good[first][:-100])
    (folder / second).write_bytes(b"")
    (folder / third).unlink()
    assert build_index(experiment, ALONE).built_blocks == 3
    assert blocks(experiment) == good


def test_a_block_with_one_wrong_bit_is_found_and_built_again(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_store, "RESTED_NS", -1)
    build_index(experiment, ALONE)
    good = blocks(experiment)
    name = min(good)
    path = IndexStore(experiment).folder / "blocks" / name
    for place in range(0, len(good[name]), 1 + len(good[name]) // 50):
        damaged = bytearray(good[name])
        damaged[place] ^= 1 << place % 8
        path.unlink()  # a mapped file must keep its bytes
        path.write_bytes(damaged)
        with pytest.raises(BlockUnreadable, match="its hash is wrong"):
            len(BlockTable(str(path)))
    assert build_index(experiment, ALONE).built_blocks == 1
    assert blocks(experiment) == good


def test_a_note_with_one_wrong_digit_is_none(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_store, "RESTED_NS", -1)
    build_index(experiment, ALONE)
    store = IndexStore(experiment)
    (file,), _ = list_files(experiment.data.sources, new_survey(build_sample))
    assert store.known(file) is not None
    (note,) = (store.folder / "files").iterdir()
    good = note.read_bytes()
    digits = [place for place, byte in enumerate(good) if chr(byte).isdigit()]
    for place in digits[:: 1 + len(digits) // 40]:
        damaged = bytearray(good)
        damaged[place] ^= 1
        note.write_bytes(damaged)
        assert store.known(file) is None
    assert build_index(experiment, ALONE).built_blocks == 0 and note.read_bytes() != damaged


def test_an_image_that_was_missing_is_looked_for_again(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    shown = [json.dumps({"id": f"i{n}", "image": f"{n}.png", "conversations": turns}) for n in range(3)]
    text = rows_file(experiment).read_text().splitlines()
    rows_file(experiment).write_text("\n".join([shown[0], *text[:200], shown[1], *text[200:], shown[2]]))
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    for rested in (RESTED, -1):  # also where the file of rows is not read
        monkeypatch.setattr(index_store, "RESTED_NS", rested)
        build_index(experiment, ALONE)
        assert build_index(experiment, ALONE).built_blocks == 0
    reasons = [open_rows(experiment).rows.all.rejection(row, 0).reason for row in (0, 201, 302)]
    assert reasons == ["image_missing", "image_missing", "image_unidentified"]
    write_image(tmp_path / "images" / "1.png", 64, 64, seed=0)
    assert build_index(experiment, ALONE).built_blocks == 1
    sizes = open_rows(experiment).sizes
    assert [sizes.reasons[sizes.reason[row]] for row in (0, 201, 302)] == ["image_missing", "", "image_unidentified"]
    monkeypatch.setattr(image_recheck, "MOST_ROWS", 1)  # of two, the first stands for both
    write_image(tmp_path / "images" / "0.png", 64, 64, seed=0)
    assert build_index(experiment, ALONE).built_blocks == 2


def _shard(path: Path, answers: list[str], colour: int = 0) -> None:
    write_image(path.parent / "one.jpg", 64, 48, seed=colour)
    with tarfile.open(path, "w") as archive:
        for number, answer in enumerate(answers):
            turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
            row = json.dumps({"id": f"{path.stem}-{number}", "conversations": turns})
            for name, data in (
                (f"{number}.json", row.encode()),
                (f"{number}.jpg", (path.parent / "one.jpg").read_bytes()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def test_only_changed_shards_are_indexed_again(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in "abc":
        _shard(folder / f"{name}.tar", ["A square.", "A circle.", "A ring."])
    experiment = tiny_experiment(tmp_path, data={"sources": (SourceConfig(path=str(folder)),)})
    assert build_index(experiment, ALONE).built_blocks == 3
    os.utime(folder / "a.tar")  # its status is another one, its bytes are not
    _shard(folder / "b.tar", ["A square.", "A cirkle.", "A ring."])  # as long as before
    again = build_index(experiment, ALONE)
    assert (again.built_blocks, again.built_rows, again.blocks, again.rows) == (1, 3, 3, 9)
    (folder / "c.tar").rename(folder / "d.tar")
    assert build_index(experiment, ALONE).built_rows == 0  # found by content


def test_files_that_cannot_be_opened_are_told_together(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"id": 1}, {"id"')
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    sources = [
        SourceConfig(path=str(tmp_path / name), images=str(tmp_path)) for name in ("list.json", "bad.tar", "none")
    ]
    data = replace(experiment.data, sources=(*experiment.data.sources, *sources))
    with pytest.raises(ConfigError) as caught:
        build_index(replace(experiment, data=data), ALONE)
    assert {problem.path for problem in caught.value.problems} >= {"data.sources[1].path", "data.sources[3].path"}
    data = replace(experiment.data, sources=(*experiment.data.sources, sources[1]))
    with pytest.raises(ConfigError, match="is no tar archive"):
        build_index(replace(experiment, data=data), ALONE)


def test_a_file_that_changes_while_it_is_indexed_is_refused(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, index_rows = rows_file(experiment), BlockIndexer.index_rows

    def changing(self: BlockIndexer, *arguments: object) -> None:
        path.write_text(change_one(path.read_text()))
        index_rows(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockIndexer, "index_rows", changing)
    with pytest.raises(ConfigError, match="was changed while it was indexed"):
        build_index(experiment, ALONE)


def test_progress_says_rate_share_and_time_left() -> None:
    assert str(IndexProgress(0, 0, 100, 10.0)) == "indexing: no block is finished yet"
    assert str(IndexProgress(500, 25, 100, 10.0)) == "indexing: 25%, 500 rows, 50 rows/s, 30 s left"
    assert (
        IndexReport(Path("i/d"), 1, 10, 2, 5, 1, 0.5)
        .lines()[0]
        .startswith("indexed 5 of 10 rows (1 of 2 blocks) in 0.5 s")
    )
