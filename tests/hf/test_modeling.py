"""The exported model (modeling_sicog.py) against ours: the same logits, and the same greedy text, without our code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sicog_mcore.config import Experiment
from sicog_mcore.data.sample import Turn
from tests.builders import ASSETS, tiny_experiment, write_dataset
from tests.dist import Rank, run_ranks
from tests.greedy import greedy
from tests.hf.exported import write_random_decoder, write_random_model

pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")
pytestmark = pytest.mark.slow
LOGITS = 1e-5  # fp32, relative to the largest logit
SAMPLES, NEW_TOKENS = 6, 12
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "tied_qwen3": {"qk_norm": True, "qkv_bias": False, "tie_embeddings": True, "vocab_size": 1000},
    "llama3": {"qkv_bias": False, "rope_base": 500_000, "rope_scaling_factor": 8.0, "head_dim": 48},
}


def experiment_of(folder: Path, kind: str) -> Experiment:
    slicing = {"layout": "per_slice"} if kind == "llama3" else {}
    return tiny_experiment(
        folder,
        data={"template": "llama3" if kind == "llama3" else "chatml"},
        model={"decoder": {**KINDS[kind], "num_layers": 2}, "slicing": slicing},
    )


def _answer_with_ours(rank: Rank, cases: list[tuple[Experiment, str]]) -> list[list[tuple[np.ndarray, list[int]]]]:
    """For every folder and sample: logits of all positions of the prompt, and what greedy decoding adds."""
    from sicog_mcore.build import build_model, plan_build
    from sicog_mcore.checkpoint.weights import PARTS, import_part
    from sicog_mcore.data.encode import Encoder
    from sicog_mcore.data.sources import open_sources

    answers = []
    topology = rank.start(cases[0][0].parallel)
    for experiment, folder in cases:
        model = build_model(plan_build(experiment), topology)
        for part in PARTS:
            import_part(model.chunks, part, Path(folder), topology)
        encoder = Encoder(experiment.model, experiment.data)
        samples = open_sources(experiment.data.sources, experiment.data)
        with torch.no_grad():
            prompts = [encoder.encode_prompt(samples.read(i)) for i in range(SAMPLES)]
            answers.append(
                [greedy(model.chunks[0], experiment, encoder.chat, prompt, NEW_TOKENS) for prompt in prompts]
            )
    return answers


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Experiment], dict[str, Any]]:
    """A folder, its experiment, and what our model says, for every kind of decoder."""
    folder = tmp_path_factory.mktemp("hf")
    write_dataset(folder, SAMPLES)
    experiments = {kind: experiment_of(folder, kind) for kind in KINDS}
    for number, (kind, experiment) in enumerate(experiments.items()):
        write_random_model(folder / kind, experiment, seed=number)
    cases = [(experiment, str(folder / kind)) for kind, experiment in experiments.items()]
    (answers,) = run_ranks(_answer_with_ours, 1, cases)
    return {kind: folder / kind for kind in KINDS}, experiments, dict(zip(KINDS, answers, strict=True))


def prompts_of(experiment: Experiment, processor: Any) -> list[Any]:
    from sicog_mcore.data.sources import open_sources

    samples = open_sources(experiment.data.sources, experiment.data)
    inputs = []
    for sample in (samples.read(i) for i in range(SAMPLES)):
        messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns[:-1]]
        images = [Image.open(image.path) for image in sample.images]
        inputs.append(processor.apply_chat_template(messages, images=images, tokenize=True, add_generation_prompt=True))
    return inputs


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import sicog_mcore.hf  # noqa: F401  makes the Auto classes know the model

    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_and_greedy_text_equal_ours(exported: Any, kind: str) -> None:
    folders, experiments, answers = exported
    model, processor = load(folders[kind])
    for inputs, (logits, answer) in zip(prompts_of(experiments[kind], processor), answers[kind], strict=True):
        with torch.no_grad():
            found = model(**inputs).logits[0]
        assert found.shape == logits.shape
        assert np.abs(found.numpy() - logits).max() <= LOGITS * np.abs(logits).max()
        text = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        assert text.tolist() == answer


def test_generation_without_cache_in_batches_and_several_times_gives_the_same_text(exported: Any) -> None:
    folders, experiments, answers = exported
    model, processor = load(folders["qwen2"])
    inputs = prompts_of(experiments["qwen2"], processor)
    plain = model.generate(**inputs[1], max_new_tokens=4, use_cache=False)[0, inputs[1]["input_ids"].shape[1] :]
    assert plain.tolist() == answers["qwen2"][1][1][:4]
    beams = model.generate(**inputs[1], max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert beams.shape[0] == 2
    samples = [[Turn("user", "<image>\nWhat is it?")], [Turn("user", "Say something.")], [Turn("user", "<image>")]]
    messages = [[{"role": turn.role, "content": turn.text} for turn in turns] for turns in samples]
    images = [Image.new("RGB", (200, 90), "red"), Image.new("RGB", (60, 60), "blue")]
    batch = processor.apply_chat_template(messages, images=images, tokenize=True, add_generation_prompt=True)
    together = model.generate(**batch, max_new_tokens=NEW_TOKENS)[:, batch["input_ids"].shape[1] :]
    for row, message, image in zip(together, messages, ([images[0]], [], [images[1]]), strict=True):
        one = processor.apply_chat_template(message, images=image, tokenize=True, add_generation_prompt=True)
        alone = model.generate(**one, max_new_tokens=NEW_TOKENS)[0, one["input_ids"].shape[1] :].tolist()
        assert row.tolist()[: len(alone)] == alone


ALONE = """
import sys
sys.modules["sicog_mcore"] = None  # importing it fails
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True)
print("TEXT", model.generate(**inputs, max_new_tokens=8)[0].tolist())
print("FROM", type(model).__module__, type(processor.image_processor).__module__)
"""


def test_an_exported_folder_needs_no_code_of_ours(exported: Any, tmp_path: Path) -> None:
    folder = exported[0]["qwen2"]
    image = next(iter(sorted((folder.parent / "images").iterdir())))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-P", "-c", ALONE, str(folder), str(image)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    model, processor = load(folder)
    message = {"role": "user", "content": "<image>\nWhat is it?"}
    inputs = processor.apply_chat_template(
        [message], images=Image.open(image), tokenize=True, add_generation_prompt=True
    )
    assert f"TEXT {model.generate(**inputs, max_new_tokens=8)[0].tolist()}" in ran.stdout
    assert "FROM transformers_modules" in ran.stdout


def test_a_saved_and_reloaded_model_is_the_same(exported: Any, tmp_path: Path) -> None:
    model, processor = load(exported[0]["tied_qwen3"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    messages = [{"role": "user", "content": "Is it red?"}]
    first, second = (p.apply_chat_template(messages, tokenize=True)["input_ids"] for p in (processor, reader))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_decoder_alone_is_a_plain_model_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sicog_mcore.data.chat import Chat

    experiment = experiment_of(tmp_path, kind)
    write_random_decoder(tmp_path, experiment)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    names = {"qwen2": "Qwen2ForCausalLM", "tied_qwen3": "Qwen3ForCausalLM", "llama3": "LlamaForCausalLM"}
    assert type(model).__name__ == names[kind] and not report["missing_keys"] and not report["unexpected_keys"]
    assert model.get_input_embeddings().weight.shape[0] == experiment.model.decoder.vocab_size
    rope = model.config.rope_parameters
    expected_rope = ("llama3", 500_000, 8.0) if kind == "llama3" else ("default", 1_000_000, None)
    assert (rope["rope_type"], rope["rope_theta"], rope.get("factor")) == expected_rope
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = Chat(experiment.data.tokenizer, experiment.data.template, experiment.data.system_prompt)
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": "Is it red?"}], add_generation_prompt=True)
    assert encoded["input_ids"] == list(chat.open_prompt((Turn("user", "Is it red?"),)).ids)
    generation = model.generation_config
    assert (generation.do_sample, generation.pad_token_id) == (False, chat.pad_id)
    assert generation.eos_token_id == list(dict.fromkeys([chat.end_id, chat.pad_id]))
    assert (ASSETS / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
