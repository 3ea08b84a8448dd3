"""The client port's Handler until the router knows its fleet: every request is refused with 503, and said why.

It looks at each request whether the time has come, then puts the real handler in its own place: once open, it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from kvfleet_router.io import wire
from kvfleet_router.io.connection import ClientConnection
from kvfleet_router.io.request import Request
from kvfleet_router.io.server import Handler

RETRY_AFTER_S = 1


class Gate:
    def __init__(self, behind: Handler, unready: Callable[[], str]) -> None:
        """`unready` says why there may be no requests yet; empty: from now on there may."""
        self._behind = behind
        self._unready = unready

    def handle(self, request: Request, connection: ClientConnection) -> None:
        reason = self._unready()
        if reason:
            body = wire.error_object(503, f"The router has just started: {reason}.", code="starting")
            connection.reply(503, body, headers=[wire.header(b"retry-after", str(RETRY_AFTER_S))])
            return
        connection.server.handler = self._behind
        self._behind.handle(request, connection)
