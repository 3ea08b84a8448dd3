"""What a model's tokenizer does to text, read from its `tokenizer.json`: the bytes of each token, and what happens to a text
before it is cut into tokens.

Concatenated, the bytes of a prompt's tokens are the bytes of the prompt, for two families:

    byte-level BPE        GPT-2's alphabet: one character of the vocabulary for each byte
    BPE with Metaspace    SentencePiece's: U+2581 for a blank, <0xNN> for a byte outside the vocabulary

where nothing changes the text. What does is either applied to the prompt just the same (NFC; the blank that Metaspace puts
before a prompt; U+2581 read as a blank; the BOS token of completions), or makes the tokenizer Unusable, with the reason:
other normalizers, tokens that swallow white space around them, an added blank, pieces thrown away. Nothing is guessed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Final

MAX_TOKENS: Final = 4_194_304
METASPACE: Final = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KEEPS_EVERYTHING: Final = frozenset(["ByteLevel", "Digits", "Punctuation", "UnicodeScripts", "Split"])
"""Ways to cut a text first that lose none of it (Split and Punctuation: unless told to remove)."""


class Unusable(ValueError):
    """Prompt and token bytes cannot be compared with this tokenizer: says why, and the remedy where there is one."""

    def __init__(self, reason: str, message: str) -> None:
        """`reason`: in CamelCase, for conditions."""
        super().__init__(message)
        self.reason = reason


class Codec:
    """A tokenizer's bytes. `table[id]`: the bytes of a token; ids without a token raise IndexError or hold b''."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: the document of a tokenizer.json. Raises Unusable."""
        if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
            raise Unusable("TokenizerInvalid", "tokenizer.json has no `model`: give the file of a fast tokenizer")
        model = tokenizer["model"]
        kind = model.get("type") or ("BPE" if "merges" in model else None)
        if kind != "BPE":
            raise Unusable(
                "TokenizerNotBPE", f"the tokenizer is {kind}: only byte-level and Metaspace BPE give text back"
            )
        added = [token for token in tokenizer.get("added_tokens") or [] if isinstance(token, dict)]
        cutters = _flattened(tokenizer.get("pre_tokenizer"), "pretokenizers")
        normalizers = _flattened(tokenizer.get("normalizer"), "normalizers")
        metaspace = next((cutter for cutter in cutters if cutter.get("type") == "Metaspace"), None)
        byte_level = any(cutter.get("type") == "ByteLevel" for cutter in cutters)
        _refuse_white_space_eaters(added)
        if byte_level:
            _refuse_lossy(cutters)
        elif metaspace is not None and len(cutters) == 1 and model.get("byte_fallback"):
            _refuse_unlike_recorded(metaspace)
        else:
            raise Unusable(
                "TokenizerNotByteLevel", "the tokenizer is neither byte-level nor Metaspace with byte fallback"
            )
        self.metaspace = metaspace is not None and not byte_level
        self.blank_first = self.metaspace and _prepends(metaspace or {}) == "first"
        self.nfc = _nfc(normalizers)
        self.table = _table(model.get("vocab"), added, byte_level=byte_level)
        self.special = {str(token.get("content")) for token in added}
        self.before, self.after = _template(tokenizer.get("post_processor"), self.table)
        """Text of the tokens put before and after a prompt that is no chat (BOS, EOS)."""
        self._specials = re.compile(
            "|".join(re.escape(text) for text in sorted(self.special, key=len, reverse=True)) or "$^"
        )

    def prompt_bytes(self, text: str, *, add_special_tokens: bool) -> bytes:
        """The bytes that the engine's tokens of this text have, together. Raises UnicodeEncodeError for a lone surrogate."""
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            text = self._normalized(text)
        if self.metaspace:
            text = text.replace(METASPACE, " ")
            if self.blank_first and text and text[0] != " " and self._specials.match(text) is None:
                text = f" {text}"
        data = text.encode()
        return self.before + data + self.after if add_special_tokens else data

    def token_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of a prompt given as token ids. Raises IndexError where one is unknown."""
        return b"".join([self.table[token] for token in tokens])

    def _normalized(self, text: str) -> str:
        """NFC between special tokens: they are cut out first."""
        parts: list[str] = []
        at = 0
        for special in self._specials.finditer(text):
            parts += [unicodedata.normalize("NFC", text[at : special.start()]), special.group()]
            at = special.end()
        return "".join([*parts, unicodedata.normalize("NFC", text[at:])])


def _flattened(step: Any, inside: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer, its sequences opened."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        return [part for child in step.get(inside) or [] for part in _flattened(child, inside)]
    return [step]


def _refuse_white_space_eaters(added: list[dict[str, Any]]) -> None:
    for token in added:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            eats = "lstrip" if token.get("lstrip") else "rstrip" if token.get("rstrip") else "single_word"
            raise Unusable(
                "TokenizerStripsText", f"the token {token.get('content')!r} has {eats}: white space around it is lost"
            )


def _refuse_lossy(cutters: list[dict[str, Any]]) -> None:
    for cutter in cutters:
        kind = cutter.get("type")
        if kind not in _KEEPS_EVERYTHING:
            raise Unusable("TokenizerLosesText", f"the pre-tokenizer {kind} may lose text")
        if cutter.get("behavior") == "Removed":
            raise Unusable("TokenizerLosesText", f"the pre-tokenizer {kind} removes what it splits at")
        if cutter.get("add_prefix_space"):
            raise Unusable(
                "TokenizerAddsBlank", f"the pre-tokenizer {kind} adds a blank before text (add_prefix_space)"
            )


def _prepends(metaspace: dict[str, Any]) -> str:
    """always | first | never; older files say it by a flag."""
    scheme = metaspace.get("prepend_scheme")
    if scheme is None:
        scheme = "always" if metaspace.get("add_prefix_space", True) else "never"
    return str(scheme).lower()


def _refuse_unlike_recorded(metaspace: dict[str, Any]) -> None:
    if metaspace.get("replacement", METASPACE) != METASPACE:
        raise Unusable("TokenizerNotByteLevel", "Metaspace with another replacement than U+2581")
    if _prepends(metaspace) == "always":
        raise Unusable("TokenizerAddsBlank", "Metaspace adds a blank after every special token (prepend_scheme always)")


def _nfc(normalizers: list[dict[str, Any]]) -> bool:
    """Whether text is brought into NFC; any other change is refused."""
    for normalizer in normalizers:
        kind = normalizer.get("type")
        if kind != "NFC":
            raise Unusable("TokenizerNormalizes", f"the normalizer {kind} changes text: only NFC can be done alike")
    return bool(normalizers)


def _table(vocabulary: Any, added: list[dict[str, Any]], *, byte_level: bool) -> list[bytes]:
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise Unusable("TokenizerInvalid", "tokenizer.json has no `model.vocab`: give the whole file")
    ids = [*vocabulary.values(), *(token.get("id") for token in added)]
    if not all(type(number) is int and 0 <= number < MAX_TOKENS for number in ids):
        raise Unusable("TokenizerInvalid", f"tokenizer.json: token ids are whole numbers below {MAX_TOKENS}")
    table = [b""] * (max(ids) + 1)
    contents = {token["id"]: str(token.get("content")) for token in added}
    read = _byte_level if byte_level else _metaspace
    for text, number in vocabulary.items():
        if number not in contents:
            table[number] = read(text)
    for number, content in contents.items():
        table[number] = content.encode("utf-8", "replace")
    return table


def _alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others, in their order, for U+0100 and up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_ALPHABET: Final = _alphabet()


def _byte_level(text: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in text])
    except KeyError:
        raise Unusable(
            "TokenizerNotByteLevel", f"the token {text!r} is not written in the byte-level alphabet"
        ) from None


def _metaspace(text: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(byte.group(1), 16)]) if byte else text.replace(METASPACE, " ").encode("utf-8", "replace")


def _template(processor: Any, table: list[bytes]) -> tuple[bytes, bytes]:
    """What the post-processor puts before and after a single text."""
    steps = _flattened(processor, "processors")
    before = after = b""
    for step in steps:
        kind = step.get("type")
        if kind == "TemplateProcessing":
            parts, seen = [b"", b""], 0
            for piece in step.get("single") or []:
                if "Sequence" in piece:
                    seen = 1
                    continue
                name = (piece.get("SpecialToken") or {}).get("id")
                known = (step.get("special_tokens") or {}).get(name) or {}
                parts[seen] += b"".join(table[number] for number in known.get("ids") or [] if 0 <= number < len(table))
            before, after = parts
        elif kind != "ByteLevel":
            raise Unusable("TokenizerPostProcesses", f"the post-processor {kind} is not known")
    return before, after
