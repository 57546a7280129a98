from __future__ import annotations

import io
import json
import random
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from sicog_mcore import presets
from sicog_mcore.data.encode import Encoder
from sicog_mcore.data.sample import Sample, Turn
from sicog_mcore.data.text_bound import NORMAL_FORM_SHRINKS, NORMAL_FORMS, TextBound, bound_of_file, num_bytes
from sicog_mcore.data.tokenizer import load_tokenizer
from sicog_mcore.errors import SampleError
from tests.builders import ANSWERS, TOKENIZER, data_config

MODEL = presets.tiny().model
SPEC: dict[str, Any] = json.loads(Path(TOKENIZER).read_text())
LONGEST = 19  # bytes of the longest entry of the tests' tokenizer
LETTERS = "aA \n,.0\u00e9\u0301K\u212a日本\U0001d7ce🙂▁"


def changed(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(json.dumps(SPEC))
    for name, value in changes.items():
        spec[name] = {**spec[name], **value} if name == "model" else value
    return spec


def added(**flags: Any) -> list[dict[str, Any]]:
    token = {"id": 999, "content": "<tool>", "single_word": False, "lstrip": False, "rstrip": False}
    return [*SPEC["added_tokens"], {**token, "normalized": False, "special": False, **flags}]


@pytest.mark.parametrize("normalizer", [None, "NFC", "NFD"])  # with the others no tokenizer is taken
def test_no_text_has_fewer_tokens_than_the_bound(normalizer: str | None, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(normalizer=normalizer and {"type": normalizer})))
    tokenizer = load_tokenizer(str(tmp_path))
    bound = tokenizer.bound
    assert bound == TextBound(LONGEST, NORMAL_FORM_SHRINKS if normalizer else 1)
    draw = random.Random(7)
    entries = sorted(SPEC["model"]["vocab"], key=len)[-20:]
    texts = ["".join(draw.choices(LETTERS, k=draw.randrange(40))) for _ in range(300)]
    texts += [tokenizer.decode(draw.choices(range(20, tokenizer.size), k=30)) for _ in range(100)]
    texts += [tokenizer.decode([SPEC["model"]["vocab"][entry]] * 50) for entry in entries]
    texts += [letter * 50 for letter in LETTERS]
    for text in texts:
        assert bound.least_tokens(text) <= len(tokenizer.encode(text)), text


@pytest.mark.parametrize("form", NORMAL_FORMS)
def test_normal_forms_shrink_no_text_more_than_we_think(form: Any) -> None:
    for code in (*range(0x20, 0xD800), *range(0xE000, 0x11000), *range(0x1D000, 0x1F000), *range(0x2F800, 0x2FA20)):
        pieces = unicodedata.normalize("NFD", chr(code))
        for text in (chr(code), pieces, *("\U0001d41a" + mark for mark in pieces[1:])):
            assert num_bytes(text) <= NORMAL_FORM_SHRINKS * num_bytes(unicodedata.normalize(form, text))


