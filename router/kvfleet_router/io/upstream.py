"""The worker side: kept-alive connections, and one answer at a time passed through them.

    Upstreams           every Origin by worker name; sweeps idle connections
    Origin              one worker's address and its idle connections, the freshest last
    UpstreamConnection  one connection: writes a request, finds the head, the first body byte and the end of the answer

The bytes of an answer travel to the client as they came. llhttp runs beside them and only finds where things are: nothing
is copied out of it, and per piece received there is one parse, one write and one reference kept for the usage at the end.
What is plain to see it is not even shown: heads like the last one, bodies by their length, chunks that came whole.
Until `Exchange` says go (`release`), what came is held back, so that a worker that fails before its first byte can still
be replaced by another.

Engines close idle connections after five seconds (vLLM's default), so ours are given up a little earlier; the race that
remains is the caller's to retry (`reused`, and no byte came).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

import httptools

from kvfleet_router.io import wire
from kvfleet_router.io.sockets import limit_unacknowledged, probe_silent_peer
from kvfleet_router.io.templates import MAX_ANSWER_MISSES, AnswerTemplate
from kvfleet_router.io.tls import WorkerTrust, WorkerTrusts

if TYPE_CHECKING:
    from kvfleet_router.core.ticket import Ticket
    from kvfleet_router.core.worker import Worker

IDLE_KEEP_S = 4.0
"""Below vLLM's 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)."""
MAX_IDLE = 512
"""Idle connections kept for one worker."""
MAX_HEAD_BYTES = 65_536
TAIL_PIECES = 4
"""Last pieces of an answer kept for its usage: the usage chunk, `[DONE]`, the end of the body, and one to spare."""

JOIN_BYTES = 16_384
"""Larger bodies are written beside their head: copying them would cost more than the second buffer does."""
CHUNKED_END = b"\r\n0\r\n\r\n"
_CHUNK_SIZES = {b"%x" % size: size for size in range(1, 4096)}
SCRAP_BYTES, MAX_SCRAPS_BYTES = 64, 4096
"""Pieces below the first are joined in the tail, up to the second."""

_DROPPED = wire.HOP_BY_HOP - {b"transfer-encoding"} | {b"x-request-id"}
"""Headers of an answer that are not passed on; the framing is, as are the bytes it frames."""


class Receiver(Protocol):
    """Who asked: told of the three moments of an answer."""

    def answer_began(self) -> None:
        """The head is known and a body byte came (or the answer ended without one)."""

    def answer_complete(self) -> None: ...

    def answer_lost(self, cause: str) -> None:
        """The connection ended or sent what is no HTTP before the answer was complete."""


class Upstreams:
    """The connections to all workers."""

    def __init__(self, trusts: WorkerTrusts | None = None) -> None:
        self.now = time.monotonic()
        self.trusts = trusts or WorkerTrusts(WorkerTrust())
        """For workers with https addresses."""
        self._origins: dict[str, Origin] = {}

    def origin(self, worker: Worker) -> Origin:
        origin = self._origins.get(worker.name)
        if origin is None or origin.url != worker.url:
            if origin is not None:
                origin.close_idle()
            origin = self._origins[worker.name] = Origin(self, worker)
        return origin

    def keep_only(self, names: set[str]) -> None:
        """Forget workers that left the fleet; answers under way go on."""
        for name in self._origins.keys() - names:
            self._origins.pop(name).close_idle()

    def sweep(self, now: float) -> None:
        self.now = now
        for origin in self._origins.values():
            origin.close_idle(now - IDLE_KEEP_S)

    def close(self) -> None:
        for origin in self._origins.values():
            origin.close_idle()
        self._origins.clear()


