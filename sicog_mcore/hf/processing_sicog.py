"""Turns conversations and images into the inputs of the model.

In: text with ``<image>`` or messages, PIL images   Out: input_ids, attention_mask, visual_rows, patches, grids
Next: modeling_sicog.py
``apply_chat_template(..., tokenize=True)`` writes exactly the tokens of training: every piece of the template and of the
text is encoded on its own, and control tokens come from the template only. Calling the processor with a text that was
rendered before reads control tokens in it, as transformers does elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from .image_processing_sicog import COMMA, NEWLINE

IMAGE = "<image>"
IMAGE_MARKER = -1
NO_ROW = -1
CONTROL_TOKEN = re.compile(r"(<\|\w+\|>)")
Message = Mapping[str, Any]


class SicogProcessor(ProcessorMixin):
    """Joins image processor and tokenizer.

    Args:
        image_processor: SicogImageProcessor.
        tokenizer: of the decoder.
        template: pieces of the chat template: begin, header (with ``{role}``), prompt_end, answer_end, after_answer.
        system_prompt: system turn of conversations that bring none; empty for none.
        newline_id: token between lines of slices.
        comma_id: token between slices, and before the overview.
        chat_template: the same template in Jinja, for those who want text.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        template: dict[str, str] | None = None,
        system_prompt: str = "",
        newline_id: int = 0,
        comma_id: int = 0,
        chat_template: str | None = None,
    ):
        self.template, self.system_prompt = template or {}, system_prompt
        self.newline_id, self.comma_id = newline_id, comma_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """Names the inputs that the forward pass of the model takes."""
        return ["input_ids", "attention_mask", "visual_rows", "patches", "grids"]

    def __call__(
        self,
        images: Image.Image | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        padding_side: str = "left",
        **_: Any,
    ) -> BatchFeature:
        """Encodes rendered texts, with one ``<image>`` for each image, and all their images in order.

        Raises:
            ValueError: another number of images than of ``<image>``.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        rows = [self._read(rendered) for rendered in texts]
        return self._batch(rows, list(_flat(images)), padding_side)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        images: Image.Image | Sequence[Any] | None = None,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> Any:
        """Turns messages into text, or with ``tokenize`` into the inputs of the model.

        Args:
            conversation: messages with role and content, or a list of such lists. Content is text with ``<image>``, or a
                list of ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": ...}``.
            add_generation_prompt: open the turn of the assistant.
            tokenize: return a BatchFeature.
            images: of ``<image>`` in texts, in order.
            padding_side: of batches.
            kwargs: for the Jinja template; with ``tokenize`` they have no effect, and what comes back is always tensors.

        Raises:
            ValueError: another number of images than of ``<image>``.
        """
        is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        batch: Any = conversation if is_batch else [conversation]
        conversations: list[list[Message]] = [list(messages) for messages in batch]
        if not tokenize:
            return super().apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, tokenize=False, **kwargs
            )
        found = [part["image"] for c in conversations for m in c for part in _parts(m) if part.get("image") is not None]
        rows = [self._write(messages, add_generation_prompt) for messages in conversations]
        return self._batch(rows, list(_flat(images)) if images is not None else found, padding_side)

    def _write(self, messages: list[Message], open_answer: bool) -> list[int]:
        """Returns the token ids of a conversation; IMAGE_MARKER stands where an image belongs."""
        template = self.template
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        ids = self._template_ids(template["begin"])
        for message in messages:
            role, text = message["role"], _text(message)
            ids += self._template_ids(template["header"].format(role=role))
            if role == "assistant":
                ids += self._text_ids(text)
                ids += self._template_ids(template["answer_end"]) + self._template_ids(template["after_answer"])
            else:
                ids += self._join(map(self._text_ids, text.split(IMAGE))) if role == "user" else self._text_ids(text)
                ids += self._template_ids(template["prompt_end"])
        return ids + (self._template_ids(template["header"].format(role="assistant")) if open_answer else [])

    def _read(self, rendered: str) -> list[int]:
        """Returns the token ids of a text that may hold control tokens."""
        return self._join(self.tokenizer(part, add_special_tokens=False).input_ids for part in rendered.split(IMAGE))

    @staticmethod
    def _join(parts: Iterable[list[int]]) -> list[int]:
        first, *others = parts
        return first + [token for part in others for token in (IMAGE_MARKER, *part)]

    def _text_ids(self, text: str) -> list[int]:
        # A user's text that spells a control token is split into ordinary tokens: only the template may end a turn.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _template_ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in CONTROL_TOKEN.split(text):
            is_control = CONTROL_TOKEN.fullmatch(part)
            ids += [self.tokenizer.convert_tokens_to_ids(part)] if is_control else self._text_ids(part)
        return ids

    def _batch(self, rows: list[list[int]], images: list[Image.Image], padding_side: str) -> BatchFeature:
        """Puts visual tokens where the markers stand, and pads."""
        markers = sum(ids.count(IMAGE_MARKER) for ids in rows)
        if markers != len(images):
            raise ValueError(f"the text has {markers} {IMAGE}, but {len(images)} images came; write one per image")
        encoded = self.image_processor(images)
        layouts = iter(zip(encoded["layouts"], encoded["slices_per_image"], strict=True))
        separators = {NEWLINE: self.newline_id, COMMA: self.comma_id}
        pad, queries, first_row = self.tokenizer.pad_token_id, self.image_processor.query_grid**2, 0
        tokens: list[list[int]] = []
        visual: list[list[int]] = []
        for ids in rows:
            tokens.append([])
            visual.append([])
            for token in ids:
                if token != IMAGE_MARKER:
                    tokens[-1].append(token)
                    visual[-1].append(NO_ROW)
                    continue
                layout, slices = next(layouts)
                tokens[-1] += [separators.get(row, pad) for row in layout.tolist()]
                visual[-1] += [first_row + row if row >= 0 else NO_ROW for row in layout.tolist()]
                # Rows count over all images of the batch, as the model encodes them in one list.
                first_row += slices * queries
        inputs = {
            "input_ids": _pad(tokens, pad, padding_side),
            "attention_mask": _pad([[1] * len(ids) for ids in tokens], 0, padding_side),
        }
        if images:
            inputs |= {"visual_rows": _pad(visual, NO_ROW, padding_side)}
            inputs |= {"patches": encoded["patches"], "grids": encoded["grids"]}
        return BatchFeature(inputs)


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text(message: Message) -> str:
    """Joins content to one text; an image is followed by a newline, as in training."""
    return "".join(f"{IMAGE}\n" if part["type"] == "image" else part["text"] for part in _parts(message))


def _flat(images: Any) -> Iterator[Image.Image]:
    """Yields images of any nesting, in order."""
    if images is None:
        return
    if isinstance(images, Image.Image):
        yield images
        return
    for inner in images:
        yield from _flat(inner)


def _pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    longest = max(map(len, rows), default=0)
    padded = [
        [value] * (longest - len(row)) + row if side == "left" else row + [value] * (longest - len(row)) for row in rows
    ]
    return torch.tensor(padded, dtype=torch.int64)
