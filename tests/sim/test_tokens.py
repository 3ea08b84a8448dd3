"""Tokens are invertible, blocks chain, and the model's words are told by their key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_sim.tokens import (
    SPECIAL_TOKENS,
    WORDS,
    ByteTokenizer,
    Continuation,
    FileTokenizer,
    TokenizerError,
    block_keys,
    draw_words,
    root_key,
    token_array,
)

TEXTS = st.lists(
    st.text() | st.sampled_from([*SPECIAL_TOKENS, "user\n", "\n", "<|", "im_end|>", "ab", "abcd"]), max_size=12
).map("".join)


@given(TEXTS)
def test_decoding_gives_the_text_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode("utf-8", "replace").decode()


@given(TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    specials = {int(tokenizer.encode(special)[0]): special.encode() for special in SPECIAL_TOKENS}
    pieces = [
        specials.get(token) or token.to_bytes(4, "little").rstrip(b"\xff") for token in tokenizer.encode(text).tolist()
    ]
    assert b"".join(pieces) == text.encode("utf-8", "replace")


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_any_ids_decode_to_some_text(ids: list[int]) -> None:
    text = ByteTokenizer().decode(token_array(ids))
    assert isinstance(text, str)
    text.encode()


@given(TEXTS, TEXTS)
def test_a_turn_is_tokenized_alike_as_answer_and_as_history(before: str, said: str) -> None:
    """What follows a role line starts a token of its own."""
    tokenizer = ByteTokenizer()
    head = f"{before}<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.encode(f"{head}{said}<|im_end|>\n").tolist()
    parts = [tokenizer.encode(head), tokenizer.encode(said), tokenizer.encode("<|im_end|>\n")]
    assert whole == np.concatenate(parts).tolist()


def test_a_token_is_four_bytes_and_the_last_may_be_short() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.strings(tokenizer.encode("Hello world")) == ["Hell", "o wo", "rld"]
    assert len(tokenizer.encode("a" * 4096)) == 1024
    assert len(tokenizer.encode("a" * 4097)) == 1025
    assert tokenizer.strings(tokenizer.encode("<|im_start|>user\nHi")) == ["<|im_start|>", "user", "\n", "Hi"]


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40), st.integers(1, 8))
def test_equal_keys_mean_equal_prefixes(first: list[int], second: list[int], block_tokens: int) -> None:
    ours, theirs = (block_keys(token_array(ids), block_tokens, 7) for ids in (first, second))
    assert len(ours) == len(first) // block_tokens
    for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        end = (index + 1) * block_tokens
        assert (one == other) == (first[:end] == second[:end])


def test_adapters_and_salts_separate_prompts() -> None:
    roots = [root_key(lora, salt) for lora in (None, "a", "None") for salt in (None, "s", "None")]
    assert len(set(roots)) == 9
    assert len({block_keys(token_array([1, 2]), 2, root)[0] for root in roots}) == 9


@given(st.integers(0, 2**64 - 1), st.integers(1, 200))
def test_words_follow_from_the_key_alone_and_longer_texts_begin_alike(key: int, count: int) -> None:
    words = draw_words(key, count, 100)
    assert len(words) == count
    assert set(words.tolist()) <= set(range(100))
    assert draw_words(key, count + 50, 100)[:count].tolist() == words.tolist()


def test_words_are_spread_evenly() -> None:
    counts = np.bincount(draw_words(1, 100_000, 100), minlength=100)
    assert counts.min() > 800
    assert counts.max() < 1200


def test_the_words_are_one_token_each_and_need_no_escaping() -> None:
    tokenizer = ByteTokenizer()
    assert len(tokenizer.words) == len(set(tokenizer.words)) == len(tokenizer.word_ids)
    for word, token in zip(tokenizer.words, tokenizer.word_ids.tolist(), strict=True):
        assert tokenizer.encode(word).tolist() == [token]
        assert json.dumps(word) == f'"{word}"'


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.0], ["1"], [True], [None]])
def test_what_is_no_id_is_refused(ids: list[int]) -> None:
    with pytest.raises(TokenizerError, match="whole numbers from 0"):
        token_array(ids)


def tokenizer_json(directory: Path, vocabulary: list[str]) -> Path:
    """A word-level tokenizer whose words carry their leading blank."""
    model = {"type": "WordLevel", "vocab": {word: index for index, word in enumerate(vocabulary)}, "unk_token": "?"}
    split = {"type": "Split", "pattern": {"Regex": " ?[^ ]+"}, "behavior": "Isolated", "invert": False}
    path = directory / "tokenizer.json"
    fields = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    decoder = {"type": "Fuse"}
    path.write_text(
        json.dumps({**fields, "pre_tokenizer": split, "post_processor": None, "decoder": decoder, "model": model})
    )
    return path


def test_a_tokenizer_file_is_used_for_text_and_words(tmp_path: Path) -> None:
    path = tokenizer_json(tmp_path, ["?", " act", " add", " age", " zebra", "one"])
    tokenizer = FileTokenizer(path)
    assert tokenizer.words == [" act", " add", " age"]
    tokens = tokenizer.encode("one zebra")
    assert tokens.tolist() == [5, 4]
    assert tokenizer.decode(tokens) == "one zebra"
    assert tokenizer.strings(tokens) == ["one", " zebra"]
    assert FileTokenizer(tmp_path).word_ids.tolist() == [1, 2, 3], "a directory will do"


def test_a_tokenizer_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json"):
        FileTokenizer(tmp_path / "broken.json")
    with pytest.raises(TokenizerError, match="common English words"):
        FileTokenizer(tokenizer_json(tmp_path, ["?", "x"]))
    with pytest.raises(TokenizerError, match="no such file"):
        FileTokenizer(tmp_path / "absent.json")


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from pathlib import Path; from kvfleet_sim.tokens import FileTokenizer\n"
        "FileTokenizer(Path('x'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install tokenizers" in run.stderr


@given(st.text(max_size=60), st.integers(0, 2**64 - 1), st.integers(0, 40))
def test_a_text_cut_between_two_words_goes_on_as_it_did(prompt: str, key: int, cut: int) -> None:
    continuation, words = Continuation(WORDS), WORDS
    whole = continuation.draw(key, prompt, 40).tolist()
    begun = prompt + "".join(words[word] for word in whole[:cut])
    assert continuation.draw(key, begun, 40 - cut).tolist() == whole[cut:]


def test_what_follows_differs_by_text_and_by_key() -> None:
    continuation = Continuation(WORDS)
    drawn = {
        tuple(continuation.draw(key, text, 8).tolist()) for key in (1, 2) for text in ("", "a", "aa", "b", "a" * 5000)
    }
    assert len(drawn) == 10


def test_following_words_are_spread_evenly() -> None:
    counts = np.bincount(Continuation(WORDS).draw(1, "Once", 100_000), minlength=len(WORDS))
    mean = 100_000 / len(WORDS)
    assert counts.min() > 0.8 * mean
    assert counts.max() < 1.2 * mean