class Origin:
    """One worker's address and idle connections."""

    __slots__ = (
        "answer_header",
        "host",
        "host_header",
        "idle",
        "name",
        "pool",
        "port",
        "template",
        "template_misses",
        "tls",
        "upstreams",
        "url",
    )

    def __init__(self, upstreams: Upstreams, worker: Worker) -> None:
        parts = urlsplit(worker.url)
        self.upstreams = upstreams
        self.name = worker.name
        self.pool = worker.pool
        self.url = worker.url
        self.host = parts.hostname or ""
        self.tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self.host_header = b" HTTP/1.1\r\nhost: %b\r\ncontent-length: " % parts.netloc.encode("latin-1")
        self.answer_header = b"\r\nx-kvfleet-worker: %b\r\nx-kvfleet-decision: " % wire.printable(worker.name)
        self.idle: list[UpstreamConnection] = []
        self.template: AnswerTemplate | None = None
        self.template_misses = 0

    def learn_head(self, connection: UpstreamConnection) -> None:
        """An answer's head was parsed: the next ones will most likely be like it. Servers write the date: once a second it is new."""
        if connection.body_length is None or connection.interim or connection.status in (204, 304):
            return
        if self.template_misses < MAX_ANSWER_MISSES:
            self.template_misses += 1
            self.template = AnswerTemplate.of(connection)

    def take_idle(self) -> UpstreamConnection | None:
        """The freshest idle connection, unless even that one is too old to trust."""
        while self.idle:
            connection = self.idle.pop()
            if connection.usable(self.upstreams.now):
                return connection
            connection.transport.abort()
        return None

    async def connect(self) -> UpstreamConnection:
        """A new connection. Raises OSError, and ValueError where the address or the certificates cannot be used."""
        loop = asyncio.get_running_loop()
        connection = UpstreamConnection(self)
        trust = self.upstreams.trusts.of(self.pool)
        await loop.create_connection(
            lambda: cast(asyncio.Protocol, connection),
            self.host,
            self.port,
            ssl=trust.context if self.tls else None,
            server_hostname=(trust.server_name or self.host) if self.tls else None,
        )
        return connection

    def keep(self, connection: UpstreamConnection) -> None:
        if len(self.idle) < MAX_IDLE:
            connection.idle_since = self.upstreams.now
            self.idle.append(connection)
        else:
            connection.transport.abort()

    def forget(self, connection: UpstreamConnection) -> None:
        """The worker closed an idle connection."""
        if connection in self.idle:
            self.idle.remove(connection)

    def close_idle(self, idle_since_before: float = float("inf")) -> None:
        """Close what has been idle too long: the oldest come first."""
        while self.idle and self.idle[0].idle_since < idle_since_before:
            self.idle.pop(0).transport.abort()


