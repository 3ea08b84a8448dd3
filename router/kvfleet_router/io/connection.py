"""One client connection: bytes in, whole requests to the server's handler, one answer at a time out.

A connection is in one of five states:

    HEAD       waiting for, or inside, a request's head
    BODY       inside its body (content-length or chunked)
    ANSWERING  the handler has the request; further bytes wait in `buffer` (pipelining), answers stay in order
    LINGERING  the last answer is written; what still comes is discarded until the client closes or time is up
    CLOSED     the client is gone, or was sent away

The end of a head is found here; its grammar is `Request.read_head`'s, and where it is the last one again but for its length,
comparing it is enough. Every head gets a parser of its own, which never sees
the body: its length is plain arithmetic, so that a request can neither leak into the next one nor cost a copy. Only chunked
bodies go on through the parser. Bodies are read whole, within limits: routing needs them.

Time is limited by `sweep`, which compares one deadline per connection a few times a second, so that nothing is armed and
cancelled for each request.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol, cast

from kvfleet_router.io import wire
from kvfleet_router.io.request import BadRequest, Request
from kvfleet_router.io.templates import MAX_HEAD_MISSES, HeadTemplate

if TYPE_CHECKING:
    from kvfleet_router.io.server import Server

log = logging.getLogger("kvfleet.router")

HEAD, BODY, ANSWERING, LINGERING, CLOSED = range(5)

IDLE_TIMEOUT_S = 75.0
"""A kept-alive connection without a request."""
HEAD_TIMEOUT_S = 15.0
"""From the first byte of a head to its end."""
BODY_TIMEOUT_S = 30.0
"""For a body, and on top of it the time it takes at SLOWEST_BODY_BYTES_PER_S."""
SLOWEST_BODY_BYTES_PER_S = 32_768
WRITE_STALL_TIMEOUT_S = 60.0
"""A client that reads nothing for so long while its answer waits is gone."""
LINGER_S = 2.0
MAX_PIPELINED_BYTES = 262_144
"""What may wait behind a request that is being answered before the connection is read no further."""
MAX_BUFFERED_BODY_BYTES = 1 << 30
"""All bodies being read or waiting for a worker's first byte, together: more is refused with 503."""
_FOREVER = float("inf")


class Answer(Protocol):
    """Who answers the request at hand, told what happens to the client meanwhile."""

    def client_gone(self) -> None: ...
    def client_paused(self) -> None: ...
    def client_resumed(self) -> None: ...
    def sweep(self, now: float) -> None: ...


class Waiting:
    """The Answer of a connection whose answer is being asked for elsewhere, within a time limit."""

    gone = False

    def client_gone(self) -> None:
        self.gone = True

    def client_paused(self) -> None:
        """Nothing is being written."""

    def client_resumed(self) -> None:
        """Nothing was paused."""

    def sweep(self, now: float) -> None:
        """Asking has a time limit of its own."""


