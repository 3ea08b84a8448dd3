"""HTTP/1.1 on the wire: status lines, complete answers, OpenAI error bodies, and which headers stay on their hop.

Pure functions on bytes. Everything the router answers by itself is built here, so that every error a client sees has the
shape OpenAI's clients expect: `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

import orjson

HeaderLines = Iterable[bytes]
"""Complete header lines, each with its CRLF."""

HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON = b"application/json"
BROKEN = "The worker failed while it answered; what came before is incomplete."
CONNECTION_CLOSE = b"connection: close\r\n"
CONNECTION_KEEP_ALIVE = b"connection: keep-alive\r\n"

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Headers that speak of one connection and are never passed on (RFC 9110, 7.6.1)."""

_STATUS_LINES = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus}

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def answer(
    status: int,
    body: bytes,
    *,
    content_type: bytes = JSON,
    headers: HeaderLines = (),
    without_body: bool = False,
) -> bytes:
    """A complete response. `without_body`: the answer to a HEAD request."""
    head = b"%bcontent-type: %b\r\ncontent-length: %d\r\n%b\r\n" % (
        status_line(status),
        content_type,
        len(body),
        b"".join(headers),
    )
    return head if without_body else head + body


def error_object(
    status: int, message: str, *, kind: str | None = None, param: str | None = None, code: str | None = None
) -> bytes:
    """OpenAI's error body. `kind` is its `type`; by default what OpenAI sends with that status."""
    default = _ERROR_TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind or default, "param": param, "code": code}
    return orjson.dumps({"error": error})


def error_event(message: str, code: str) -> bytes:
    """What ends a broken event stream: an error event and `[DONE]`, as two HTTP chunks, and the end of the chunked body."""
    return closing_event(error_object(502, message, code=code))


def closing_event(error: bytes) -> bytes:
    """The same, for an error body that is there already."""
    event = b"data: %b\n\n" % error
    return b"%x\r\n%b\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" % (len(event), event)


def header(name: bytes, value: str | int) -> bytes:
    """One line of a header that the router makes itself: `value` must hold no line breaks and no characters beyond Latin-1."""
    return b"%b: %b\r\n" % (name, str(value).encode("latin-1"))


def printable(text: str) -> bytes:
    """`text` fit for a header's value: what is not visible ASCII becomes `?`."""
    return "".join(c if "!" <= c <= "~" else "?" for c in text).encode("ascii")
