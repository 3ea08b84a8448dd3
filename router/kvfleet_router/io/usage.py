"""Token counts out of the end of an answer: what the engine says it read, wrote and had in its cache.

Engines put `usage` last, in a complete answer as in a stream's closing chunk (`stream_options.include_usage`), so the last
few kilobytes are searched, once. Text that a model wrote cannot pose as usage: inside a JSON string its quotes are escaped.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

SEARCHED_BYTES: Final = 8192
_LONGEST_USAGE: Final = 1024

_COUNT = re.compile(rb'"((?:prompt|input|completion|output|cached)_tokens)":\s*(\d{1,9})')


class Usage(NamedTuple):
    """Counts of tokens; None: not reported."""

    prompt: int | None = None
    output: int | None = None
    cached: int | None = None


NO_USAGE = Usage()


def read_usage(end: bytes) -> Usage:
    """The usage reported in `end`, the last bytes of an answer."""
    start = end.rfind(b'"usage":')
    if start < 0:
        return NO_USAGE
    counts = dict(_COUNT.findall(end, start, start + _LONGEST_USAGE))
    return Usage(
        _number(counts.get(b"prompt_tokens") or counts.get(b"input_tokens")),
        _number(counts.get(b"completion_tokens") or counts.get(b"output_tokens")),
        _number(counts.get(b"cached_tokens")),
    )


def _number(digits: bytes | None) -> int | None:
    return None if digits is None else int(digits)