class UpstreamConnection:
    """One connection to a worker; at rest `receiver` is None. An asyncio.Protocol in all but name: mypyc compiles no subclasses."""

    __slots__ = (
        "between_chunks",
        "body_length",
        "chunk_ended",
        "chunked",
        "clean",
        "close",
        "complete",
        "event_stream",
        "forward",
        "head_bytes",
        "head_complete",
        "held",
        "held_bytes",
        "idle_since",
        "interim",
        "lines",
        "missing",
        "origin",
        "parser",
        "received",
        "receiver",
        "reused",
        "status",
        "tail",
        "ticket",
        "transport",
        "until_close",
    )

    transport: asyncio.Transport
    ticket: Ticket

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.parser = httptools.HttpResponseParser(self)
        self.receiver: Receiver | None = None
        self.reused = False
        """It has served an answer before."""
        self.idle_since = 0.0
        self.tail: deque[bytes] = deque(maxlen=TAIL_PIECES)
        self.close = False
        """The worker will close it."""
        self._reset()

    def _reset(self) -> None:
        self.forward: Callable[[bytes], object] | None = None
        self.received = 0
        self.interim = 0
        """Interim answers (1xx) before the answer's head."""
        self.head_complete = False
        self.complete = False
        self.clean = False
        """Complete, and nothing followed it."""
        self.status = 0
        self.lines: list[bytes] = []
        """The header lines to pass on, in pieces: name, separator, value, line end, name, …"""
        self.chunked = self.event_stream = self.until_close = False
        self.body_length: int | None = None
        self.head_bytes = 0
        self.held: list[bytes] = []
        self.held_bytes = 0
        self.missing = -1
        """Bytes of the body still to come, where the head is known by comparison; else negative."""
        self.chunk_ended = self.between_chunks = False
        """The last thing llhttp saw was a chunk's end; nothing came since."""

    # The owner calls

    def usable(self, now: float) -> bool:
        return not self.transport.is_closing() and now - self.idle_since < IDLE_KEEP_S

    def send(self, receiver: Receiver, ticket: Ticket, head: bytes, body: bytes) -> None:
        self.receiver = receiver
        self.ticket = ticket
        if len(body) < JOIN_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    def held_body(self) -> bytes:
        """The body bytes held back so far, with their framing."""
        return b"".join(self.held)[self.head_bytes :]

    def release(self, forward: Callable[[bytes], object], head: bytes) -> None:
        """From now on everything goes to `forward`, beginning with `head` and the body bytes held back."""
        self.forward = forward
        forward(head + self.held_body())
        self.held = []

    def detach(self) -> None:
        """The answer is complete: keep the connection for the next request, or close it."""
        self.receiver = None
        self.tail.clear()
        if self.close or not self.clean:
            self.forward = None
            self.transport.abort()
            return
        self._reset()
        self.reused = True
        self.origin.keep(self)

    def abort(self) -> None:
        """Give the answer up: the worker notices, and stops computing it."""
        self.receiver = None
        self.forward = None
        self.transport.abort()

    # The transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        sock = self.transport.get_extra_info("socket")
        probe_silent_peer(sock)
        limit_unacknowledged(sock)

    def data_received(self, data: bytes) -> None:
        if self.receiver is None:
            self.transport.abort()
            return
        size = len(data)
        self.received += size
        if size < SCRAP_BYTES:
            self._keep_scrap(data)
        else:
            self.tail.append(data)
        if self.between_chunks and _is_one_chunk(data, size):
            self.ticket.chunks += 1
        elif self.missing >= 0 or self._knows_head(data, size):
            if not self._counted(size):
                return
        elif not self._parsed(data):
            return
        if self.forward is None:
            self._hold(self.receiver, data)
            return
        self.forward(data)
        if self.complete:
            self._completed(self.receiver)

    def _knows_head(self, data: bytes, size: int) -> bool:
        """Whether the answer begins as the worker's last one did: then its body is counted, and needs no parser."""
        template = self.origin.template
        return template is not None and self.received == size and template.read(self, data)

    def _counted(self, size: int) -> bool:
        """Whether the body goes on as its head said; else the connection was given up."""
        self.missing -= size if self.received > size else size - self.head_bytes
        self.complete = not self.missing
        if self.missing < 0:
            self._lost("bad_response: bytes follow the answer")
        return self.missing >= 0

    def _parsed(self, data: bytes) -> bool:
        """Whether llhttp took the bytes; else the connection was given up."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lost(f"bad_response: {error}")
            return False
        except httptools.HttpParserUpgrade:
            self._lost("bad_response: an unasked change of protocol")
            return False
        self.between_chunks = self.chunk_ended and data.endswith(b"\r\n")
        return True

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        receiver = self.receiver
        if receiver is None:
            self.origin.forget(self)
        elif self.until_close and exc is None:
            self.complete = True
            self._completed(receiver)
        else:
            self._lost("worker_closed" if exc is None else "worker_reset")

    def _keep_scrap(self, data: bytes) -> None:
        """Small pieces are joined, so that the tail reaches back far enough however the network cuts."""
        tail = self.tail
        if tail and len(tail[-1]) < MAX_SCRAPS_BYTES:
            tail[-1] += data
        else:
            tail.append(data)

    def _hold(self, receiver: Receiver, data: bytes) -> None:
        """Keep what came until the receiver knows what to do with the answer."""
        self.held.append(data)
        self.held_bytes += len(data)
        if not self.head_complete:
            if self.held_bytes > MAX_HEAD_BYTES:
                self._lost("bad_response: the head is too large")
            return
        if not self.head_bytes:
            self._find_body()
            self.origin.learn_head(self)
        if self.complete:
            self._completed(receiver)
        elif self.held_bytes > self.head_bytes:
            receiver.answer_began()

    def _find_body(self) -> None:
        """Where the body begins: after the head, and after those of interim answers."""
        data = b"".join(self.held)
        for _ in range(self.interim + 1):
            self.head_bytes = data.find(wire.HEAD_END, self.head_bytes) + 4

    def _completed(self, receiver: Receiver) -> None:
        if self.body_length is not None:
            self.clean = self.received == self.head_bytes + self.body_length
        elif self.chunked:
            self.clean = b"".join(self.tail).endswith(CHUNKED_END)
        else:
            self.clean = self.received == self.head_bytes and not self.until_close
        receiver.answer_complete()

    def _lost(self, cause: str) -> None:
        receiver, self.receiver = self.receiver, None
        self.transport.abort()
        if receiver is not None:
            receiver.answer_lost(cause)

    # llhttp calls

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("bytes follow the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_complete:  # a trailer: it travels in the chunked body
            return
        key = name.lower()
        if key not in _DROPPED:
            self.lines += (key, b": ", value, b"\r\n")
        if key == b"content-length":
            self.body_length = int(value)
        elif key == b"transfer-encoding":
            if value.strip().lower() != b"chunked":
                raise ValueError("of the transfer encodings only chunked can be passed on")
            self.chunked = True
        elif key == b"content-type":
            self.event_stream = value.startswith(b"text/event-stream")
        elif key == b"connection":
            self.close = b"close" in value.lower()

    def on_headers_complete(self) -> None:
        self.status = status = self.parser.get_status_code()
        if status < 200:
            self.interim += 1
            self.lines.clear()
            self.body_length, self.chunked, self.close = None, False, False
            return
        self.head_complete = True
        if status in (204, 304):
            self.body_length, self.chunked = 0, False
        self.until_close = self.body_length is None and not self.chunked

    def on_chunk_header(self) -> None:
        self.ticket.chunks += 1
        self.chunk_ended = False

    def on_chunk_complete(self) -> None:
        self.chunk_ended = True

    def on_message_complete(self) -> None:
        if self.head_complete:
            self.complete = True


def _is_one_chunk(data: bytes, size: int) -> bool:
    """Whether these bytes are one whole chunk in its plainest form, as a token's event mostly is."""
    stop = data.find(b"\r\n", 0, 5)
    return stop > 0 and _CHUNK_SIZES.get(data[:stop]) == size - stop - 4 and data.endswith(b"\r\n")
