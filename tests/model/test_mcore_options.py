"""Fields of Megatron's own configuration: what may be set, and why anything else is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from sicog_mcore.cli import known_fields
from sicog_mcore.errors import ConfigError
from sicog_mcore.model.decoder import decoder_transformer_config
from sicog_mcore.model.mcore_options import ELSEWHERE, OPTIONS, REASONS, option_problems
from sicog_mcore.presets import PRESETS

KNOWN = {field.name for field in fields(TransformerConfig)}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_reaches_megatron(name: str) -> None:
    tiny = PRESETS["tiny"]()
    for value in (True, False):
        decoder = type(tiny.model.decoder)(**{**vars(tiny.model.decoder), "mcore": {name: value}})
        with_te = name == "apply_rope_fusion"
        if with_te and value:
            continue  # Megatron looks for the kernel itself
        config = decoder_transformer_config(decoder, tiny.parallel, tiny.train, on_gpu=False, with_te=with_te)
        assert vars(config)[name] is value


@pytest.mark.parametrize("name", sorted(KNOWN - set(OPTIONS)))
def test_every_other_field_of_megatron_is_refused(name: str) -> None:
    (problem,) = option_problems({name: 1}, with_te=True)
    assert problem.path == f"model.decoder.mcore.{name}"
    assert (ELSEWHERE.get(name, "remove it")) in problem.fix


def test_tables_name_fields_that_exist() -> None:
    assert set(OPTIONS) | set(REASONS) | set(ELSEWHERE) <= KNOWN
    assert set(ELSEWHERE.values()) <= set(known_fields())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fp32_residual_connection": True}, "dtype of its weights"),
        ({"hidden_size": 64}, "set model.decoder.hidden instead"),
        ({"recompute_granularity": "selective"}, "set train.recompute_decoder instead"),
        ({"init_method_std": 0.01}, "model/initialise.py"),
        ({"deallocate_pipeline_output": True}, "did you mean deallocate_pipeline_outputs"),
        ({"deallocate_pipeline_outputs": 1}, "neither true nor false"),
        ({"apply_rope_fusion": True}, "needs Transformer Engine"),
    ],
)
def test_what_is_refused_says_why(options: dict[str, bool | int | float | str], words: str) -> None:
    tiny = PRESETS["tiny"]()
    decoder = type(tiny.model.decoder)(**{**vars(tiny.model.decoder), "mcore": options})
    with pytest.raises(ConfigError, match=words):
        decoder_transformer_config(decoder, tiny.parallel, tiny.train, on_gpu=False, with_te=False)


def test_outputs_are_not_freed_while_the_interleaved_schedule_sends_them() -> None:
    options = {"deallocate_pipeline_outputs": True}
    (problem,) = option_problems(options, with_te=False, interleaved=True)
    assert "still sending" in problem.problem and "virtual_pipeline=1" in problem.fix
    assert option_problems(options, with_te=False) == []
    assert option_problems({"deallocate_pipeline_outputs": False}, with_te=False, interleaved=True) == []
