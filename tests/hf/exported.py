"""Exported folders with random weights, for tests of the model that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from sicog_mcore.checkpoint.hf_folder import write_decoder_files, write_model_files
from sicog_mcore.config import Experiment


def write_random_model(folder: Path, experiment: Experiment, seed: int = 0) -> None:
    """The folder of a whole model in fp32; no weight has a value that a mistake could leave as it is."""
    from sicog_mcore.hf import SicogConfig, SicogForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    write_model_files(folder, experiment, "float32")
    model = SicogForConditionalGeneration(SicogConfig.from_pretrained(folder))
    _save_random(folder, model, seed)


def write_random_decoder(folder: Path, experiment: Experiment, seed: int = 0) -> None:
    """The folder of a decoder alone in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_decoder_files(folder, experiment, "float32")
    _save_random(folder, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), seed)


def _save_random(folder: Path, model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():  # a tied table is listed once
        centre = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
        scale = 0.1 if parameter.dim() < 2 else 1.5 / parameter.shape[-1] ** 0.5
        weights[name] = centre * ("weight" in name) + scale * torch.randn(parameter.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
