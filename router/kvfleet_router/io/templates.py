"""Heads read by comparison. Peers repeat their heads but for the content length, message after message: what llhttp accepted
once, it would accept again with other digits in that place. So a head that is the last one again costs a comparison.

A template is made of a head that was parsed, and only of one with a plain content length; anything else is parsed each time.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvfleet_router.io.request import Request
    from kvfleet_router.io.upstream import UpstreamConnection

MAX_HEAD_MISSES: Final = 4
"""Heads of requests in a row unlike the one before, after which a connection's are compared no more."""
MAX_ANSWER_MISSES: Final = 16
"""The same for the answers of a worker."""
MAX_TEMPLATE_BYTES: Final = 4096
"""Longer heads are not kept for comparison."""

_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})\r\n", re.IGNORECASE)
_MOST_DIGITS: Final = 9


class HeadTemplate:
    """The last head of a connection. Clients repeat their heads but for the content length, so the next one is most likely
    read by comparing it: what llhttp accepted once it would accept again with other digits in that place."""

    __slots__ = ("_after", "_before", "_request")

    def __init__(self, before: bytes, after: bytes, request: Request) -> None:
        self._before = before
        self._after = after
        self._request = request

    @staticmethod
    def of(head: bytes, request: Request) -> HeadTemplate | None:
        """The template of a head that was read; none where it has no plain content length, or is better read each time."""
        if request.parser is not None or request.expects_continue or len(head) > MAX_TEMPLATE_BYTES:
            return None
        split = _split_at_length(head)
        return None if split is None else HeadTemplate(split[0], split[1], request.again(b""))

    def read(self, data: bytes) -> tuple[Request, int, int] | None:
        """(request, content length, bytes of the head) if `data` begins with such a head."""
        digits = _digits_between(self._before, self._after, data)
        if not digits:
            return None
        size = len(self._before) + len(digits) + len(self._after)
        return self._request.again(digits), int(digits), size


class AnswerTemplate:
    """A worker's last head of an answer with a length. Workers repeat them but for that length, so the next one is most likely
    read by comparing it: what llhttp accepted once it would accept again with other digits in that place."""

    __slots__ = ("_after", "_before", "_close", "_event_stream", "_lines", "_status")

    def __init__(self, before: bytes, after: bytes, connection: UpstreamConnection) -> None:
        at = connection.lines.index(b"content-length") + 2
        self._before = before
        self._after = after
        self._lines = (b"".join(connection.lines[:at]), b"".join(connection.lines[at + 1 :]))
        self._status = connection.status
        self._event_stream = connection.event_stream
        self._close = connection.close

    @staticmethod
    def of(connection: UpstreamConnection) -> AnswerTemplate | None:
        split = _split_at_length(b"".join(connection.held)[: connection.head_bytes])
        return None if split is None else AnswerTemplate(split[0], split[1], connection)

    def read(self, connection: UpstreamConnection, data: bytes) -> bool:
        """Take the head and the body's length into the connection, if `data` begins with such a head and holds no more than
        one answer."""
        digits = _digits_between(self._before, self._after, data)
        if not digits:
            return False
        length, head_bytes = int(digits), len(self._before) + len(digits) + len(self._after)
        if len(data) > head_bytes + length:
            return False
        connection.origin.template_misses = 0
        connection.head_complete = True
        connection.head_bytes = head_bytes
        connection.body_length = connection.missing = length
        connection.status = self._status
        connection.event_stream = self._event_stream
        connection.close = self._close
        connection.lines = [self._lines[0], digits, self._lines[1]]
        return True


def _split_at_length(head: bytes) -> tuple[bytes, bytes] | None:
    """What stands before and after the digits of a head's content length."""
    found = _LENGTH_LINE.search(head)
    return None if found is None else (head[: found.start(1)], head[found.end(1) :])


def _digits_between(before: bytes, after: bytes, data: bytes) -> bytes:
    """The digits of the content length if `data` begins with such a head, else nothing."""
    if not data.startswith(before):
        return b""
    start = len(before)
    stop = data.find(b"\r", start, start + _MOST_DIGITS + 1)
    if stop < 0 or not data.startswith(after, stop):
        return b""
    digits = data[start:stop]
    return digits if digits.isdigit() else b""
