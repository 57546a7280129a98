"""Writes the turns of a conversation as token ids, with a flag on every token that the model must learn.

In: turns of a Sample   Out: ChatTokens   Next: encode.py
A template is a row of strings, not code. Control tokens come from templates only: the same strings inside data are
ordinary text, so no data set can open or close a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sicog_mcore.data.sample import IMAGE_PLACEHOLDER, Role, Turn
from sicog_mcore.data.tokenizer import CONTROL_TOKEN, Tokenizer, load_tokenizer

IMAGE_MARKER = -1
# Newline and comma of Llama-2, which released SICOG weights use with any tokenizer.
LEGACY_NEWLINE, LEGACY_COMMA = 13, 29892


@dataclass(frozen=True)
class Template:
    """A template of turns. ``<|name|>`` stands for a control token; ``{role}`` for the name of the role.

    Attributes:
        begin: before the first turn.
        header: before the text of a turn.
        prompt_end: after a system or user turn.
        answer_end: after an assistant turn; supervised, so that the model learns to stop.
        after_answer: between an answer and the next turn; not supervised.
        padding: control token that fills what no sample uses.
    """

    begin: str
    header: str
    prompt_end: str
    answer_end: str
    after_answer: str
    padding: str

    @property
    def names_roles(self) -> bool:
        return "{role}" in self.header

    @property
    def controls(self) -> tuple[str, ...]:
        """Control tokens that the tokenizer must have."""
        text = self.begin + self.header + self.prompt_end + self.answer_end + self.after_answer + self.padding
        return tuple(dict.fromkeys(CONTROL_TOKEN.findall(text)))


TEMPLATES: Mapping[str, Template] = {
    "chatml": Template(
        begin="",
        header="<|im_start|>{role}\n",
        prompt_end="<|im_end|>\n",
        answer_end="<|im_end|>",
        after_answer="\n",
        padding="<|endoftext|>",
    ),
    "llama3": Template(
        begin="<|begin_of_text|>",
        header="<|start_header_id|>{role}<|end_header_id|>\n\n",
        prompt_end="<|eot_id|>",
        answer_end="<|eot_id|>",
        after_answer="",
        padding="<|eot_id|>",
    ),
    "plain": Template(
        begin="",
        header="",
        prompt_end="\n",
        answer_end="<|endoftext|>",
        after_answer="",
        padding="<|endoftext|>",
    ),
}


@dataclass(frozen=True)
class Separators:
    """Token ids that stand between visual tokens: after a line of slices, and before the overview."""

    newline: int
    comma: int


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as numbers.

    Attributes:
        ids: token ids; IMAGE_MARKER where an image belongs.
        supervised: for each id, whether the model must predict it.
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


def find_separators(tokenizer: Tokenizer, kind: Literal["real", "legacy"]) -> Separators:
    """Ids of newline and comma, see ``SlicingConfig.separators``.

    Raises:
        ValueError: the tokenizer needs more than one token for one of them.
    """
    if kind == "legacy":
        return Separators(LEGACY_NEWLINE, LEGACY_COMMA)
    encoded = {text: tokenizer.encode(text) for text in ("\n", ",")}
    for text, ids in encoded.items():
        if len(ids) != 1:
            raise ValueError(f"the tokenizer writes {text!r} as {len(ids)} tokens, expected one; use separators legacy")
    return Separators(encoded["\n"][0], encoded[","][0])


class Chat:
    """Writes conversations in one template with one tokenizer.

    Args:
        tokenizer_path: see ``load_tokenizer``.
        template: key of TEMPLATES.
        system_prompt: system turn of conversations that bring none; empty, or a template without roles: no such turn.
    """

    def __init__(self, tokenizer_path: str, template: str, system_prompt: str) -> None:
        self._names = (tokenizer_path, template)
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.template = TEMPLATES[template]
        has_default = bool(system_prompt) and self.template.names_roles
        self._default_system: tuple[Turn, ...] = (Turn("system", system_prompt),) if has_default else ()
        self._constant_ids: dict[str, list[int]] = {}  # of a handful of texts, which stand in every conversation
        self.pad_id = self._control_id(self.template.padding)
        self.end_id = self._control_id(self.template.answer_end)

    def tokenize(self, turns: Iterable[Turn]) -> ChatTokens:
        """A whole conversation; only the assistant's text and the token that ends it are supervised."""
        return _join(self._write(tuple(turns)))

    def open_prompt(self, turns: Iterable[Turn]) -> ChatTokens:
        """A conversation up to where the assistant speaks next: what generation starts from."""
        header = self._text_ids(self.template.header.format(role="assistant"))
        return _join([*self._write(tuple(turns)), (header, False)])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, control tokens left out."""
        return self.tokenizer.decode(ids)

    def _write(self, turns: tuple[Turn, ...]) -> list[tuple[list[int], bool]]:
        """Runs of ids, each supervised or not as a whole."""
        if not turns or turns[0].role != "system":
            turns = self._default_system + turns
        # Every run is encoded by itself. So no token reaches across the border of template and text, and the mask needs
        # one flag a run.
        runs = [(self._text_ids(self.template.begin), False)]
        for turn in turns:
            # Generation starts behind the header (``open_prompt``), so the model never has to write one.
            runs.append((self._text_ids(self.template.header.format(role=turn.role)), False))
            if turn.role == "assistant":
                # The token that ends the answer is learnt with it: it is how a model stops. The template's text behind
                # it is not, for generation has ended there.
                runs.append((self.tokenizer.encode(turn.text) + [self.end_id], True))
                runs.append((self._text_ids(self.template.after_answer), False))
            else:
                runs.append((self._content_ids(turn.role, turn.text), False))
                runs.append((self._text_ids(self.template.prompt_end), False))
        return runs

    def _content_ids(self, role: Role, text: str) -> list[int]:
        """Text of a turn the model does not learn; in user turns ``<image>`` becomes a marker."""
        if role != "user":
            is_default = any(text == turn.text for turn in self._default_system)
            return self._default_system_ids() if is_default else self.tokenizer.encode(text)
        # One marker between two parts; encode.py puts the visual tokens of the next image in its place.
        first, *others = (self.tokenizer.encode(part) for part in text.split(IMAGE_PLACEHOLDER))
        return first + [token for part in others for token in (IMAGE_MARKER, *part)]

    def _default_system_ids(self) -> list[int]:
        """Of the system turn that most conversations are given; it is text, in which no control token is read."""
        key = f"\0{self._default_system[0].text}"  # no text of a template begins so
        if key not in self._constant_ids:
            self._constant_ids[key] = self.tokenizer.encode(self._default_system[0].text)
        return self._constant_ids[key]

    def _text_ids(self, template_text: str) -> list[int]:
        """Template text: control tokens by id, the rest as text."""
        if template_text not in self._constant_ids:
            self._constant_ids[template_text] = self._encode_template(template_text)
        return self._constant_ids[template_text]

    def _encode_template(self, template_text: str) -> list[int]:
        ids: list[int] = []
        # The pattern is a group, so split keeps the control tokens among the parts.
        for part in CONTROL_TOKEN.split(template_text):
            ids += [self._control_id(part)] if CONTROL_TOKEN.fullmatch(part) else self.tokenizer.encode(part)
        return ids

    def _control_id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            path, template = self._names
            raise ValueError(f"{path} has no token {token}, which the {template} template needs; change data.template")
        return found


def _join(runs: list[tuple[list[int], bool]]) -> ChatTokens:
    ids: list[int] = []
    supervised: list[bool] = []
    for run, is_supervised in runs:
        ids += run
        supervised += [is_supervised] * len(run)
    return ChatTokens(tuple(ids), tuple(supervised))
