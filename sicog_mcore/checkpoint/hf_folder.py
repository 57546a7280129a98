"""Writes all files of an exported folder but the weights, so that transformers can build, feed and ask the model.

In: Experiment   Out: config.json, generation_config.json, tokenizer, chat template, processor configs, modelling code
The weights come from export.py, into the same folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from sicog_mcore.checkpoint.hf_config import MODEL_TYPE, decoder_config, tower_config
from sicog_mcore.config import DataConfig, Experiment, ModelConfig
from sicog_mcore.data.chat import Chat, Template, find_separators
from sicog_mcore.data.tokenizer import HF_FILE

AUTO_MAP: Mapping[str, str] = {
    "AutoConfig": "configuration_sicog.SicogConfig",
    "AutoModelForImageTextToText": "modeling_sicog.SicogForConditionalGeneration",
    "AutoImageProcessor": "image_processing_sicog.SicogImageProcessor",
    "AutoProcessor": "processing_sicog.SicogProcessor",
}
PIECES = ("begin", "header", "prompt_end", "answer_end", "after_answer")  # of a Template, that the processor writes
PROCESSORS: Mapping[str, str] = {"image_processor_type": "SicogImageProcessor", "processor_class": "SicogProcessor"}


def write_model_files(folder: Path, experiment: Experiment, dtype: str) -> None:
    """Writes the files beside the weights of the whole model, the code of ``sicog_mcore.hf`` included.

    Args:
        folder: an existing folder.
        experiment: the run that the weights come from.
        dtype: of the weights: "float32" or "bfloat16".
    """
    data, model = experiment.data, experiment.model
    chat = Chat(data.tokenizer, data.template, data.system_prompt)
    separators = find_separators(chat.tokenizer, model.slicing.separators)
    _write_json(folder / "config.json", model_config(model, dtype) | _special_ids(chat))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(model))
    processor = {
        "processor_class": PROCESSORS["processor_class"],
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        "template": {name: vars(chat.template)[name] for name in PIECES},
        "system_prompt": data.system_prompt if chat.template.names_roles else "",
        "newline_id": separators.newline,
        "comma_id": separators.comma,
    }
    _write_json(folder / "processor_config.json", processor)
    _write_tokenizer(folder, chat, data)
    with as_file(files("sicog_mcore") / "hf") as code:
        for file in sorted(code.glob("*_sicog.py")):
            shutil.copyfile(file, folder / file.name)


def write_decoder_files(folder: Path, experiment: Experiment, dtype: str) -> None:
    """Writes the files beside the weights of the decoder alone, which transformers knows without our code.

    Args:
        folder: an existing folder.
        experiment: the run that the weights come from.
        dtype: of the weights: "float32" or "bfloat16".
    """
    data = experiment.data
    chat = Chat(data.tokenizer, data.template, data.system_prompt)
    _write_json(folder / "config.json", decoder_config(experiment.model.decoder, dtype) | _special_ids(chat))
    _write_tokenizer(folder, chat, data)


def model_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns config.json of the whole model."""
    return {
        "architectures": ["SicogForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "auto_map": dict(AUTO_MAP),
        "torch_dtype": dtype,
        "vision_config": tower_config(model.tower, dtype),
        "vision_feature_layer": model.tower.feature_layer,
        "text_config": decoder_config(model.decoder, dtype),
        "tie_word_embeddings": model.decoder.tie_embeddings,
        "query_grid": model.resampler.query_grid,
        "resampler_heads": model.resampler.num_heads,
        "resampler_norm_eps": model.resampler.norm_eps,
    }


def _preprocessor_config(model: ModelConfig) -> dict[str, Any]:
    return {
        **PROCESSORS,
        "auto_map": {name: AUTO_MAP[name] for name in ("AutoImageProcessor", "AutoProcessor")},
        "patch_size": model.tower.patch_px,
        "resolution": model.slicing.resolution_px,
        "max_slices": model.slicing.max_slices,
        "overview_only": model.slicing.overview_only,
        "layout": model.slicing.layout,
        "query_grid": model.resampler.query_grid,
    }


def _special_ids(chat: Chat) -> dict[str, Any]:
    """Returns the ids at which generation stops: the end of an answer, and padding."""
    return {"eos_token_id": list(dict.fromkeys([chat.end_id, chat.pad_id])), "pad_token_id": chat.pad_id}


def _write_tokenizer(folder: Path, chat: Chat, data: DataConfig) -> None:
    """Writes tokenizer, chat template, and greedy generation as the default: nothing is sampled unless asked for."""
    _write_json(folder / "generation_config.json", {"do_sample": False, **_special_ids(chat)})
    chat.tokenizer.save(folder / HF_FILE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": chat.template.answer_end,
        "pad_token": chat.template.padding,
        "clean_up_tokenization_spaces": False,
        "model_max_length": data.token_budget,
    }
    _write_json(folder / "tokenizer_config.json", config)
    system_prompt = data.system_prompt if chat.template.names_roles else ""
    (folder / "chat_template.jinja").write_text(jinja_template(chat.template, system_prompt), encoding="utf-8")


def jinja_template(template: Template, system_prompt: str) -> str:
    """Writes a chat template in Jinja; an image in a list becomes ``<image>`` and a newline, as in training.

    Args:
        template: the pieces that turns are written with.
        system_prompt: system turn of conversations that bring none; empty for none.
    """
    # Every tag strips the whitespace around it: the rendered text must equal that of training to the character.
    before, _, after = template.header.partition("{role}") if template.names_roles else (template.header, "", "")

    def header(role: str) -> str:
        return f"{_quoted(before)} + {role} + {_quoted(after)}" if template.names_roles else _quoted(before)

    default = f"{header(_quoted('system'))} + {_quoted(system_prompt + template.prompt_end)}"
    lines = [
        f"{{{{- {_quoted(template.begin)} }}}}" if template.begin else "",
        f"{{%- if messages[0]['role'] != 'system' %}}{{{{- {default} }}}}{{%- endif %}}" if system_prompt else "",
        "{%- for message in messages %}",
        f"{{%- set role = message['role'] %}}{{{{- {header('role')} }}}}",
        "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}",
        "{%- for part in message['content'] %}",
        "{%- if part['type'] == 'image' %}{{- '<image>\\n' }}{%- else %}{{- part['text'] }}{%- endif %}",
        "{%- endfor %}{%- endif %}",
        f"{{%- if role == 'assistant' %}}{{{{- {_quoted(template.answer_end + template.after_answer)} }}}}",
        f"{{%- else %}}{{{{- {_quoted(template.prompt_end)} }}}}{{%- endif %}}",
        "{%- endfor %}",
        f"{{%- if add_generation_prompt %}}{{{{- {header(_quoted('assistant'))} }}}}{{%- endif %}}",
    ]
    return "\n".join(line for line in lines if line)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
