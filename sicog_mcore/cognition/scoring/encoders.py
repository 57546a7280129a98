"""Encoders: models that turn a batch of texts into vectors, and the settings of pooling a decoder.

In: a folder on disk   Out: TextEncoder   Next: embed.py (pieces, batches, unit norm)
Everything is read from the folder, nothing downloaded, and no code in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, get_type_hints

import numpy as np

from sicog_mcore.errors import ConfigError, ConfigProblem

if TYPE_CHECKING:
    import torch

AUTO = "auto"  # a GPU where there is one


class TextEncoder(Protocol):
    """A model that is in memory."""

    limit: int  # tokens of a piece, special ones not counted

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Where each token starts and ends in the text."""
        ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """One batch as float32 [n, d]."""
        ...


@dataclass(frozen=True)
class Pooling:
    """The settings by which a decoder's hidden states become one vector.

    Attributes:
        append_eos: end each text with the tokenizer's end-of-sequence token.
        max_tokens: longest input, special tokens counted; longer texts are embedded in pieces.
        pooling: mean over all tokens, or the last one.
        precision: of weights and arithmetic; pooling is always fp32.
    """

    append_eos: bool = True
    max_tokens: int = 1024
    pooling: Literal["mean", "last"] = "mean"
    precision: Literal["fp32", "bf16"] = "fp32"


class SentenceEncoder:
    """A folder of sentence-transformers."""

    def __init__(self, folder: Path, device: str):
        from sentence_transformers import SentenceTransformer

        with _loading(folder):
            self._model = SentenceTransformer(str(folder), device=find_device(device), local_files_only=True).eval()
        self._tokenizer = self._model.tokenizer
        # Special tokens are added to every piece, so they are taken from its room.
        longest = self._model.max_seq_length or self._tokenizer.model_max_length
        self.limit = longest - self._tokenizer.num_special_tokens_to_add()

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Where each token starts and ends in the text."""
        return token_offsets(self._tokenizer, text)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """One batch as float32 [n, d]."""
        vectors = self._model.encode(list(texts), batch_size=len(texts), show_progress_bar=False)
        return np.asarray(vectors, np.float32)


class DecoderEncoder:
    """The hidden states of any decoder that transformers knows, padded at the right and pooled; tokens by tokenizer.json."""

    def __init__(self, folder: Path, settings: Pooling, device: str):
        import torch
        from transformers import AutoModel, PreTrainedTokenizerFast

        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self._device = find_device(device)
        with _loading(folder):
            # Not AutoTokenizer: it takes a model's usual tokenizer for the folder's, whatever tokenizer.json says.
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype).to(self._device).eval()
        self._settings = settings
        if settings.append_eos and self._tokenizer.eos_token_id is None:
            raise ConfigError([_problem(folder.name, "its tokenizer has no EOS token", "set append_eos to false")])
        self.limit = settings.max_tokens - self._tokenizer.num_special_tokens_to_add() - settings.append_eos
        if self.limit < 1:
            raise ConfigError([_problem("max_tokens", "special tokens leave no room for text", "raise it")])

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Where each token starts and ends in the text."""
        return token_offsets(self._tokenizer, text)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """One batch as float32 [n, d]."""
        import torch

        end = [self._tokenizer.eos_token_id] if self._settings.append_eos else []
        # Cut once more: a piece that was cut out of a text may have a token more by itself than it had there.
        rows = [row[: self._settings.max_tokens - len(end)] + end for row in self._tokenizer(list(texts))["input_ids"]]
        longest = max(1, max(map(len, rows)))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self._device)  # [n, s]
        lengths = torch.tensor([[len(row)] for row in rows], device=self._device)  # [n, 1]
        mask = (torch.arange(longest, device=self._device) < lengths).long()  # [n, s]
        seen = mask.clone()
        seen[:, 0] = 1  # a row without any token must not become NaN; pooling leaves it out
        with torch.inference_mode():
            states = self._model(input_ids=tokens, attention_mask=seen).last_hidden_state.float()  # [n, s, h]
            return pool(states, mask, self._settings.pooling).cpu().numpy()


def pool(states: torch.Tensor, mask: torch.Tensor, how: Literal["mean", "last"]) -> torch.Tensor:
    """One vector per row from right-padded states; zero for a row without tokens.

    Args:
        states: [n, s, h] float32.
        mask: [n, s], 1 for tokens and 0 for padding.
    """
    counts = mask.sum(1, keepdim=True)  # [n, 1]
    # Padding is multiplied by zero; a row without tokens is divided by one and stays zero.
    if how == "mean":
        return (states * mask[..., None]).sum(1) / counts.clamp(min=1)
    last = (counts - 1).clamp(min=0)[..., None].expand(-1, 1, states.shape[2])  # [n, 1, h]
    return states.gather(1, last)[:, 0] * (counts > 0)


def read_pooling(path: Path) -> Pooling:
    """Settings from a JSON object; what it does not name keeps its default.

    Raises:
        ConfigError: no JSON object, or a setting that is unknown or of a wrong type; all are named.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError([_problem(str(path), str(error), "give a JSON file")]) from error
    if not isinstance(found, dict):
        raise ConfigError([_problem(str(path), "expected an object", "write {} for the defaults", found)])
    types = get_type_hints(Pooling)
    known = {field.name for field in fields(Pooling)}
    named = f"expected one of {', '.join(sorted(known))}"
    problems = [_problem(name, named, "correct the name", found[name]) for name in found.keys() - known]
    wrong = [name for name in found.keys() & known if not _fits(found[name], types[name])]
    problems += [_problem(name, f"expected {types[name]}", "correct the value", found[name]) for name in wrong]
    if problems:
        raise ConfigError(problems)
    return Pooling(**found)


def token_offsets(tokenizer: Any, text: str) -> Sequence[tuple[int, int]]:
    """Where each token of a Hugging Face tokenizer starts and ends, special ones left out."""
    return tokenizer(text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]


def find_device(device: str) -> str:
    """The device itself, or what "auto" stands for."""
    import torch

    if device != AUTO:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError([_problem("scorer", f"it cannot be loaded: {error}", "repair it", str(folder))]) from error


def _fits(value: object, kind: Any) -> bool:
    if get_args(kind):
        return value in get_args(kind)
    return type(value) is kind and (kind is not int or int(str(value)) > 0)


def _problem(path: str, problem: str, fix: str, value: object = "") -> ConfigProblem:
    return ConfigProblem(path, value, problem, fix)
