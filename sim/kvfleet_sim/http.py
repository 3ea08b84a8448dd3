"""HTTP/1.1 for the simulated server: asyncio protocol, parsed by httptools, behaving as uvicorn under vLLM does.

A connection reads one request at a time into an `Exchange` and hands it to the application, a plain function; the answer is
written whenever the application has it, at once or from a timer. Requests that were pipelined wait. What is written while
the peer does not read is the application's concern: `Exchange.writable` tells, and streams are merged, not queued.

Bounds: head and body sizes; an idle connection is closed after `KEEP_ALIVE_S`, as uvicorn does.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, cast
from urllib.parse import unquote

import httptools
import orjson

KEEP_ALIVE_S: Final = 5.0
MAX_HEAD_BYTES: Final = 256 * 1024
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
MAX_PIPELINED: Final = 16

_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_JSON: Final = b"application/json"
_TEXT: Final = b"text/plain; charset=utf-8"
_EVENTS: Final = b"text/event-stream; charset=utf-8"

Header = tuple[bytes, bytes]
Application = Callable[["Exchange"], None]


class Exchange:
    """One request and its answer. `on_close` is called if the connection ends before the answer does."""

    __slots__ = (
        "_chunked",
        "_connection",
        "body",
        "close_after",
        "extra_headers",
        "finished",
        "headers",
        "method",
        "on_close",
        "path",
        "query",
    )

    def __init__(self, connection: HttpConnection, method: str, target: bytes, headers: dict[bytes, bytes]) -> None:
        self._connection = connection
        self._chunked = False
        path, _, query = target.partition(b"?")
        self.method = method
        self.path = unquote(path.decode("latin-1"))
        self.query = query.decode("latin-1")
        self.headers = headers  # names in lower case
        self.body = b""
        self.close_after = False
        self.extra_headers: list[Header] = []
        self.finished = False
        self.on_close: Callable[[], None] | None = None

    @property
    def writable(self) -> bool:
        """False while the peer does not keep up with what was written."""
        return self._connection.writable

    def respond(
        self, status: int, body: bytes, content_type: bytes | None = _JSON, headers: Iterable[Header] = ()
    ) -> None:
        """The whole answer."""
        lines = [b"content-length: %d\r\n" % len(body)]
        if content_type is not None:
            lines.append(b"content-type: %b\r\n" % content_type)
        self._connection.write(self._head(status, headers, lines) + body)
        self._finish()

    def respond_json(self, status: int, value: object, headers: Iterable[Header] = ()) -> None:
        self.respond(status, orjson.dumps(value), _JSON, headers)

    def respond_text(self, status: int, text: str, content_type: bytes | None = _TEXT) -> None:
        self.respond(status, text.encode(), content_type)

    def start_events(self) -> None:
        """The head of a stream of server-sent events."""
        self._chunked = self._connection.http_1_1
        self.close_after |= not self._chunked
        framing = [b"transfer-encoding: chunked\r\n"] if self._chunked else []
        self._connection.write(self._head(200, (), [b"content-type: %b\r\n" % _EVENTS], framing))

    def send(self, *events: bytes) -> None:
        """Events of a stream, each a chunk of its own as uvicorn writes them, in one write."""
        if self._chunked:
            self._connection.write(b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events))
        else:
            self._connection.write(b"".join(events))

    def end(self) -> None:
        """The end of a stream."""
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")
        self._finish()

    def _head(
        self, status: int, headers: Iterable[Header], content: list[bytes], framing: Iterable[bytes] = ()
    ) -> bytes:
        lines = [_STATUS_LINES[status], _date_line(), b"server: uvicorn\r\n"]
        lines += [b"%b: %b\r\n" % header for header in headers]
        lines += content
        lines += [b"%b: %b\r\n" % header for header in self.extra_headers]
        if self.close_after:
            lines.append(b"connection: close\r\n")
        return b"".join([*lines, *framing, b"\r\n"])

    def _finish(self) -> None:
        self.finished = True
        self.on_close = None
        self._connection.exchange_done(self)


class HttpConnection(asyncio.Protocol):
    """One client connection. `connections` is the server's set of open ones."""

    def __init__(self, application: Application, connections: set[HttpConnection]) -> None:
        self._application = application
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._idle: asyncio.TimerHandle | None = None
        self._current: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._refused = False
        self.writable = True
        self.http_1_1 = True
        self._begin()

    def _begin(self) -> None:
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._connections.add(self)
        self._arm_idle()

    def data_received(self, data: bytes) -> None:
        self._disarm_idle()
        if self._refused:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # an upgrade nobody offers: the request was handled as a plain one
        except httptools.HttpParserError:
            if not self._refused:
                self._refuse(400, "Invalid HTTP request received.")

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        self._disarm_idle()
        self._queue.clear()
        current, self._current = self._current, None
        if current is not None and current.on_close is not None:
            current.on_close()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._begin()

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value
        self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self.http_1_1 = self._parser.get_http_version() == "1.1"
        length = self._headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            self._refuse(413, f"Request body larger than {MAX_BODY_BYTES} bytes.")
        elif self._headers.get(b"expect", b"").lower() == b"100-continue" and self._current is None:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self._refuse(413, f"Request body larger than {MAX_BODY_BYTES} bytes.")
        elif not self._refused:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        exchange = Exchange(self, self._parser.get_method().decode("latin-1"), self._target, self._headers)
        exchange.body = b"".join(self._body)
        exchange.close_after = not self._parser.should_keep_alive()
        self._begin()
        if self._current is None:
            self._handle(exchange)
        elif len(self._queue) < MAX_PIPELINED:
            self._queue.append(exchange)
            assert self._transport is not None
            self._transport.pause_reading()
        else:
            self._refuse(429, "Too many pipelined requests.")

    # the application's side

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def exchange_done(self, exchange: Exchange) -> None:
        if self._transport is None or exchange is not self._current:
            return
        self._current = None
        if exchange.close_after:
            self.close()
        elif self._queue:
            # From the event loop, so that many answered at once do not nest.
            self._loop.call_soon(self._next)
        else:
            self._arm_idle()

    @property
    def busy(self) -> bool:
        return self._current is not None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Drop the connection without a word."""
        if self._transport is not None:
            self._transport.abort()

    def _next(self) -> None:
        if self._transport is None or self._current is not None or not self._queue:
            return
        exchange = self._queue.popleft()
        if not self._queue:
            self._transport.resume_reading()
        self._handle(exchange)

    def _handle(self, exchange: Exchange) -> None:
        self._current = exchange
        self._application(exchange)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"Request head larger than {MAX_HEAD_BYTES} bytes.")

    def _refuse(self, status: int, text: str) -> None:
        """Answer a request that cannot be read, and read no more."""
        if self._refused:
            return
        self._refused = True
        self._queue.clear()
        current, self._current = self._current, None
        if current is not None:  # an answer is under way: nothing can be put in between
            if current.on_close is not None:
                current.on_close()
        else:
            body = text.encode()
            lines = [_STATUS_LINES[status], _date_line(), b"server: uvicorn\r\n", b"content-type: %b\r\n" % _TEXT]
            lines.append(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body))
            self.write(b"".join(lines) + body)
        self.close()

    def _arm_idle(self) -> None:
        self._disarm_idle()
        self._idle = self._loop.call_later(KEEP_ALIVE_S, self._idle_end)

    def _disarm_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _idle_end(self) -> None:
        if self._current is None:
            self.close()


_date_cache: tuple[int, bytes] = (0, b"")


def _date_line() -> bytes:
    global _date_cache
    now = int(time.time())
    if _date_cache[0] != now:
        _date_cache = (now, f"date: {formatdate(now, usegmt=True)}\r\n".encode())
    return _date_cache[1]
