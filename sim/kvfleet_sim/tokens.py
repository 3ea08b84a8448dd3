"""Text to token ids and back, the keys of token blocks, and the words the simulated model says.

`ByteTokenizer`, the default, makes one token of four UTF-8 bytes; its id is those bytes read as a little-endian integer.
A special token (`<|im_start|>`, …) is one token; text is cut into fours anew after each special token and after the role
line that follows `<|im_start|>`, so what the model said in one turn is the same tokens again as history of the next. A short
last token is filled up with 0xFF, which occurs in no UTF-8 text: every sequence of ids decodes to one text, and the bytes of
a prompt's tokens, without the filling, are the bytes of the prompt.

`FileTokenizer` reads a `tokenizer.json` through the `tokenizers` package instead.

Both offer a small vocabulary of words for the output: ASCII letters and a leading blank, nothing JSON would escape.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

Tokens = npt.NDArray[np.uint32]

TOKEN_BYTES: Final = 4
MAX_TOKEN_ID: Final = 2**32 - 1
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FILL: Final = 0xFF
_COMMON = (
    "act add age ago aid aim air all and any arc are arm art ask bar bay bed big bit box boy bus but buy can cap car cat cow "
    "cup cut day dew did dog dry due ear eat egg end eye far few fig fit fix fly for fox fun gap gas get god had has hat hen "
    "her hid him his hit hot how ice ink its job joy key kid kit lab lay leg let lie log lot low man map mat may men met mix "
    "mud net new nor not now nut oak oar odd off oil old one our out own pay pen pet pie pin pot put ran raw red rib rim row "
    "run saw sea see set she sky son sun tea ten the"
)
WORDS: Final = tuple(_COMMON.split())


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded, or ids that are no tokens."""


class Tokenizer(Protocol):
    words: list[str]
    """What the model can say, token by token."""
    word_ids: Tokens
    """Their ids."""

    def encode(self, text: str) -> Tokens: ...

    def decode(self, tokens: Tokens) -> str: ...

    def strings(self, tokens: Tokens) -> list[str]:
        """Each token as text."""
        ...


class ByteTokenizer:
    _SPLIT = re.compile(b"(" + b"|".join(re.escape(special.encode()) for special in SPECIAL_TOKENS) + b")")
    _IDS: Final = {
        special.encode(): FILL | index << 8 | FILL << 16 | FILL << 24 for index, special in enumerate(SPECIAL_TOKENS)
    }

    def __init__(self) -> None:
        self.words = [f" {word}" for word in WORDS]
        self.word_ids = self.encode("".join(self.words))

    def encode(self, text: str) -> Tokens:
        data = text.encode("utf-8", "replace")
        pieces = self._SPLIT.split(data) if b"<|" in data else [data]
        padded: list[bytes] = []
        opens_turn = False
        for index, piece in enumerate(pieces):
            if index % 2:
                padded.append(self._IDS[piece].to_bytes(TOKEN_BYTES, "little"))
                opens_turn = piece == b"<|im_start|>"
                continue
            role_line = piece.find(b"\n") + 1 if opens_turn else 0
            padded += [_filled(piece[:role_line]), _filled(piece[role_line:])]
        return np.frombuffer(b"".join(padded), dtype="<u4")

    def decode(self, tokens: Tokens) -> str:
        special = np.flatnonzero((tokens & 0xFF) == FILL)
        if not len(special):
            return _text(tokens)
        parts: list[str] = []
        start = 0
        for at in special.tolist():
            parts += [_text(tokens[start:at]), _special(int(tokens[at]))]
            start = at + 1
        return "".join([*parts, _text(tokens[start:])])

    def strings(self, tokens: Tokens) -> list[str]:
        return [self.decode(tokens[index : index + 1]) for index in range(len(tokens))]


def _filled(piece: bytes) -> bytes:
    short = -len(piece) % TOKEN_BYTES
    return piece + b"\xff" * short if short else piece


def _text(tokens: Tokens) -> str:
    return tokens.astype("<u4").tobytes().replace(b"\xff", b"").decode("utf-8", "replace")


def _special(token: int) -> str:
    index = token >> 8 & 0xFF
    known = index < len(SPECIAL_TOKENS) and token == ByteTokenizer._IDS[SPECIAL_TOKENS[index].encode()]
    return SPECIAL_TOKENS[index] if known else ""


