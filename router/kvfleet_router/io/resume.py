"""Between a worker's stream and the client, where the policy asks for `resilience.resume`: whole events only.

Bytes of a worker are taken out of their HTTP chunks, cut into events, and what core/resumption.py makes of those goes to the
client in chunks of our own. Half an event, which a dying worker leaves behind, never gets there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvfleet_router.core.resumption import Resumption
from kvfleet_router.io import wire
from kvfleet_router.io.dechunker import Dechunker
from kvfleet_router.io.usage import Usage

if TYPE_CHECKING:
    import asyncio

    from kvfleet_router.core.parse import ParsedRequest
    from kvfleet_router.core.ticket import Ticket
    from kvfleet_router.io.exchange import Exchange
    from kvfleet_router.io.upstream import UpstreamConnection

MAX_EVENT_BYTES: Final = 1 << 20
"""Longer events are passed on piece by piece, and the stream cannot be resumed any more."""
END: Final = b"0\r\n\r\n"
_EVENT_END: Final = b"\n\n"


class ResumableStream:
    """The answer to one client, from one worker after the other."""

    __slots__ = ("_begun", "_dechunker", "_transport", "resumption", "started")

    def __init__(self, resumption: Resumption) -> None:
        self.resumption = resumption
        self.started = False
        """The client has the head of its answer."""
        self._begun = bytearray()
        """Of an event that has not ended yet."""
        self._transport: asyncio.WriteTransport | None = None
        self._dechunker: Dechunker | None = None

    def fits(self, upstream: UpstreamConnection) -> bool:
        """Whether a worker's answer is a stream of events to go on with."""
        return upstream.status == 200 and upstream.event_stream and upstream.chunked

    def follow(self, upstream: UpstreamConnection, transport: asyncio.WriteTransport, head: bytes = b"") -> None:
        """Pass on what the worker says from here on; at first behind `head`, the answer's head for the client."""
        self._transport = transport
        self._begun.clear()
        if not self.started:
            self.started = True
            transport.write(head)
        self._let_go()
        self._dechunker = Dechunker(self._take)
        upstream.release(self._dechunker.feed, b"")

    def end(self) -> None:
        """The worker's answer is complete."""
        self._let_go()
        self._write((_chunk(bytes(self._begun)) if self._begun else b"") + END)

    def close(self) -> None:
        """All is said but the end, and the worker that should say it is dead."""
        self._let_go()
        self._write(_chunk(self.resumption.closing()) + END)

    def usage(self) -> Usage:
        resumption = self.resumption
        return Usage(resumption.prompt_tokens, resumption.output_tokens, resumption.cached_tokens)

    def _take(self, data: bytes) -> None:
        begun = self._begun
        begun += data
        if begun.find(_EVENT_END, max(len(begun) - len(data) - 1, 0)) < 0:
            if len(begun) > MAX_EVENT_BYTES:
                self.resumption.able = False
                self._write(_chunk(bytes(begun)))
                begun.clear()
            return
        *events, rest = bytes(begun).split(_EVENT_END)
        begun[:] = rest
        out = b"".join([self.resumption.take(event) for event in events])
        if out:
            self._write(_chunk(out))

    def _let_go(self) -> None:
        if self._dechunker is not None:
            self._dechunker.close()
            self._dechunker = None

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)


def resumable(path: str, parsed: ParsedRequest, body: bytes) -> ResumableStream | None:
    """None where the request cannot be resumed."""
    resumption = Resumption.of(path, parsed, body)
    return None if resumption is None else ResumableStream(resumption)


# What an Exchange does with its stream


def ended_well(exchange: Exchange, stream: ResumableStream, upstream: UpstreamConnection, ticket: Ticket) -> bool:
    """Whether a worker's complete answer is the whole of it; else the rest is asked for elsewhere."""
    if not stream.resumption.ended_early():
        stream.end()
        return True
    exchange.upstream = None
    upstream.detach()
    exchange.break_off(upstream, ticket, stream.resumption.failure)
    return False


def go_on(exchange: Exchange, stream: ResumableStream, upstream: UpstreamConnection, ticket: Ticket) -> None:
    """Another worker answers the request for the rest."""
    if not stream.fits(upstream):
        exchange.upstream = None
        upstream.abort()
        exchange.give_up(ticket, f"status_{upstream.status}", 502, "upstream_failed", wire.BROKEN)
        return
    stream.follow(upstream, exchange.connection.transport)
    if exchange.connection.write_paused:
        upstream.transport.pause_reading()


def broken_off(exchange: Exchange, stream: ResumableStream, ticket: Ticket, cause: str) -> None:
    """The worker died: the answer ends well all the same, now or at another worker, or else with an error event."""
    resumption, proxy = stream.resumption, exchange.proxy
    if resumption.finished or resumption.exhausted:
        stream.close()
        usage = stream.usage()
        proxy.dispatcher.finish(ticket, output_tokens=usage.output, prompt_tokens=usage.prompt, ok=True)
        exchange.done = True
        proxy.metrics.answered(exchange, ticket, "ok", usage, proxy.clock())
        exchange.connection.answered(keep_alive=False)
    elif resumption.able and exchange.may_try_again():
        proxy.metrics.retried(ticket, "resumed")
        resumption.broke()
        exchange.take(proxy.dispatcher.retry(ticket, cause, exchange.assigned))
    else:
        exchange.give_up(ticket, cause, 502, "upstream_failed", wire.BROKEN)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