class ClientConnection:
    """One client connection; see the module's text. An asyncio.Protocol in all but name: mypyc compiles no subclasses."""

    __slots__ = (
        "answer",
        "buffer",
        "deadline",
        "missing",
        "parts",
        "reading_paused",
        "request",
        "server",
        "state",
        "template",
        "template_misses",
        "transport",
        "working",
        "write_paused",
    )

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server = server
        self.state = HEAD
        self.deadline = server.now + IDLE_TIMEOUT_S
        self.buffer = bytearray()
        self.request = Request()
        self.template: HeadTemplate | None = None
        self.template_misses = 0
        self.parts: list[bytes] = []
        self.missing = 0
        """Bytes of the body still to come."""
        self.answer: Answer | None = None
        self.working = False
        """Inside `_work`: an answer that ends at once must not start it again."""
        self.write_paused = False
        self.reading_paused = False

    # The transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        server = self.server
        server.opened(self)
        if len(server.connections) > server.limits.max_connections:
            message = "The router has as many connections as it may hold: try again."
            self._refuse(503, message, "too_many_connections", retry_after_s=1)
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.state == ANSWERING:
            self.buffer += data
            if len(self.buffer) > MAX_PIPELINED_BYTES:
                self._pause_reading()
        elif self.buffer:
            self.buffer += data
            data = bytes(self.buffer)
            self.buffer.clear()
            self._work(data)
        else:
            self._work(data)

    def eof_received(self) -> bool:
        """A client that ends its side is gone, as for most servers: half-closed connections are not served."""
        self._gone()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone()
        self.server.closed(self)

    def pause_writing(self) -> None:
        self.write_paused = True
        self.deadline = self.server.now + WRITE_STALL_TIMEOUT_S
        if self.answer is not None:
            self.answer.client_paused()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.answer is not None:
            self.deadline = _FOREVER
            self.answer.client_resumed()
        elif self.state == HEAD:
            self._rest()
            self._next()

    # The handler calls

    def reply(
        self,
        status: int,
        body: bytes,
        *,
        content_type: bytes = wire.JSON,
        headers: wire.HeaderLines = (),
    ) -> None:
        """A complete answer to the request at hand."""
        request = self.request
        keep_alive = request.keep_alive and not self.server.draining
        connection = self.connection_header(keep_alive)
        data = wire.answer(
            status,
            body,
            content_type=content_type,
            headers=(*headers, connection) if connection else headers,
            without_body=request.method == b"HEAD",
        )
        self.transport.write(data)
        self.answered(keep_alive)

    def connection_header(self, keep_alive: bool) -> bytes:
        """The `connection` header line that tells the client; empty where it need not be told."""
        if not keep_alive:
            return wire.CONNECTION_CLOSE
        return wire.CONNECTION_KEEP_ALIVE if self.request.http10 else b""

    def answered(self, keep_alive: bool) -> None:
        """The answer is written to its end."""
        self.answer = None
        self.release_body()
        if self.state != ANSWERING:
            return
        if not keep_alive or self.server.draining:
            self._end()
            return
        self.state = HEAD
        self._rest()
        if not self.working:
            self._next()

    def release_body(self) -> None:
        """The request's body is needed no more."""
        self.server.body_bytes -= self.request.reserved_bytes
        self.request.reserved_bytes = 0
        self.request.body = b""

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        self._gone()
        self.transport.abort()

    def close_if_idle(self) -> None:
        if self.state == HEAD and not self.buffer:
            self._gone()
            self.transport.close()

    def sweep(self, now: float) -> None:
        """Time limits; called a few times a second."""
        answer = self.answer
        if answer is not None:
            answer.sweep(now)
        if now < self.deadline:
            return
        if self.state == LINGERING or self.write_paused:
            self.abort()
        elif self.state == BODY or self.buffer:
            self._refuse(408, "The request took too long to arrive: send it faster.", "request_timeout")
        else:
            self._gone()
            self.transport.close()

    # Reading requests

    def _next(self) -> None:
        """Go on with what waited behind the last request."""
        if self.write_paused:
            return
        if self.buffer:
            data = bytes(self.buffer)
            self.buffer.clear()
            self._work(data)
        if self.reading_paused and len(self.buffer) <= MAX_PIPELINED_BYTES:
            self.reading_paused = False
            self.transport.resume_reading()

    def _work(self, data: bytes) -> None:
        """Consume `data`: as many requests as can be answered now; the rest goes to `buffer`."""
        self.working = True
        try:
            while data:
                if self.state == HEAD:
                    data = self._read_head(data)
                elif self.state == BODY:
                    data = self._read_body(data)
                else:
                    if self.state == ANSWERING:
                        self.buffer += data
                    return
                if self.write_paused and self.state == HEAD:
                    self.buffer += data
                    self._pause_reading()
                    return
        except BadRequest as error:
            self._refuse(error.status, error.message, error.code, retry_after_s=error.retry_after_s)
        finally:
            self.working = False

    def _read_head(self, data: bytes) -> bytes:
        limit = self.server.max_header_bytes
        known = None if self.template is None else self.template.read(data)
        if known is not None and known[2] <= limit:
            self.template_misses = 0
            self.request = known[0]
            return self._take_head(known[1], data, known[2])
        if data[0] in b"\r\n":
            data = data.lstrip(b"\r\n")
        end = data.find(wire.HEAD_END) + 4
        if end > limit or (end < 4 and len(data) > limit):
            raise BadRequest(431, f"The request's head is larger than {limit} bytes.", "headers_too_large")
        if end < 4:
            if not self.buffer and self.deadline > self.server.now + HEAD_TIMEOUT_S:
                self.deadline = self.server.now + HEAD_TIMEOUT_S
            self.buffer += data
            return b""
        self.request = request = Request()
        head = data[:end]
        length = request.read_head(head)
        if self.template_misses < MAX_HEAD_MISSES:
            self.template_misses += 1
            self.template = HeadTemplate.of(head, request)
        return self._take_head(length, data, end)

    def _take_head(self, length: int, data: bytes, end: int) -> bytes:
        """The head of `self.request` was read, the first `end` bytes of `data`; returns what follows this request."""
        request = self.request
        self._admit(request, length, len(data) > end)
        if request.parser is None:
            whole = end + length
            if len(data) == whole:
                request.body = data[end:]
                self._dispatch()
                return b""
            if len(data) > whole:
                request.body = data[end:whole]
                self._dispatch()
                return data[whole:]
        self.state = BODY
        self.missing = length
        return data[end:]

    def _admit(self, request: Request, length: int, body_came: bool) -> None:
        """Before the body is read: whether it may come, and how long it may take."""
        server = self.server
        chunked = request.parser is not None
        limit = server.max_body_bytes
        if length > limit:
            raise BadRequest(
                413,
                f"The body has {length} bytes; this router takes {limit}: send less or raise the router's limit.",
                "request_too_large",
            )
        if not length and not chunked:
            return
        self._reserve(request, length)
        self.deadline = server.now + BODY_TIMEOUT_S + (limit if chunked else length) / SLOWEST_BODY_BYTES_PER_S
        if request.expects_continue and not body_came:
            self.transport.write(wire.CONTINUE)

    def _read_body(self, data: bytes) -> bytes:
        request = self.request
        if request.parser is not None:
            return self._read_chunks(request, data)
        missing = self.missing
        if len(data) < missing:
            self.parts.append(data)
            self.missing = missing - len(data)
            return b""
        rest = data[missing:]
        self.parts.append(data[:missing] if rest else data)
        request.body = b"".join(self.parts)
        self.parts = []
        self._dispatch()
        return rest

    def _read_chunks(self, request: Request, data: bytes) -> bytes:
        rest = request.feed_chunks(data)
        size, limit = request.chunk_bytes, self.server.max_body_bytes
        if size > limit:
            raise BadRequest(413, f"The body has more than {limit} bytes: send less.", "request_too_large")
        self._reserve(request, size - request.reserved_bytes)
        if request.parser is None:
            self._dispatch()
        return rest

    def _reserve(self, request: Request, count: int) -> None:
        """Take `count` bytes from the budget of all bodies, for as long as the router holds this one."""
        server = self.server
        if server.body_bytes + count > MAX_BUFFERED_BODY_BYTES:
            raise BadRequest(503, "The router holds as many request bodies as it may: try again.", "overloaded", 1)
        server.body_bytes += count
        request.reserved_bytes += count

    def _dispatch(self) -> None:
        self.state = ANSWERING
        self.deadline = _FOREVER
        try:
            self.server.handler.handle(self.request, self)
        except Exception:
            log.exception("a request's handler failed; the client gets a 500")
            if self.state == ANSWERING:
                self._refuse(500, "The router failed to handle this request: see its log.", "internal_error")

    # Ends

    def _refuse(self, status: int, message: str, code: str, *, retry_after_s: int | None = None) -> None:
        """Answer what is no proper request, and end the connection: where the next one begins is not known."""
        self.server.refuse(code)
        headers = [wire.CONNECTION_CLOSE]
        if retry_after_s is not None:
            headers.append(wire.header(b"retry-after", retry_after_s))
        body = wire.error_object(status, message, code=code)
        self.transport.write(wire.answer(status, body, headers=headers, without_body=self.request.method == b"HEAD"))
        self._drop_request()
        self._linger()

    def _end(self) -> None:
        """Close after the last answer."""
        if self.buffer:
            self._linger()
            return
        self.state = LINGERING
        self.deadline = self.server.now + WRITE_STALL_TIMEOUT_S
        self.transport.close()

    def _linger(self) -> None:
        """End our side, but read on for a moment: closing with bytes unread would reset the connection and lose the answer."""
        self.state = LINGERING
        self.buffer.clear()
        unsent = self.transport.get_write_buffer_size()
        self.deadline = self.server.now + (WRITE_STALL_TIMEOUT_S if unsent else LINGER_S)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:  # TLS has no half-closed state
            self.transport.close()
        if self.reading_paused:
            self.reading_paused = False
            self.transport.resume_reading()

    def _drop_request(self) -> None:
        """Forget the request at hand and whoever answers it."""
        self.parts = []
        self.release_body()
        answer, self.answer = self.answer, None
        if answer is not None:
            answer.client_gone()

    def _gone(self) -> None:
        if self.state == CLOSED:
            return
        self.state = CLOSED
        self.deadline = _FOREVER
        self.buffer.clear()
        self._drop_request()

    def _rest(self) -> None:
        self.deadline = self.server.now + IDLE_TIMEOUT_S

    def _pause_reading(self) -> None:
        if not self.reading_paused:
            self.reading_paused = True
            self.transport.pause_reading()
