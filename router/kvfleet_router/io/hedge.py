"""A second try of a request whose first byte is late, where the policy asks for it (`resilience.hedgeAfterMilliseconds`).

    armed ── time is up ──► racing ──┬─ its answer begins first ──► it becomes the exchange's, the first try is cancelled
      │                              ├─ the first try's begins ───► cancelled
      └─ answered or ended: disarmed ├─ it fails ─────────────────► dropped, the first try goes on
                                     └─ the first try fails ──────► it is the only one left (`take_over`)

Both tries are on the books of their workers as long as they run (dispatcher.hedge, dispatcher.outrun), and of both one is
finished and one outrun. Hedges count in the policy's retry budget; there is at most one for a request.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from kvfleet_router.io.verdict import failure

if TYPE_CHECKING:
    from kvfleet_router.core.ticket import Ticket
    from kvfleet_router.io.exchange import Exchange
    from kvfleet_router.io.upstream import Origin, UpstreamConnection

log = logging.getLogger("kvfleet.router")


class Hedge:
    """The Receiver of the second try."""

    __slots__ = ("_alone", "_exchange", "_timer", "_upstream", "ticket")

    def __init__(self, exchange: Exchange, delay_s: float) -> None:
        self._exchange = exchange
        self._timer: asyncio.TimerHandle | None = asyncio.get_running_loop().call_later(delay_s, self._fire)
        self.ticket: Ticket | None = None
        """Set while it races."""
        self._upstream: UpstreamConnection | None = None
        self._alone = False
        """The first try failed while this one was still connecting."""

    def cancel(self) -> None:
        """The first try answers, or nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        upstream, ticket = self._upstream, self.ticket
        self._upstream = self.ticket = None
        if upstream is not None:
            upstream.abort()
        if ticket is not None and not self._alone:
            self._exchange.proxy.dispatcher.outrun(ticket, "outrun by the first try")

    def take_over(self, cause: str) -> bool:
        """The first try failed: whether this one is under way and goes on alone."""
        ticket, exchange = self.ticket, self._exchange
        if ticket is None or self._alone:
            return False
        first = exchange.ticket
        assert first is not None
        exchange.proxy.dispatcher.outrun(first, cause, failed=True)
        exchange.ticket = ticket
        if self._upstream is None:
            self._alone = True
        else:
            self._hand_over(self._upstream)
        return True

    def _fire(self) -> None:
        self._timer = None
        exchange = self._exchange
        first, upstream = exchange.ticket, exchange.upstream
        if exchange.done or first is None or exchange.held is not None or (upstream is not None and upstream.received):
            return
        ticket = exchange.proxy.dispatcher.hedge(first)
        if ticket is None:
            return
        self.ticket = ticket
        exchange.proxy.metrics.retried(first, "hedged")
        origin = exchange.proxy.upstreams.origin(ticket.worker)
        idle = origin.take_idle()
        if idle is None:
            exchange.proxy.spawn(self._connect(origin, ticket))
        else:
            self._send(idle, ticket)

    async def _connect(self, origin: Origin, ticket: Ticket) -> None:
        try:
            async with asyncio.timeout(ticket.policy.resilience.connect_timeout_milliseconds / 1000):
                upstream = await origin.connect()
        except (OSError, ValueError):  # TimeoutError is an OSError
            if self.ticket is ticket:
                self._lost("connect_failed")
            return
        if self.ticket is not ticket:
            origin.keep(upstream)
        elif self._alone:
            self.ticket = None
            self._exchange.write(upstream, ticket)
        else:
            self._send(upstream, ticket)

    def _send(self, upstream: UpstreamConnection, ticket: Ticket) -> None:
        self._upstream = upstream
        upstream.send(self, ticket, *self._exchange.request_bytes(upstream, ticket))

    # From the second worker

    def answer_began(self) -> None:
        if self._good():
            self._exchange.answer_began()

    def answer_complete(self) -> None:
        if self._good():
            self._exchange.answer_complete()

    def answer_lost(self, cause: str) -> None:
        self._upstream = None
        self._lost(cause)

    def _good(self) -> bool:
        """Whether its answer is one to have; then it is the exchange's."""
        upstream, exchange = self._upstream, self._exchange
        assert upstream is not None
        cause = failure(upstream.status, upstream.event_stream, upstream.held_body())
        if cause:
            self._upstream = None
            upstream.abort()
            self._lost(cause)
            return False
        first, first_upstream, ticket = exchange.ticket, exchange.upstream, self.ticket
        assert first is not None and ticket is not None
        if first_upstream is not None:
            first_upstream.abort()
        exchange.ticket = ticket
        exchange.proxy.dispatcher.outrun(first, "outrun by the hedge")
        self._hand_over(upstream)
        return True

    def _hand_over(self, upstream: UpstreamConnection) -> None:
        """The exchange has this try in place of the first."""
        exchange = self._exchange
        self._upstream = self.ticket = None
        upstream.receiver = exchange
        exchange.upstream = upstream
        exchange.seen_bytes = 0
        exchange.seen_at = exchange.proxy.upstreams.now

    def _lost(self, cause: str) -> None:
        exchange, ticket = self._exchange, self.ticket
        assert ticket is not None
        self.ticket = None
        if self._alone:
            exchange.try_again(cause)
            return
        log.info("worker %s: %s, a hedge of request %s", ticket.worker.name, cause, exchange.request_id.decode())
        exchange.proxy.metrics.error(cause.partition(": ")[0])
        exchange.proxy.dispatcher.outrun(ticket, cause, failed=True)
