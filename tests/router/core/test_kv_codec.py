"""Token bytes against the library engines use; what breaks the equality is found in tokenizer.json."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_level, document, metaspace
from tokenizers import Tokenizer

from kvfleet_router.core.kvevents.codec import Codec, Unusable

PIECES = st.lists(
    st.text(max_size=12)
    | st.sampled_from(["<|im_start|>", "<|im_end|>\n", "<s>", " ", "\n\n", "\u2581", "café", "e\u0301", "\u1112\u1161\u11ab", "👩‍👩‍👧‍👦", "the worker"]),
    max_size=10,
).map("".join)  # fmt: skip


CODECS: dict[int, Codec] = {}


def same(tokenizer: Tokenizer, text: str, *, special: bool) -> bool:
    if id(tokenizer) not in CODECS:
        CODECS[id(tokenizer)] = Codec(document(tokenizer))
    codec = CODECS[id(tokenizer)]
    ids = tokenizer.encode(text, add_special_tokens=special).ids
    return codec.token_bytes(ids) == codec.prompt_bytes(text, add_special_tokens=special)


@given(PIECES, st.booleans())
def test_byte_level(text: str, special: bool) -> None:
    assert same(byte_level(), text, special=special)


@given(PIECES, st.booleans())
def test_byte_level_with_nfc(text: str, special: bool) -> None:
    assert same(byte_level(nfc=True), text, special=special)


@given(PIECES, st.booleans(), st.sampled_from(["first", "never"]))
def test_metaspace_with_byte_fallback(text: str, special: bool, scheme: str) -> None:
    assert same(metaspace(scheme), text, special=special)


@pytest.mark.parametrize(
    "text", ["Please explain", " Please explain", "<s>[INST] Please</s>[INST] more", "a\u2581b", "", "\u2581a"]
)
def test_metaspace_cases_as_recorded(text: str) -> None:
    """A blank after BOS unless there is one; none after a BOS the template wrote; U+2581 comes back as a blank."""
    for special in (True, False):
        assert same(metaspace(), text, special=special), (text, special)


def test_a_token_may_end_inside_a_character() -> None:
    tokenizer = byte_level()
    codec = Codec(document(tokenizer))
    pieces = [codec.table[number] for number in tokenizer.encode("東京 👩‍👩‍👧‍👦", add_special_tokens=False).ids]
    assert any(piece != piece.decode("utf-8", "ignore").encode() for piece in pieces)


def test_tokens_without_bytes_in_the_vocabulary_are_refused_not_guessed() -> None:
    codec = Codec(document(byte_level()))
    with pytest.raises(IndexError):
        codec.token_bytes([10**6])


def changed(**fields: Any) -> dict[str, Any]:
    return document(byte_level()) | fields


ADDED = {"id": 3, "content": "<x>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (None, "TokenizerInvalid"),
        ({}, "TokenizerInvalid"),
        ({"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": {"type": "ByteLevel"}}, "TokenizerInvalid"),
        ({"model": {"type": "Unigram", "vocab": []}}, "TokenizerNotBPE"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "TokenizerNotBPE"),
        (changed(pre_tokenizer=None), "TokenizerNotByteLevel"),
        (changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "TokenizerAddsBlank"),
        (
            changed(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "ByteLevel"}],
                }
            ),
            "TokenizerLosesText",
        ),
        (
            changed(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Split", "behavior": "Removed"}, {"type": "ByteLevel"}],
                }
            ),
            "TokenizerLosesText",
        ),
        (changed(normalizer={"type": "Lowercase"}), "TokenizerNormalizes"),
        (
            changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}),
            "TokenizerNormalizes",
        ),
        (changed(added_tokens=[ADDED | {"rstrip": True}]), "TokenizerStripsText"),
        (changed(added_tokens=[ADDED | {"lstrip": True}]), "TokenizerStripsText"),
        (changed(added_tokens=[ADDED | {"id": -1}]), "TokenizerInvalid"),
        (changed(post_processor={"type": "RobertaProcessing"}), "TokenizerPostProcesses"),
        (document(metaspace("always")), "TokenizerAddsBlank"),
    ],
)
def test_what_breaks_the_equality_is_refused_with_its_reason(tokenizer: Any, reason: str) -> None:
    with pytest.raises(Unusable) as raised:
        Codec(tokenizer)
    assert raised.value.reason == reason
    assert str(raised.value)


def test_what_the_refused_settings_do() -> None:
    """The library's own behaviour: white space after such a token is gone."""
    changed_tokenizer = document(byte_level())
    for token in changed_tokenizer["added_tokens"]:
        token["rstrip"] = True
    tokenizer = Tokenizer.from_str(json.dumps(changed_tokenizer))
    ids = tokenizer.encode("<|im_end|>\n<|im_start|>", add_special_tokens=False).ids
    codec = Codec(document(byte_level()))
    assert codec.token_bytes(ids) == b"<|im_end|><|im_start|>"


def test_nfc_leaves_special_tokens_alone() -> None:
    text = "<|im_end|>\u0338 e\u0301"
    assert unicodedata.normalize("NFC", text).startswith("<|im_end|\u226f")
    assert same(byte_level(nfc=True), text, special=False)
