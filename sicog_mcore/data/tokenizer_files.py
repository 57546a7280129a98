"""Compares the files beside a tokenizer, which transformers reads, with what a run does.

In: DataConfig   Out: lines for the user   Next: train/run.py and tools/convert.py show them
Every key of these files is compared, stands in IRRELEVANT with a reason, or is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sicog_mcore.config import DataConfig
from sicog_mcore.data.chat import TEMPLATES, Template
from sicog_mcore.data.tokenizer import HF_FILE, SENTENCEPIECE_FILE, Tokenizer, find_tokenizer_file, load_tokenizer
from sicog_mcore.data.tokenizer_check import CONTROL_TOKEN, SAMPLES, TokenizerError

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
MOST_NOTES = 20
COMPARED = frozenset(
    "chat_template model_max_length add_bos_token add_eos_token add_prefix_space clean_up_tokenization_spaces eos_token "
    "added_tokens_decoder additional_special_tokens extra_special_tokens do_lower_case strip_accents "
    "tokenize_chinese_chars sp_model_kwargs auto_map".split()
)
IRRELEVANT: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "which class of transformers reads the files": frozenset(
            "tokenizer_class processor_class backend use_fast from_slow legacy fix_mistral_regex is_local "
            "local_files_only tokenizer_file name_or_path _name_or_path slow_tokenizer_class transformers_version "
            "vocab_file merges_file tokenizer_type fast_tokenizer _commit_hash "
            "special_tokens_map_file added_tokens_file".split()
        ),
        "of padding and cutting, which packs do not know": frozenset(
            "padding_side truncation_side max_length padding truncation truncation_strategy stride pad_to_multiple_of "
            "pad_token_type_id pad_to_max_length return_token_type_ids model_input_names".split()
        ),
        "control tokens are written by data.template": frozenset(
            "bos_token unk_token pad_token sep_token cls_token mask_token image_token audio_token video_token eot_token "
            "boi_token eoi_token vision_bos_token vision_eos_token prefix_token suffix_token middle_token eom_token "
            "use_default_system_prompt default_chat_template model_specific_special_tokens response_schema "
            "split_special_tokens".split()
        ),
        "of decoding for a screen": frozenset("errors spaces_between_special_tokens decode_with_prefix_space".split()),
    }
)
# Control tokens that the chat template of a known model writes for tools, pictures and documents only.
OPTIONAL_CONTROLS = re.compile(
    r"<\|(python_tag|eom_id|vision_\w+|image_pad|video_pad|object_ref_\w+|box_\w+|quad_\w+|tool\w*)\|>"
)


def tokenizer_notes(data: DataConfig) -> list[str]:
    """Gives lines on the tokenizer of a run and on the files beside it, none where all agrees; a long list is cut.

    Raises:
        TokenizerError: see ``load_tokenizer``.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    file = find_tokenizer_file(data.tokenizer)
    assert file is not None, "load_tokenizer found it"
    notes = list(tokenizer.notes)
    try:
        notes += _beside(file, tokenizer, data)
    except TokenizerError as error:  # of a file that a run does not need
        notes.append(str(error))
    more = len(notes) - MOST_NOTES
    return notes[:MOST_NOTES] + ([f"{file.parent}: and {more} more lines on the tokenizer"] if more > 0 else [])


def compare_tokenizers(mine: str, theirs: Path) -> list[str]:
    """Gives a line if a decoder's own tokenizer, beside its weights, writes other ids than the one of the run.

    Args:
        mine: ``data.tokenizer``.
        theirs: a folder or a file in it; without a tokenizer there is nothing to compare.
    """
    own = find_tokenizer_file(str(theirs if theirs.is_dir() else theirs.parent))
    file = find_tokenizer_file(mine)
    if own is None or file is None or own.read_bytes() == file.read_bytes():
        return []
    try:
        ours, other = load_tokenizer(mine), load_tokenizer(str(own))
    except TokenizerError as error:
        return [f"the tokenizer of the weights cannot be compared: {error}"]
    for text in SAMPLES.values():
        if (found := ours.encode(text)) != (expected := other.encode(text)):
            return [
                f"data.tokenizer ({file}) writes {text!r} as {found[:6]}, that of the weights ({own}) as {expected[:6]}: "
                "it is another one, and this decoder knows only its own"
            ]
    return []


