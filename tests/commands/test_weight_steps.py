"""Weights as library steps: what is written and listed comes back as values; rank 0 alone speaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sicog_mcore.commands.weight_options import ImportFlags, ImportOptions, InspectOptions, UnpickleOptions
from sicog_mcore.commands.weight_parity import TOLERANCES, WeightComparison
from sicog_mcore.commands.weight_steps import RankVoice, WrittenWeights, import_weights, list_weights, unpickle
from sicog_mcore.errors import CheckpointError
from sicog_mcore.parallel.topology import stop_topology
from tests.builders import TOKENIZER

TINY = ("--preset", "tiny", "--data.tokenizer", TOKENIZER)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    stop_topology()


def test_a_checkpoint_is_written_and_its_parameters_are_those_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voice = RankVoice()
    planned = import_weights(ImportOptions(flags=ImportFlags(dry_run=True), experiment=TINY), voice)
    assert planned == WrittenWeights(None) and not planned.differs
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [f"{part}: drawn at random" for part in ("tower", "resampler", "decoder")]
    stop_topology()
    flags = ImportFlags(out=tmp_path / "start")
    assert import_weights(ImportOptions(flags=flags, experiment=TINY), voice) == WrittenWeights(tmp_path / "start")
    stop_topology()
    found = list_weights(InspectOptions(path=tmp_path / "start"), voice)
    assert found.title.endswith("a checkpoint of this project, preset tiny") and not found.problems
    counts = {part: f"{part}: {count:,} parameters" for part, count in found.parameters().items()}
    assert set(counts) == {"tower", "resampler", "decoder"} and set(counts.values()) <= set(told)


def test_nothing_to_write_to_is_refused_before_a_model_is_built() -> None:
    with pytest.raises(CheckpointError, match="nothing to write to; give --out FOLDER, or --dry-run"):
        import_weights(ImportOptions(experiment=TINY), RankVoice())


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    voice = RankVoice()
    voice.say("a", "\x1b[31m")
    voice.is_main = False
    voice.say("b")
    voice.count({"tower": 3})
    assert capsys.readouterr().out == "a\n\\x1b[31m\n"


def test_tensors_alone_are_unpickled(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "p.bin")
    options = UnpickleOptions(path=tmp_path / "p.bin", out=tmp_path / "p.safetensors")
    assert unpickle(options) == 2 and options.out.is_file()
    with pytest.raises(CheckpointError, match="exists already"):
        unpickle(options)
    torch.save({"a": [1]}, tmp_path / "q.bin")
    with pytest.raises(CheckpointError, match="cannot be read as tensors by name alone"):
        unpickle(UnpickleOptions(path=tmp_path / "q.bin", out=tmp_path / "q.safetensors"))
    assert not (tmp_path / "q.safetensors").exists()


@pytest.mark.parametrize(("relative", "word"), [(1e-6, "verified"), (1.0, "DIFFERS"), (float("nan"), "DIFFERS")])
def test_a_comparison_judges_by_its_dtype(relative: float, word: str) -> None:
    comparison = WeightComparison("tower", Path("clip"), 0.25, relative, torch.float32)
    numbers, verdict = comparison.lines()
    assert numbers.startswith("tower: features of clip in torch.float32: largest difference 0.25 (")
    assert verdict.startswith(f"tower: {word}")
    assert comparison.is_good == (word == "verified") == (not WrittenWeights(None, (comparison,)).differs)
    assert TOLERANCES[torch.float32] < TOLERANCES[torch.bfloat16]
