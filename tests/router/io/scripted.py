"""Parts for data-plane tests: workers that do on a raw socket exactly what a test says, a client that sends exactly the bytes
it is given, and routers in this process. Everything runs on uvloop, as in production, and on free ports of the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from kvfleet_api.common import Schema
from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.app import RouterApp

PATIENCE_S = 10.0
"""After so long a test has failed, not merely waited."""


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until `condition()` holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - other parties' states have no event
            await asyncio.sleep(0.002)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    """One token as an engine streams it: an event in an HTTP chunk of its own."""
    return chunk(b"data: %b\n\n" % orjson.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}))


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def json_answer(value: object, status: bytes = b"200 OK", headers: bytes = b"") -> bytes:
    body = orjson.dumps(value)
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n%b" % (
        status,
        len(body),
        headers,
        body,
    )


def completion(text: str = "hello") -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 7,
            "total_tokens": 18,
            "prompt_tokens_details": {"cached_tokens": 5},
        },
    }


@dataclass
class Seen:
    """A request as a worker got it."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    connection: int
    """Which of the worker's connections it came on."""

    def header(self, name: str) -> bytes | None:
        values = [value for key, value in self.headers if key.lower() == name.encode().lower()]
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None


Behaviour = Callable[[Seen, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def answer_ok(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(json_answer(completion()))


@dataclass
class ScriptedWorker:
    """A worker on a raw socket. `behave` is called for each request; the connection is kept unless it closes it."""

    behave: Behaviour = answer_ok
    requests: list[Seen] = field(default_factory=list)
    connections: int = 0
    lost: int = 0
    """Connections the router ended."""
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 26)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Die: refuse connections, and reset those that are open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._writers.append(writer)
        try:
            while not writer.is_closing():
                try:
                    seen = await _read_request(reader, number)
                except (asyncio.IncompleteReadError, ConnectionError):
                    self.lost += 1
                    return
                self.requests.append(seen)
                await self.behave(seen, reader, writer)
        except ConnectionError:
            self.lost += 1
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def _read_request(reader: asyncio.StreamReader, connection: int) -> Seen:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").encode("latin-1")
    line, *lines = head[:-4].split(b"\r\n")
    headers = [(name, value.strip()) for name, _, value in (text.partition(b":") for text in lines)]
    length = next((int(value) for name, value in headers if name.lower() == b"content-length"), 0)
    return Seen(line, headers, await reader.readexactly(length), connection)


@dataclass
class Answer:
    """A response as the client got it: `raw` is the body as it came on the wire, framing included."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    raw: bytes

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key.lower() == name]
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None

    def json(self) -> Any:
        return orjson.loads(self.body)


class RawClient:
    """Sends the very bytes it is given, and reads answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(self, *, head_only: bool = False) -> Answer:
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lines = head[:-4].decode("latin-1").split("\r\n")
            match = re.fullmatch(r"HTTP/1\.1 (\d{3}) .*", lines[0])
            assert match, lines[0]
            pairs = [line.split(": ", 1) for line in lines[1:]]
            answer = Answer(int(match[1]), [(key.lower(), value) for key, value in pairs], b"", b"")
            if head_only or answer.status in (100, 204, 304):
                return answer
            if answer.header("transfer-encoding") == "chunked":
                await self._chunks(answer)
            elif (length := answer.header("content-length")) is not None:
                answer.raw = answer.body = await self.reader.readexactly(int(length))
            else:
                answer.raw = answer.body = await self.reader.read()
            return answer

    async def _chunks(self, answer: Answer) -> None:
        raw, body = [], []
        while not raw or body[-1]:
            line = await self.reader.readuntil(b"\r\n")
            data = await self.reader.readexactly(int(line.split(b";")[0], 16) + 2)
            raw += [line, data]
            body.append(data[:-2])
        answer.raw, answer.body = b"".join(raw), b"".join(body)

    async def closed(self) -> bytes:
        """What came until the router closed the connection."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()

    def close(self) -> None:
        self.writer.close()


def chat_body(**fields: object) -> bytes:
    return orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields})


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    """A request's bytes."""
    lines = b"".join(line + b"\r\n" for line in headers)
    return b"POST %b HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b" % (
        path,
        len(body),
        lines,
        body,
    )


def fleet(
    workers: Sequence[ScriptedWorker | Unreachable],
    *,
    model: str | None = None,
    strategy: str = "round_robin",
    **changes: Any,
) -> FleetConfig:
    """A FleetConfig of these workers; `changes` name fields of the policy's specs or of the limits, whatever their owner."""
    config = static_fleet([worker.url for worker in workers] or ["http://127.0.0.1:9"], strategy, model)
    policy = config.policies[0]
    specs: dict[str, Schema] = {"resilience": policy.resilience, "admission": policy.admission}
    limits = config.limits
    for name, value in changes.items():
        for key, spec in specs.items():
            if name in type(spec).model_fields:
                specs[key] = spec.model_copy(update={name: value})
                break
        else:
            assert name in type(limits).model_fields, name
            limits = limits.model_copy(update={name: value})
    return config.model_copy(update={"policies": [policy.model_copy(update=specs)], "limits": limits})


class Unreachable:
    """A port that accepts nothing and refuses nothing until told to: its backlog is full, as behind a filter or a dead host."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.port = self._listener.getsockname()[1]
        self._queued = []
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self._queued.append(filler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def close(self) -> None:
        for each in (*self._queued, self._listener):
            each.close()


class Bench:
    """Starts workers, routers and clients, and ends them with the test."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()

    def on_close(self, callback: Callable[..., Awaitable[object]], *args: object) -> None:
        self._stack.push_async_callback(callback, *args)

    async def worker(self, behave: Behaviour = answer_ok) -> ScriptedWorker:
        worker = ScriptedWorker(behave)
        await worker.start()
        self._stack.push_async_callback(worker.stop)
        return worker

    def unreachable(self) -> Unreachable:
        port = Unreachable()
        self._stack.push_async_callback(port.close)
        return port

    async def router(
        self,
        *workers: ScriptedWorker | Unreachable,
        config: FleetConfig | None = None,
        speed: float = 1.0,
        **changes: Any,
    ) -> RouterApp:
        app = RouterApp(config or fleet(workers, **changes), speed=speed)
        await app.start()
        self._stack.push_async_callback(app.stop, 0.0)
        return app

    async def client(self, app: RouterApp, *, admin: bool = False) -> RawClient:
        port = app.admin_port if admin else app.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
        client = RawClient(reader, writer)
        self._stack.callback(client.close)
        return client

    async def ask(self, app: RouterApp, data: bytes, *, admin: bool = False, head_only: bool = False) -> Answer:
        """One request on a connection of its own."""
        client = await self.client(app, admin=admin)
        await client.send(data)
        answer = await client.answer(head_only=head_only)
        client.close()
        return answer

    async def metrics(self, app: RouterApp) -> dict[str, float]:
        """The router's own samples at /metrics, by name and labels as printed."""
        answer = await self.ask(app, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", admin=True)
        lines = [line for line in answer.body.decode().splitlines() if line.startswith("kvfleet_router_")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    async def close(self) -> None:
        await self._stack.aclose()
