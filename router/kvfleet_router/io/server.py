"""A listener of HTTP/1.1 clients: accepts, limits, sweeps and drains the connections of `connection.py`."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from kvfleet_api.fleetrouter import LimitsSpec
from kvfleet_router.io.connection import ANSWERING, ClientConnection
from kvfleet_router.io.request import Request
from kvfleet_router.io.sockets import bind_unix, probe_silent_peer

BACKLOG = 4096
TLS_HANDSHAKE_TIMEOUT_S = 15.0
UNIX = "unix:"


class Handler(Protocol):
    """Takes requests. It calls `connection.reply` at once, or sets `connection.answer`, writes to `connection.transport` when
    it pleases and calls `connection.answered` in the end."""

    def handle(self, request: Request, connection: ClientConnection) -> None: ...


class Server:
    """What the connections of one listener share."""

    def __init__(self, handler: Handler, limits: LimitsSpec) -> None:
        self.handler = handler
        self.limits = limits
        self.connections: set[ClientConnection] = set()
        self.now = time.monotonic()
        """Coarse time, moved on by `sweep`."""
        self.draining = False
        self.body_bytes = 0
        """Of all requests not yet released."""
        self.refused: dict[str, int] = {}
        """Requests and connections refused before they reached the handler, by cause."""
        self._listeners: list[asyncio.Server] = []
        self._empty = asyncio.Event()
        self._empty.set()

    async def listen(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> int:
        """Start to accept; returns the port (for port 0). `host`: an address, or several with commas between; `unix:PATH` is a
        Unix socket. Raises OSError where an address cannot be had."""
        for address in host.split(","):
            if address.startswith(UNIX):
                await self.listen_at(Path(address.removeprefix(UNIX)), tls=tls)
            else:
                port = await self._listen(address, port, tls)
        return port

    async def _listen(self, host: str, port: int, tls: ssl.SSLContext | None) -> int:
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(
            lambda: cast(asyncio.Protocol, ClientConnection(self)),
            host.strip("[]"),
            port,
            backlog=BACKLOG,
            reuse_address=True,
            ssl=tls,
            ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT_S if tls else None,
        )
        self._listeners.append(listener)
        for sock in listener.sockets:
            probe_silent_peer(sock)  # accepted sockets inherit it
        return int(listener.sockets[0].getsockname()[1])

    async def listen_on(self, sockets: Sequence[socket.socket], *, tls: ssl.SSLContext | None = None) -> None:
        """Start to accept on sockets that somebody else has bound."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            create = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
            listener = await create(
                lambda: cast(asyncio.Protocol, ClientConnection(self)),
                sock=sock,
                backlog=BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT_S if tls else None,
            )
            self._listeners.append(listener)
            probe_silent_peer(sock)

    async def listen_at(self, path: Path, *, tls: ssl.SSLContext | None = None) -> None:
        """Start to accept at a Unix socket; one that was left behind is replaced."""
        listener = await asyncio.get_running_loop().create_unix_server(
            lambda: cast(asyncio.Protocol, ClientConnection(self)),
            sock=bind_unix(path),
            backlog=BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT_S if tls else None,
        )
        self._listeners.append(listener)

    async def drain(self, timeout_s: float) -> int:
        """Accept no more, close idle connections, let running answers end; returns how many were cut off at the time limit."""
        self.draining = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for connection in list(self.connections):
            connection.close_if_idle()
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            pass
        cut = sum(connection.state == ANSWERING for connection in self.connections)
        for connection in list(self.connections):
            connection.abort()
        return cut

    def sweep(self, now: float) -> None:
        self.now = now
        for connection in list(self.connections):
            connection.sweep(now)

    @property
    def limits(self) -> LimitsSpec:
        return self._limits

    @limits.setter
    def limits(self, limits: LimitsSpec) -> None:
        self._limits = limits
        self.max_header_bytes, self.max_body_bytes = limits.max_header_bytes, limits.max_body_bytes

    def refuse(self, cause: str) -> None:
        self.refused[cause] = self.refused.get(cause, 0) + 1

    def opened(self, connection: ClientConnection) -> None:
        self.connections.add(connection)
        self._empty.clear()

    def closed(self, connection: ClientConnection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()


def addresses_text(host: str, port: int) -> str:
    """Where `listen` listens, for people: `unix:/run/x`, `127.0.0.1:80`, `[::1]:80`."""
    texts = []
    for address in host.split(","):
        bare = address.strip("[]")
        texts.append(address if address.startswith(UNIX) else f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}")
    return ", ".join(texts)
