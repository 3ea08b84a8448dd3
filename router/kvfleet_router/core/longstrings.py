"""Takes the long strings out of a JSON text, so that a parser need not walk over them byte by byte. Pure.

A prompt of a document, or an image in base64, is one string of thousands of bytes. Finding its closing quote is the C library's
memchr, several times faster than a parser's loop; only a quote behind a backslash has to be looked at. What is taken out
leaves a mark, for which `Cut.whole` puts the string back. Texts full of quotes are left to the parser: hopping from quote to
quote would take longer there.

Nothing is checked inside a string that was taken out: the engine reads the whole text anyway, and says what is wrong with it.
"""

from __future__ import annotations

import secrets
from typing import Final

LEAST_TEXT_BYTES: Final = 4096
"""Shorter texts are not worth it."""
LONG_BYTES: Final = 1024
BYTES_PER_HOP: Final = 512
"""What a parser walks over in the time of one hop."""
HOPS_AHEAD: Final = 16
"""How many more hops than these bytes allow for are made before the text is left to the parser."""
_QUOTE: Final = 34
_BACKSLASH: Final = 92
_MARK = secrets.token_hex(8).encode()
"""Nobody can know it, so no string of a client's can pose as one that was taken out."""
_MARK_TEXT = _MARK.decode()
_INDEX_DIGITS: Final = 6


class Cut:
    """A JSON text without its long strings."""

    __slots__ = ("strings", "text")

    def __init__(self, text: bytes, strings: list[memoryview]) -> None:
        self.text = text
        self.strings = strings

    def whole(self, part: bytes) -> list[bytes | memoryview]:
        """A part of `text` as it was, in pieces."""
        first, *marked = part.split(_MARK)
        pieces: list[bytes | memoryview] = [first]
        for piece in marked:
            pieces.append(self.strings[int(piece[:_INDEX_DIGITS])])
            pieces.append(piece[_INDEX_DIGITS:])
        return pieces


def is_marked(value: str | None) -> bool:
    """Whether the value was taken out of the text."""
    return value is not None and _MARK_TEXT in value


def cut(body: bytes, *, least_text: int = LEAST_TEXT_BYTES, long: int = LONG_BYTES) -> Cut | None:
    """The text without strings of at least `long` bytes; None where that does not pay, or where a string does not end."""
    size = len(body)
    if size < least_text:
        return None
    pieces: list[bytes] = []
    strings: list[memoryview] = []
    view = memoryview(body)
    kept_to = at = hops = 0
    while True:
        start = body.find(b'"', at) + 1
        if not start:
            break
        end = start - 1
        while True:
            end = body.find(b'"', end + 1)
            hops += 1
            if end < 0 or (hops - HOPS_AHEAD) * BYTES_PER_HOP > end:
                return None
            back = end
            while body[back - 1] == _BACKSLASH:  # ends at the opening quote at the latest
                back -= 1
            if (end - back) % 2 == 0:
                break
        if end - start >= long:
            pieces.append(body[kept_to:start])
            pieces.append(_MARK + b"%06d" % len(strings))
            strings.append(view[start:end])
            kept_to = end
        at = end + 1
    if not strings:
        return None
    pieces.append(body[kept_to:])
    return Cut(b"".join(pieces), strings)
