"""Servers in this process for the tests, and a client that sees the bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

TIMEOUT_S = 20.0


class HasPort(Protocol):
    """A server here or in another process."""

    @property
    def port(self) -> int: ...


@asynccontextmanager
async def serving(*args: str, speed: float = 100.0) -> AsyncIterator[Server]:
    """A worker on a free port of the loopback."""
    server = Server(parse([*args, "--host", "127.0.0.1", "--port", "0", "--speed", str(speed)]))
    await server.start()
    try:
        yield server
    finally:
        await server.close()


@dataclass
class Answer:
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events: JSON values, and "[DONE]"."""
        texts = [text.removeprefix("data: ") for text in self.body.decode().split("\n\n") if text]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]


def parse_answer(raw: bytes) -> Answer:
    """A whole HTTP answer, chunked or not."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    if ("transfer-encoding", "chunked") in headers:
        body = b"".join(_chunks(body))
    return Answer(int(status.split()[1]), headers, body)


def _chunks(body: bytes) -> list[bytes]:
    chunks = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        chunks.append(rest[:length])
        assert rest[length : length + 2] == b"\r\n"
        body = rest[length + 2 :]
    assert chunks[-1] == b"", "a stream ends with an empty chunk"
    return chunks


async def send_raw(port: int, request: bytes) -> bytes:
    """Everything the server says until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), TIMEOUT_S)
    finally:
        writer.close()
        await writer.wait_closed()


def request_bytes(
    method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, *, close: bool = True
) -> bytes:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "localhost", **(headers or {})}
    if body is not None:
        fields = {"Content-Type": "application/json", "Content-Length": str(len(data)), **fields}
    if close:
        fields["Connection"] = "close"
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


async def call(server: HasPort, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """`X_Request_Id="a"` is a header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return parse_answer(await send_raw(server.port, request_bytes(method, path, body, named)))


async def complete(server: HasPort, prompt: Any, max_tokens: int = 1, **fields: Any) -> Answer:
    return await call(server, "POST", "/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, **fields})


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something that happens in this process has happened."""

    async def poll() -> None:
        while not condition():  # noqa: ASYNC110 - what no event announces
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), TIMEOUT_S)


class OpenStream:
    """A streamed request that stays open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.received = b""

    @classmethod
    async def start(cls, server: HasPort, body: dict[str, Any], path: str = "/v1/completions") -> OpenStream:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request_bytes("POST", path, {**body, "stream": True}))
        stream = cls(reader, writer)
        await stream.read_until(b"\r\n\r\n")
        return stream

    async def read_until(self, mark: bytes) -> None:
        while mark not in self.received:
            data = await asyncio.wait_for(self._reader.read(65536), TIMEOUT_S)
            assert data, f"closed before {mark!r}: {self.received[-300:]!r}"
            self.received += data

    async def read_all(self) -> Answer:
        try:
            self.received += await asyncio.wait_for(self._reader.read(), TIMEOUT_S)
        finally:
            await self.close()
        return parse_answer(self.received)

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()