def _beside(file: Path, tokenizer: Tokenizer, data: DataConfig) -> Iterator[str]:
    folder, template = file.parent, TEMPLATES[data.template]
    config = _read(folder / CONFIG)
    yield from _config(folder / CONFIG, config, data)
    yield from _chat(folder, config, template, data.template)
    # Both files may name these tokens; tokenizer_config.json, the newer of the two, counts where they differ.
    special = {**_read(folder / SPECIAL), **config}
    eos = _content(special.get("eos_token"))
    if eos and eos != template.answer_end:
        yield f"{folder}: eos_token is {eos!r}, data.template={data.template} ends answers with {template.answer_end!r}"
    yield from _tokens(folder, special, tokenizer)
    other = folder / SENTENCEPIECE_FILE
    if file.name == HF_FILE and other.is_file() and other.stat().st_size:
        yield f"{file} is read, {other.name} beside it is not"


def _config(file: Path, config: Mapping[str, Any], data: DataConfig) -> Iterator[str]:
    longest = config.get("model_max_length")
    if isinstance(longest, int | float) and longest < data.token_budget:
        yield f"{file}: model_max_length is {longest!r}, data.token_budget {data.token_budget}: samples may be longer"
    begin = TEMPLATES[data.template].begin
    for name, ours, effect in (
        ("add_bos_token", bool(begin), "put a token in front of every text"),
        ("add_eos_token", False, "put a token behind every text"),
        ("add_prefix_space", False, "put a space in front of every text"),
        ("clean_up_tokenization_spaces", False, "take spaces out of decoded text"),
    ):
        if config.get(name) and not ours:
            yield f"{file}: {name} is {config[name]!r}: transformers would {effect}, a run does not"
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if config.get(name):
            yield f"{file}: {name} is {config[name]!r}: transformers would change letters, a run does not"
    sampling = config.get("sp_model_kwargs")
    if isinstance(sampling, dict) and sampling.get("enable_sampling"):
        yield f"{file}: sp_model_kwargs is {sampling!r}: transformers would write the same text differently, a run does not"
    if config.get("auto_map"):
        yield f"{file}: auto_map names code of its own, which is never run; only {HF_FILE} or {SENTENCEPIECE_FILE} is read"
    known = COMPARED.union(*IRRELEVANT.values())
    for key, value in config.items():
        if key not in known and value is not None:
            shown = repr(value)
            yield f"{file}: {key!r} = {shown if len(shown) < 80 else shown[:80] + '...'} is unknown here and not used"


def _chat(folder: Path, config: Mapping[str, Any], template: Template, name: str) -> Iterator[str]:
    """Chat templates are programs, which are not run: the control tokens they write are compared with ours."""
    given = config.get("chat_template")
    texts = {CONFIG: json.dumps(given, ensure_ascii=False)} if given else {}
    for file in CHAT_TEMPLATES:
        if (folder / file).is_file():
            texts[file] = _text(folder / file)
    for file, text in texts.items():
        # Templates are not run, so the control tokens are all that can be compared.
        ours = set(CONTROL_TOKEN.findall(template.header + template.prompt_end + template.answer_end))
        theirs = set(CONTROL_TOKEN.findall(text))
        missing = sorted(ours - theirs)
        foreign = sorted(token for token in theirs - set(template.controls) if not OPTIONAL_CONTROLS.fullmatch(token))
        # A chat template without control tokens is as plain as ours.
        if name == "plain" and not theirs and not missing:
            continue
        if missing or foreign:
            differences = [f"does not write {', '.join(missing)}"] if missing else []
            differences += [f"writes {', '.join(foreign)} as well"] if foreign else []
            yield f"{folder / file}: the chat template there is not data.template={name}: it {' and '.join(differences)}"


def _tokens(folder: Path, special: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    """Tokens that files beside the tokenizer name with other ids, or that it does not have."""
    # Token -> the id that a file gives it, None where it only names it.
    expected: dict[str, int | None] = {}
    for token, number in _read(folder / ADDED).items():
        expected[token] = number if isinstance(number, int) else None
    decoder = special.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        expected[_content(token)] = int(number) if str(number).isdigit() else None
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = special.get(name) or ()
        for token in listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ():
            expected.setdefault(_content(token), None)
    wrong = []
    for token, number in expected.items():
        found = tokenizer.token_to_id(token)
        if token and (found is None or number not in (None, found)):
            wrong.append(f"{token!r} is {number if number is not None else 'named'} there and {found} here")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield f"{folder}: the files beside the tokenizer number tokens otherwise: {'; '.join(wrong[:3])}{more}"


def _content(token: object) -> str:
    """A token as it is written: files hold a string, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file} cannot be read ({error}); copy it again") from error


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} cannot be read ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} holds {type(content).__name__}, expected an object; copy it again")
    return content
