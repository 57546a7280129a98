"""Candidates (candidates.py): the same bytes from any number of ranks, any layout, any batch, and after any kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from sicog_mcore.cognition.generation.options import GenerationOptions
from sicog_mcore.cognition.records import Generation, read_records
from sicog_mcore.commands.parser import read_options
from sicog_mcore.config import Experiment
from tests.answering import arguments, write_checkpoint, write_items
from tests.builders import tiny_experiment
from tests.dist import Rank, run_ranks
from tests.e2e.runs import PATIENCE_S, REPOSITORY, kill_after, start_launcher

pytestmark = pytest.mark.slow
LAUNCHER = str(REPOSITORY / "launch" / "generate.py")
ITEMS = 10
KILLS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_items(folder, ITEMS)
    # Written by two pipeline stages: generation has none, and loads it all the same.
    run_ranks(_write, 2, tiny_experiment(folder, parallel={"pipeline": 2}), folder / "model")
    return folder


def _write(rank: Rank, experiment: Experiment, folder: Path) -> None:
    write_checkpoint(experiment, folder, rank.start(experiment.parallel))


def _generate(rank: Rank, words: list[list[str]]) -> None:
    """Several runs after each other on the same ranks."""
    from sicog_mcore.cognition.generation.generate import run

    for number, each in enumerate(words):
        options = read_options(GenerationOptions, each)
        run(options, rank.world_size, rank.rank, f"{rank.init_method}-{number}")


@pytest.fixture(scope="module")
def expected(folder: Path) -> bytes:
    """The records of one rank, one item at a time."""
    outs = {batch: folder / f"batch{batch}" for batch in (1, 4, 20)}
    run_ranks(_generate, 1, [arguments(folder, out, "--batch", str(batch)) for batch, out in outs.items()])
    written = [(out / "generations.jsonl").read_bytes() for out in outs.values()]
    assert written[0] == written[1] == written[2]
    return written[0]


def test_every_item_has_its_row_in_order_and_a_bad_image_its_reason(folder: Path, expected: bytes) -> None:
    records = list(read_records(folder / "batch1" / "generations.jsonl", Generation))
    assert [record.id for record in records] == [f"i{i}" for i in range(ITEMS)]
    failures = {2: "no_image", 3: "image_unidentified", 9: "no_image"}
    assert [record.failure for record in records] == [failures.get(i, "") for i in range(ITEMS)]
    for record in records:
        names = [(candidate.prompt, candidate.index) for candidate in record.candidates]
        assert names == ([] if record.failure else [("cod", 0), ("cod", 1), ("caption", 0)])
        assert len(record.prompt_tokens) == (0 if record.failure else 2)
    texts = {candidate.text for record in records for candidate in record.candidates}
    assert len(texts) > 20


@pytest.mark.parametrize(("ranks", "layouts"), [(2, (1, 2)), (4, (2,))])
def test_ranks_and_layouts_change_no_byte(folder: Path, expected: bytes, ranks: int, layouts: tuple[int, ...]) -> None:
    outs = {tensor: folder / f"ranks{ranks}tensor{tensor}" for tensor in layouts}
    run_ranks(
        _generate,
        ranks,
        [arguments(folder, out, "--batch", "3", "--tensor", str(tensor)) for tensor, out in outs.items()],
    )
    for out in outs.values():
        assert (out / "generations.jsonl").read_bytes() == expected
        assert len(list((out / "parts").glob("*.jsonl"))) == ranks // int(out.name[-1])


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(folder: Path, expected: bytes) -> None:
    out = folder / "killed"
    words = arguments(folder, out, "--batch", "1")
    for kill in range(KILLS):
        kill_after(start_launcher(words, ranks=0, launcher=LAUNCHER), out / "parts" / "00000.jsonl", 2 * (kill + 1))
        assert not (out / "generations.jsonl").exists()
    before = (out / "parts" / "00000.jsonl").read_bytes()
    assert before.count(b"\n") < ITEMS
    with (out / "parts" / "00000.jsonl").open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"id":"i9","task":"capt')
    last = start_launcher(words, ranks=0, launcher=LAUNCHER)
    text, _ = last.communicate(timeout=PATIENCE_S)
    assert last.returncode == 0, text
    assert f"{before.count(10)} of them done before" in text
    assert (out / "generations.jsonl").read_bytes() == expected
    assert (out / "parts" / "00000.jsonl").read_bytes().startswith(before)