REFUSED: dict[str, dict[str, Any]] = {
    "cuts texts off": {"truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
    "strips": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "strips among others": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "StripAccents"}]}
    },
    "deletes": {"normalizer": {"type": "Replace", "pattern": {"String": "ab"}, "content": ""}},
    "replaces a pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
    "unknown normalizer": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "drops white space": {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    "drops what it splits at": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
                SPEC["pre_tokenizer"],
            ],
        }
    },
    "an added token swallows the space behind it": {"added_tokens": added(rstrip=True)},
    "an added token swallows the space before it": {"added_tokens": added(lstrip=True)},
    "one unknown token for any run": {"pre_tokenizer": None, "model": {"unk_token": "a", "fuse_unk": True}},
    "a byte has no entry": {"model": {"vocab": {k: v for k, v in SPEC["model"]["vocab"].items() if k != "Ā"}}},
    "words": {"model": {"type": "WordLevel"}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_may_drop_text_has_no_bound(name: str) -> None:
    assert bound_of_file(changed(**REFUSED[name])) is None


def test_a_long_added_token_counts() -> None:
    assert bound_of_file(changed(added_tokens=added(content="<" + "x" * 40 + ">"))) == TextBound(42, 1)
    assert bound_of_file(changed(added_tokens=added(content="x" * 40, special=True))) == TextBound(LONGEST, 1)


def test_byte_fallback_bounds_other_vocabularies() -> None:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁▁▁▁": 256, "日本": 257}
    spec = changed(pre_tokenizer=None, model={"vocab": vocabulary, "merges": [], "byte_fallback": True})
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    assert bound_of_file(spec) == TextBound(12, 1)
    spec["model"]["vocab"] = {key: value for key, value in vocabulary.items() if key != "<0x41>"}
    assert bound_of_file(spec) is None


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_models_have_a_bound_if_no_character_is_unknown_to_them(kind: str, tmp_path: Path) -> None:
    def train(**options: Any) -> str:
        model = io.BytesIO()
        settings = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "hard_vocab_limit": False}
        settings |= {"vocab_size": 400, "minloglevel": 2, "model_type": kind, "byte_fallback": True, **options}
        lines = iter([*ANSWERS] * 20)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings)
        (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
        return str(tmp_path / "tokenizer.model")

    tokenizer = load_tokenizer(train())
    assert tokenizer.bound is not None
    for text in (*ANSWERS, "日本" * 30, " " * 50, "a" * 50, "▁" * 30, " ".join(ANSWERS) * 3):
        assert tokenizer.bound.least_tokens(text) <= len(tokenizer.encode(text))
    assert load_tokenizer(train(byte_fallback=False, vocab_size=120, user_defined_symbols="\n")).bound is None


def talk(question: str, answer: str, rejected: str = "") -> Sample:
    return Sample(
        "s", "data.jsonl:1", (Turn("user", question), Turn("assistant", answer)), (), (rejected,) * bool(rejected)
    )


def uses(encoder: Encoder) -> list[Callable[[Sample], object]]:
    return [
        encoder.measure,
        encoder.encode,
        encoder.encode_prompt,
        lambda sample: encoder.measure_prompts((), [sample.turns[:1]]),
    ]


HUGE = 4 * 2**20


@pytest.mark.parametrize(
    "text", ["The circle is red. " * (HUGE // 19), "a" * HUGE, "日" * (HUGE // 3)], ids=["words", "run", "cjk"]
)
@pytest.mark.parametrize("too_long", ["quarantine", "truncate"])
def test_a_text_that_cannot_fit_is_refused_without_being_tokenised(text: str, too_long: Any) -> None:
    encoder = Encoder(MODEL, data_config(too_long=too_long))
    started = time.process_time()
    for use in uses(encoder):
        with pytest.raises(
            SampleError, match=r"too_long: 4,\d+,\d+ bytes of text are at least 220,\d+ tokens, at most 1024 fit"
        ):
            use(talk(text, "Yes."))
    assert time.process_time() - started < 2  # tokenising would take three each time


def test_long_answers_are_refused_or_cut_and_pairs_are_never_cut() -> None:
    long = "The circle is red. " * 100_000
    for sample in (talk("Hi", long), talk("Hi", "Yes.", long), talk("Hi", long, "No.")):
        with pytest.raises(SampleError, match="bytes of text are at least"):
            Encoder(MODEL, data_config()).measure(sample)
    cutting = Encoder(MODEL, data_config(too_long="truncate", token_budget=100))
    with pytest.raises(SampleError, match="bytes of text are at least"):
        cutting.measure(talk("Hi", "Yes.", long))
    measured, encoded = cutting.measure(talk("Hi", long)), cutting.encode(talk("Hi", long))
    whole = Encoder(MODEL, data_config(token_budget=100_000)).encode(talk("Hi", long[:19_000]))
    assert (measured.num_tokens, measured.is_truncated) == (100, True)
    assert encoded.tokens.tolist() == whole.tokens[:100].tolist()
    assert encoded.labels[:99].tolist() == whole.labels[:99].tolist()


def test_nothing_that_fits_is_refused() -> None:
    vocabulary: dict[str, int] = SPEC["model"]["vocab"]
    longest = max((entry for entry in vocabulary if not entry.startswith("<|")), key=len)
    tokenizer = load_tokenizer(TOKENIZER)
    text = tokenizer.decode([vocabulary[longest]] * 40)  # as much text as any 40 tokens can hold
    assert (num_bytes(text), len(tokenizer.encode(text))) == (40 * len(longest), 40)
    rest = Encoder(MODEL, data_config()).measure(talk("Hi", "Hi")).num_tokens - len(tokenizer.encode("Hi"))
    for too_long in ("quarantine", "truncate"):
        encoder = Encoder(MODEL, data_config(token_budget=rest + 40, too_long=too_long))
        assert encoder.measure(talk("Hi", text)).num_tokens == rest + 40
    with pytest.raises(SampleError, match="too_long"):
        Encoder(MODEL, data_config(token_budget=rest + 39)).measure(talk("Hi", text))


def test_placeholders_are_no_text() -> None:
    encoder = Encoder(MODEL, data_config(token_budget=60))
    encoder._refuse_long([[Turn("user", "<image>" * 10_000)]])  # what their images need is counted when they are known
    with pytest.raises(SampleError, match="too_long"):
        encoder._refuse_long([[Turn("user", "<photo>" * 10_000)]])
