"""Token counts out of the end of an answer: what the engine says it read, wrote and had in its cache.

Engines put `usage` last, in a complete answer as in a stream's closing chunk (`stream_options.include_usage`), so the last
few kilobytes are searched, once. Text that a model wrote cannot pose as usage: inside a JSON string its quotes are escaped.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SEARCHED_BYTES = 8192
_LONGEST_USAGE = 1024

_PROMPT = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,9})')
_OUTPUT = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,9})')
_CACHED = re.compile(rb'"cached_tokens":\s*(\d{1,9})')


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
    usage = end[start : start + _LONGEST_USAGE]
    return Usage(_number(_PROMPT, usage), _number(_OUTPUT, usage), _number(_CACHED, usage))


def _number(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    match = pattern.search(text)
    return int(match[1]) if match else None
