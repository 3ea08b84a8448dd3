"""One request as it came from the client: its head, checked, and its body.

`Request` is itself the target of llhttp's callbacks while its head (or chunked body) is parsed. Headers that concern only
the client's connection are taken out here; the others are kept as ready-made lines, so that passing them on is one join.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import httptools

from kvfleet_router.core.ratelimit import Charge
from kvfleet_router.io import wire


class BadRequest(Exception):
    """The bytes are no request that may be served; the connection ends with this answer."""

    def __init__(self, status: int, message: str, code: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.retry_after_s = retry_after_s


_OWN = frozenset((b"host", b"content-length", b"expect", b"x-request-id")) | wire.HOP_BY_HOP
"""Headers that are not passed on as they came: the router writes its own, or none."""

_CLOSE, _KEEP_ALIVE, _CHUNKED, _CONTINUE = b"close", b"keep-alive", b"chunked", b"100-continue"


class Request:
    """See the module's text. Until `read_head` returns, nothing but the parser touches it."""

    __slots__ = (
        "body",
        "body_complete",
        "charge",
        "chunk_bytes",
        "chunks",
        "expects_continue",
        "forward",
        "head_complete",
        "headers",
        "http10",
        "keep_alive",
        "method",
        "own",
        "parser",
        "path",
        "reserved_bytes",
        "tail",
        "target",
    )

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        """Path and query, as the client wrote them."""
        self.path = ""
        """Without the query."""
        self.headers: dict[bytes, bytes] = {}
        """Lower-case names; of repeated headers the last."""
        self.forward: list[bytes] = []
        """Pieces of the header lines that are passed on: name, separator, value, line end, name, …"""
        self.own: list[tuple[bytes, bytes]] = []
        """The headers that are not."""
        self.body = b""
        self.charge: Charge | None = None
        """What its API key was charged with, where keys have limits."""
        self.http10 = False
        self.keep_alive = True
        self.expects_continue = False
        self.head_complete = False
        self.parser: httptools.HttpRequestParser | None = None
        """Set while a chunked body is to be read."""
        self.chunks: list[bytes] = []
        self.chunk_bytes = 0
        self.tail = b""
        self.body_complete = False
        self.reserved_bytes = 0
        """What this request counts in the server's budget for bodies."""

    # llhttp's callbacks

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_complete:  # a trailer of a chunked body
            return
        key = name.lower()
        if key in _OWN:
            self.own.append((key, value))
        else:
            self.forward += (name, b": ", value, b"\r\n")
        self.headers[key] = value

    def on_headers_complete(self) -> None:
        self.head_complete = True

    def on_body(self, body: bytes) -> None:
        self.chunks.append(body)
        self.chunk_bytes += len(body)

    def on_message_complete(self) -> None:
        self.body_complete = True

    # The head

    def read_head(self, head: bytes) -> int:
        """Parse and check a head (up to its empty line); returns the content length, 0 for a chunked body.

        Raises BadRequest."""
        parser = httptools.HttpRequestParser(self)
        try:
            parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            pass  # an offer that a server may ignore; CONNECT is refused as a method
        except httptools.HttpParserError as error:
            raise BadRequest(400, f"Malformed HTTP request: {error}", "malformed_request") from None
        if not self.head_complete:
            raise BadRequest(400, "Malformed HTTP request: the head does not end where it should", "malformed_request")
        self.method = parser.get_method()
        self._check_version(head[: head.find(b"\r\n")])
        chunked, length = self._check_own_headers()
        self._set_path()
        if chunked:
            self.parser = parser
        return length

    def _check_version(self, line: bytes) -> None:
        version = line[-9:]
        if version == b" HTTP/1.1":
            return
        if version != b" HTTP/1.0":
            raise BadRequest(505, "This router speaks HTTP/1.1 and HTTP/1.0.", "http_version_not_supported")
        self.http10 = True
        self.keep_alive = False

    def _check_own_headers(self) -> tuple[bool, int]:
        """What llhttp leaves to its user. Returns (chunked, content length)."""
        hosts = length = 0
        chunked = False
        for key, value in self.own:
            if key == b"host":
                hosts += 1
            elif key == b"content-length":
                length = int(value)
            elif key == b"connection":
                self._read_connection(value)
            elif key == b"transfer-encoding":
                if value.strip().lower() != _CHUNKED or self.http10:
                    raise BadRequest(
                        501, "Of the transfer encodings this router takes `chunked` alone.", "bad_encoding"
                    )
                chunked = True
            elif key == b"expect":
                if value.strip().lower() != _CONTINUE:
                    raise BadRequest(417, "Of the expectations this router meets `100-continue` alone.", "bad_expect")
                self.expects_continue = not self.http10
        if hosts != 1 and not (self.http10 and not hosts):
            raise BadRequest(400, "Malformed HTTP request: send one Host header", "malformed_request")
        return chunked, length

    def _read_connection(self, value: bytes) -> None:
        value = value.lower()
        if value == _KEEP_ALIVE:
            self.keep_alive = True
        elif value == _CLOSE:
            self.keep_alive = False
        else:
            tokens = {token.strip() for token in value.split(b",")}
            if _CLOSE in tokens:
                self.keep_alive = False
            elif _KEEP_ALIVE in tokens:
                self.keep_alive = True
            self.drop(tokens)

    def drop(self, names: set[bytes]) -> None:
        """Take headers (lower-case names) out of those passed on."""
        lines = [self.forward[i : i + 4] for i in range(0, len(self.forward), 4)]
        self.forward = [piece for line in lines if line[0].lower() not in names for piece in line]

    def _set_path(self) -> None:
        target = self.target
        if target[:1] != b"/":
            self.target = target = _origin_form(self.method, target)
        if b"#" in target:
            raise BadRequest(400, "Malformed HTTP request: a fragment in the request target", "malformed_request")
        path = target.partition(b"?")[0] if b"?" in target else target
        self.path = path.decode("ascii")

    def again(self, length: bytes) -> Request:
        """A request with the same head but for its content length."""
        other = Request()
        other.method = self.method
        other.target = self.target
        other.path = self.path
        other.headers = self.headers.copy()
        other.headers[b"content-length"] = length
        other.forward = self.forward
        other.http10 = self.http10
        other.keep_alive = self.keep_alive
        other.head_complete = True
        return other

    # A chunked body

    def feed_chunks(self, data: bytes) -> bytes:
        """Read on; returns what follows the body. Raises BadRequest.

        llhttp does not say where a message ended; but a chunked body always ends with an empty line, so it is fed up to
        each empty line and asked. `tail` is for one that straddles two reads."""
        parser = self.parser
        assert parser is not None
        joined, fed = self.tail + data, len(self.tail)
        search = 0
        try:
            while not self.body_complete and fed < len(joined):
                found = joined.find(wire.HEAD_END, search)
                end = len(joined) if found < 0 else found + 4
                parser.feed_data(joined[fed:end])
                fed, search = end, end - 3
        except httptools.HttpParserError as error:
            raise BadRequest(400, f"The chunked body is malformed: {error}", "invalid_chunked_body") from None
        self.tail = joined[-3:]
        if self.body_complete:
            self.parser = None
            self.body = b"".join(self.chunks)
            self.chunks = []
        return joined[fed:]


def _origin_form(method: bytes, target: bytes) -> bytes:
    """The path and query of an absolute-form target; `*` and CONNECT's authority stay as they are, and match no route."""
    if method == b"CONNECT" or b"://" not in target:
        return b"/" + target
    try:
        parts = urlsplit(target)
    except ValueError as error:
        raise BadRequest(400, f"Malformed HTTP request: {error}", "malformed_request") from None
    return (parts.path or b"/") + (b"?" + parts.query if parts.query else b"")
