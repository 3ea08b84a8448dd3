"""An HTTP server for one test: it answers with what a function returns, byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: str


Answer = Callable[[Request], bytes | None]
"""The raw answer; None: say nothing and keep the connection open."""


@dataclass
class Server:
    url: str
    requests: list[Request] = field(default_factory=list)


def http(body: str | bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A complete answer."""
    content = body.encode() if isinstance(body, str) else body
    head = [f"HTTP/1.1 {status}", f"content-length: {len(content)}", "connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, path, headers, body.decode())


Serve = Callable[[Answer], Awaitable[Server]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start servers on 127.0.0.1; they end with the test."""
    over = asyncio.Event()
    running: list[asyncio.Server] = []

    async def start(answer: Answer) -> Server:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            request = await _read(reader)
            server.requests.append(request)
            content = answer(request)
            if content is None:
                await over.wait()
            else:
                writer.write(content)
            writer.close()

        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        running.append(listener)
        host, port = listener.sockets[0].getsockname()
        server = Server(f"http://{host}:{port}")
        return server

    yield start
    over.set()
    for listener in running:
        listener.close()
        await listener.wait_closed()


@pytest.fixture
def answer() -> Callable[..., bytes]:
    """`http`, for tests to call."""
    return http
