"""Files beside a tokenizer are compared with the run, known to be irrelevant, or named; none of them stops a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sicog_mcore.config import DataConfig
from sicog_mcore.data.tokenizer_files import COMPARED, IRRELEVANT, MOST_NOTES, compare_tokenizers, tokenizer_notes
from tests.builders import TOKENIZER

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
QWEN2_INSTRUCT: dict[str, Any] = {
    "add_prefix_space": False,
    "added_tokens_decoder": {
        "0": {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "special": True},
        "1": {"content": "<|im_start|>", "lstrip": False, "normalized": False, "special": True},
        "2": {"content": "<|im_end|>", "lstrip": False, "normalized": False, "special": True},
    },
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": None,
    "chat_template": CHATML,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 131072,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def notes(folder: Path, template: str = "chatml", **files: Any) -> list[str]:
    """Lists the notes on the tokenizer of the tests with files beside it; ``__`` in a name stands for a dot."""
    (folder / "tokenizer.json").write_bytes(Path(TOKENIZER).read_bytes())
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return tokenizer_notes(replace(DataConfig(), tokenizer=str(folder), template=template))  # type: ignore[arg-type]


def test_files_that_agree_say_nothing(tmp_path: Path) -> None:
    assert notes(tmp_path) == []
    assert notes(tmp_path, tokenizer_config__json=QWEN2_INSTRUCT, chat_template__jinja=CHATML) == []
    same = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": [{"content": "<|im_start|>"}]}
    assert notes(tmp_path, special_tokens_map__json=same, added_tokens__json={"<|im_end|>": 2}) == []


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"model_max_length": 512}, "model_max_length is 512, data.token_budget 4096: samples may be longer"),
        ({"add_bos_token": True}, "add_bos_token is True: transformers would put a token in front"),
        ({"add_eos_token": True}, "add_eos_token is True: transformers would put a token behind"),
        ({"add_prefix_space": True}, "add_prefix_space is True: transformers would put a space"),
        ({"clean_up_tokenization_spaces": True}, "transformers would take spaces out of decoded text"),
        ({"do_lower_case": True}, "do_lower_case is True: transformers would change letters"),
        ({"sp_model_kwargs": {"enable_sampling": True, "alpha": 0.1}}, "would write the same text differently"),
        (
            {"eos_token": "<|endoftext|>"},
            "eos_token is '<|endoftext|>', data.template=chatml ends answers with",
        ),
        ({"chat_template": "[INST] {{ x }} [/INST]"}, "does not write <|im_end|>, <|im_start|>"),
        ({"chat_template": CHATML.replace("}}\n", "}}<|im_sep|>", 1)}, "writes <|im_sep|> as well"),
        ({"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}, "'<|im_end|>' is 7 there and 2 here"),
        ({"extra_special_tokens": {"image": "<|image|>"}}, "'<|image|>' is named there and None here"),
        (
            {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}},
            "auto_map names code of its own, which is never run",
        ),
        ({"glow\x1b[31m": 3}, "'glow\\x1b[31m' = 3 is unknown here and not used"),
    ],
)
def test_what_disagrees_or_is_unknown_is_one_line(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (note,) = notes(tmp_path, tokenizer_config__json={**QWEN2_INSTRUCT, **changes})
    assert expected in note and str(tmp_path) in note and "\n" not in note


def test_llama_3_agrees_with_its_template_and_not_with_chatml(tmp_path: Path) -> None:
    text = (
        "{{ bos_token }}<|start_header_id|>{{ r }}<|end_header_id|>\n\n{{ c }}<|eot_id|>{# <|python_tag|> <|eom_id|> #}"
    )
    config = {"chat_template": text, "eos_token": "<|eot_id|>", "model_input_names": ["input_ids"]}
    assert notes(tmp_path, "llama3", tokenizer_config__json=config) == []
    lines = notes(tmp_path, "chatml", tokenizer_config__json=config)
    assert len(lines) == 2 and "not data.template=chatml" in lines[0] and "eos_token is '<|eot_id|>'" in lines[1]


@pytest.mark.parametrize("name", ["tokenizer_config__json", "special_tokens_map__json", "added_tokens__json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_file_beside_is_said(name: str, content: str, tmp_path: Path) -> None:
    (note,) = notes(tmp_path, **{name: content})
    assert name.replace("__", ".") in note and "copy it again" in note


def test_a_second_tokenizer_beside_is_said_and_a_long_list_is_cut(tmp_path: Path) -> None:
    (note,) = notes(tmp_path, tokenizer__model="not read")
    (tmp_path / "tokenizer.model").unlink()
    assert "tokenizer.json is read, tokenizer.model beside it is not" in note
    lines = notes(tmp_path, tokenizer_config__json={f"x{i}": i for i in range(50)})
    assert len(lines) == MOST_NOTES + 1 and lines[-1].endswith("and 30 more lines on the tokenizer")


def test_the_tokenizer_of_a_decoder_is_compared_with_that_of_the_run(tmp_path: Path) -> None:
    assert compare_tokenizers(TOKENIZER, tmp_path) == []  # weights without a tokenizer
    content = json.loads(Path(TOKENIZER).read_text(encoding="utf-8"))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content, indent=1))
    assert compare_tokenizers(TOKENIZER, tmp_path) == compare_tokenizers("", tmp_path) == []
    vocabulary = content["model"]["vocab"]
    vocabulary["t"], vocabulary["w"] = vocabulary["w"], vocabulary["t"]
    file.write_text(json.dumps(content))
    (note,) = compare_tokenizers(TOKENIZER, tmp_path / "model.safetensors")
    assert "it is another one" in note and str(file) in note
    file.write_text("{")
    (note,) = compare_tokenizers(TOKENIZER, tmp_path)
    assert "cannot be compared" in note


def test_a_key_stands_in_one_list() -> None:
    listed = [key for keys in (COMPARED, *IRRELEVANT.values()) for key in keys]
    assert len(listed) == len(set(listed))


@pytest.mark.slow
def test_every_key_that_transformers_writes_is_known(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=TOKENIZER, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(tmp_path)
    data = replace(DataConfig(), tokenizer=str(tmp_path))
    assert [note for note in tokenizer_notes(data) if "unknown" in note] == []