class FileTokenizer:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        try:
            library = importlib.import_module("tokenizers")
        except ImportError:
            raise TokenizerError("--tokenizer needs the `tokenizers` package: pip install tokenizers") from None
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(f"--tokenizer {path}: no such file; give a tokenizer.json or a directory with one")
        try:
            self._library: Any = library.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise TokenizerError(f"--tokenizer {file}: not a tokenizer.json: {error}") from None
        self._library.no_truncation()
        self.words, self.word_ids = self._plain_words()

    def encode(self, text: str) -> Tokens:
        return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype="<u4")

    def decode(self, tokens: Tokens) -> str:
        return str(self._library.decode(tokens.tolist(), skip_special_tokens=False))

    def strings(self, tokens: Tokens) -> list[str]:
        return [self._library.id_to_token(token) or "" for token in tokens.tolist()]

    def _plain_words(self) -> tuple[list[str], Tokens]:
        """Words of the vocabulary that are one token, alone and in a row."""
        found: dict[str, int] = {}
        for word in (f" {word}" for word in WORDS):
            ids = self._library.encode(word, add_special_tokens=False).ids
            if len(ids) == 1 and self._library.decode(ids) == word:
                found[word] = ids[0]
        if not found:
            raise TokenizerError("--tokenizer: none of some 120 common English words is one token with a leading blank")
        return list(found), np.array(list(found.values()), dtype="<u4")


def block_keys(tokens: Tokens, block_tokens: int, root: int) -> list[int]:
    """The key of each full block: a hash of its tokens, chained from `root` through all blocks before it."""
    data = memoryview(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
    size = block_tokens * TOKEN_BYTES
    digest = xxhash.xxh3_64_intdigest
    key, keys = root, []
    for start in range(0, len(data) - size + 1, size):
        key = digest(data[start : start + size], key)
        keys.append(key)
    return keys


def root_key(lora: str | None, cache_salt: str | None) -> int:
    """Where the chain of a request starts: prompts of different adapters or salts share no block."""
    return xxhash.xxh3_64_intdigest(repr((lora, cache_salt)).encode("utf-8", "replace"))


def draw_words(key: int, count: int, choices: int) -> npt.NDArray[np.int64]:
    """`count` indices below `choices`, told by `key` alone (splitmix64 of a counter)."""
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state % np.uint64(choices)).astype(np.int64)


def token_array(ids: Sequence[int]) -> Tokens:
    """Token ids from outside. Raises TokenizerError where one is no id."""
    if any(type(token) is not int or not 0 <= token <= MAX_TOKEN_ID for token in ids):
        raise TokenizerError(f"token ids are whole numbers from 0 to {MAX_TOKEN_ID}")
    return np.array(ids, dtype="<u4")


class Continuation:
    """Which words follow a text: each is told by all of the text before it, byte by byte, as a model at temperature zero
    would. A text cut anywhere between two words and read again goes on with the same words.

    The text is kept as a polynomial of its bytes, modulo 2^64."""

    _BASE: Final = 0x9E3779B97F4A7C15
    _MASK: Final = 2**64 - 1
    _PIECE: Final = 4096

    def __init__(self, words: Sequence[str]) -> None:
        powers = [1]
        for _ in range(self._PIECE):
            powers.append(powers[-1] * self._BASE & self._MASK)
        self._powers = np.array(powers, dtype=np.uint64)
        self._words = [(powers[len(data)], self._value(data)) for data in (word.encode() for word in words)]

    def draw(self, key: int, text: str, count: int) -> npt.NDArray[np.int64]:
        """The `count` words, by index, that follow `text`; `key` tells one model and its seeds from others."""
        mask, words, choices = self._MASK, self._words, len(self._words)
        state = self._state(text.encode("utf-8", "replace"))
        drawn = np.empty(count, dtype=np.int64)
        for at in range(count):
            mixed = (state ^ key) * 0xBF58476D1CE4E5B9 & mask
            mixed = (mixed ^ mixed >> 29) * 0x94D049BB133111EB & mask
            word = (mixed >> 32) % choices
            power, value = words[word]
            state = state * power + value & mask
            drawn[at] = word
        return drawn

    def _state(self, data: bytes) -> int:
        state = 0
        for start in range(0, len(data), self._PIECE):
            piece = data[start : start + self._PIECE]
            state = state * int(self._powers[len(piece)]) + self._value(piece) & self._MASK
        return state

    def _value(self, piece: bytes) -> int:
        values = np.frombuffer(piece, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
        return int((values * self._powers[: len(piece)][::-1]).sum(dtype=np.uint64))
