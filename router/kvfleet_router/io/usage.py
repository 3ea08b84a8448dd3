"""Token counts out of the end of an answer: what the engine says it read, wrote and had in its cache.

Engines put `usage` last, in a complete answer as in a stream's closing chunk (`stream_options.include_usage`), so the last
few kilobytes are searched, once. Text that a model wrote cannot pose as usage: inside a JSON string its quotes are escaped.
"""

from __future__ import annotations

from typing import Final, NamedTuple

SEARCHED_BYTES: Final = 8192
_LONGEST_USAGE: Final = 1024

_MOST_DIGITS: Final = 9
_SPACE: Final = 32
_ZERO: Final = 48
_NINE: Final = 57


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
    stop = min(start + _LONGEST_USAGE, len(end))
    prompt = _count(end, b'"prompt_tokens":', start, stop)
    output = _count(end, b'"completion_tokens":', start, stop)
    if prompt is None:
        prompt = _count(end, b'"input_tokens":', start, stop)
    if output is None:
        output = _count(end, b'"output_tokens":', start, stop)
    return Usage(prompt, output, _count(end, b'"cached_tokens":', start, stop))


def _count(data: bytes, name: bytes, start: int, stop: int) -> int | None:
    """The number behind the last `name`; None where there is none."""
    at = data.rfind(name, start, stop)
    if at < 0:
        return None
    at += len(name)
    while at < stop and data[at] == _SPACE:
        at += 1
    first, value = at, 0
    while at < stop and at - first < _MOST_DIGITS and _ZERO <= data[at] <= _NINE:
        value = 10 * value + data[at] - _ZERO
        at += 1
    return value if at > first else None
