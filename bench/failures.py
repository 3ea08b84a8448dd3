"""How routers behave when things go wrong: kvfleet beside every peer that is found, as one table.

    .venv/bin/python bench/failures.py                               # kvfleet alone
    .venv/bin/python bench/failures.py --peers all                   # and the gateways that `make peers` installed

Each row is one thing that goes wrong, tried on each router in turn, freshly started before simulated vLLM workers
(`kvfleet worker`, killed with SIGKILL where a row says so) or before one that records what it is sent. `want` is what a client
of OpenAI's API can make something of; a cell that is what is wanted is marked. Exit status 1: kvfleet missed one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from dataplane import resident_mib, running
from dataplane_peers import Router, peers, urls

from kvfleet.local import free_ports
from kvfleet_api.compile import static_fleet

MODEL = "bench"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 60.0, 60.0
HUGE_MIB, SLACK_MIB = 600, 64
KILL_REQUESTS, KILL_CLIENTS = 400, 16
STREAM_TOKENS = 120


@dataclass
class Cell:
    """What came, and whether it is what is wanted."""

    text: str
    wanted: bool


@dataclass
class Setting:
    """One router before its workers."""

    base: str
    router: subprocess.Popen[bytes]
    workers: dict[int, subprocess.Popen[bytes]]
    """By port."""
    client: httpx.AsyncClient
    bodies: list[bytes] = field(default_factory=list)
    """What a recording worker was sent."""

    async def post(self, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(
            self.base + CHAT, content=content, headers={"content-type": "application/json", **headers}
        )

    def kill(self, port: int) -> None:
        self.workers[port].send_signal(signal.SIGKILL)
        self.workers[port].wait()


Probe = Callable[[Setting], Awaitable[Cell]]


def shaped(answer: httpx.Response) -> bool:
    """Whether it is OpenAI's error body."""
    try:
        error = answer.json()["error"]
        return isinstance(error["message"], str) and {"type", "code"} <= error.keys()
    except (ValueError, KeyError, TypeError):
        return False


def described(answer: httpx.Response) -> str:
    if answer.status_code < 400:
        return f"{answer.status_code}"
    if not shaped(answer):
        return f"{answer.status_code} {answer.headers.get('content-type', 'no').partition(';')[0]}, no error body"
    return f"{answer.status_code} {answer.json()['error']['code'] or ''}".strip()


async def invalid_json(setting: Setting) -> Cell:
    answer = await setting.post(b'{"model": "bench", "messages": [')
    return Cell(described(answer), answer.status_code == 400 and shaped(answer))


async def missing_messages(setting: Setting) -> Cell:
    answer = await setting.post({"model": MODEL})
    return Cell(described(answer), answer.status_code == 400 and shaped(answer))


async def unknown_model(setting: Setting) -> Cell:
    answer = await setting.post({"model": "no-such-model", "messages": MESSAGES, "max_tokens": 1})
    passed = " (a worker's)" if setting.bodies else ""
    wanted = answer.status_code == 404 and shaped(answer) and answer.json()["error"]["code"] == "model_not_found"
    return Cell(described(answer) + passed, wanted and not passed)


async def huge_body(setting: Setting) -> Cell:
    """By hand: the answer may come while the body is still being sent."""
    before = peak = resident_mib(setting.router.pid)
    host, _, port = setting.base.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    size, piece, sent = HUGE_MIB * 2**20, b" " * 2**20, 0
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nhost: r\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n\r\n".encode()
    )
    line = asyncio.create_task(reader.readline())
    with contextlib.suppress(OSError):
        while sent < size and not line.done():
            writer.write(piece)
            sent += len(piece)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(writer.drain(), 1.0)
            peak = max(peak, resident_mib(setting.router.pid))
    try:
        status = (await asyncio.wait_for(line, ANSWER_TIMEOUT_S)).split(b" ")[1].decode()
    except (OSError, IndexError, TimeoutError):
        status = "no answer"
    peak = max(peak, resident_mib(setting.router.pid))
    writer.transport.abort()
    text = f"{status} after {sent / 2**20:.0f} MiB, +{peak - before:.0f} MiB"
    return Cell(text, status == "413" and peak - before < SLACK_MIB)


async def one_of_four_dies(setting: Setting) -> Cell:
    failures: dict[int, int] = {}
    left = iter(range(KILL_REQUESTS))

    async def client() -> None:
        for number in left:
            if number == KILL_REQUESTS // 3:
                setting.kill(next(iter(setting.workers)))
            try:
                status = (await setting.post({"model": MODEL, "messages": MESSAGES, "max_tokens": 8})).status_code
            except httpx.HTTPError:
                status = 0
            if status != 200:
                failures[status] = failures.get(status, 0) + 1

    await asyncio.gather(*(client() for _ in range(KILL_CLIENTS)))
    text = ", ".join(f"{count} × {status or 'cut off'}" for status, count in failures.items())
    return Cell(f"{text or 0} of {KILL_REQUESTS} failed", not failures)


async def all_dead(setting: Setting) -> Cell:
    for port in setting.workers:
        setting.kill(port)
    answer = await setting.post({"model": MODEL, "messages": MESSAGES, "max_tokens": 1})
    retry = answer.headers.get("retry-after")
    text = described(answer) + (f", Retry-After {retry}" if retry else "")
    return Cell(text, answer.status_code == 503 and shaped(answer) and retry is not None)


async def dies_in_a_stream(setting: Setting) -> Cell:
    """The worker that streams is the one that says it is busy."""
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "max_tokens": STREAM_TOKENS, "ignore_eos": True}
    data, ended = b"", True
    try:
        async with setting.client.stream("POST", setting.base + CHAT, json=body) as answer:
            async for piece in answer.aiter_bytes():
                if data.count(b"data: ") < 20 <= (data + piece).count(b"data: "):
                    setting.kill(await _busy(setting))
                data += piece
    except httpx.HTTPError:
        ended = False
    events = [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event.startswith(b"data: ")]
    done = events[-1:] == [b"[DONE]"]
    values = [json.loads(event) for event in events if event.startswith(b"{")]
    tokens = sum(bool(value.get("choices") and value["choices"][0]["delta"].get("content")) for value in values)
    if done and tokens == STREAM_TOKENS:
        return Cell(f"resumed: {tokens} of {STREAM_TOKENS} tokens", True)
    if done and any("error" in value for value in values):
        return Cell("an error event, [DONE]", True)
    return Cell(f"200, {'ends' if ended else 'cut off'} after {tokens} tokens", False)


async def _busy(setting: Setting) -> int:
    for port in setting.workers:
        if (await setting.client.get(f"http://127.0.0.1:{port}/load")).json()["server_load"]:
            return port
    raise RuntimeError("no worker is busy with the stream")


async def unknown_fields(setting: Setting) -> Cell:
    message = MESSAGES[0] | {"x_message_field": [1]}
    body = {"model": MODEL, "messages": [message], "max_tokens": 1, "x_field": {"deep": [1.0, None]}}
    await setting.post(body)
    sent = json.loads(setting.bodies[-1]) if setting.bodies else {}
    lost = [name for name in ("x_field",) if name not in sent]
    lost += [f"messages[].{name}" for name in ("x_message_field",) if name not in sent.get("messages", [{}])[0]]
    verbatim = bool(setting.bodies) and setting.bodies[-1] == json.dumps(body).encode()
    text = f"dropped: {', '.join(lost)}" if lost else "verbatim" if verbatim else "kept, body rewritten"
    return Cell(text, not lost and verbatim)


@dataclass(frozen=True)
class Row:
    name: str
    want: str
    probe: Probe
    workers: int
    """Simulated workers, or 0: one that records."""
    speed: float = 20.0


ROWS = (
    Row("invalid JSON", "400, OpenAI error body", invalid_json, 0),
    Row("`messages` missing", "400, OpenAI error body", missing_messages, 0),
    Row("unknown model", "404 `model_not_found`", unknown_model, 0),
    Row(f"{HUGE_MIB} MiB body", f"413, memory bounded (+{SLACK_MIB} MiB)", huge_body, 0),
    Row("kill 1 of 4 under load", "0 failed", one_of_four_dies, 4),
    Row("all workers dead", "503, Retry-After", all_dead, 2),
    Row("worker killed inside a stream", "an error event, or resumed", dies_in_a_stream, 3, 2.0),
    Row("unknown fields in the body", "verbatim", unknown_fields, 0),
)


def ours(resume: bool) -> Router:
    def command(port: int, admin: int, workers: Sequence[int], directory: Path) -> list[str]:
        config = static_fleet(urls(workers), "kvfleet", MODEL)
        policy = config.policies[0]
        resilience = policy.resilience.model_copy(update={"resume": resume})
        config = config.model_copy(update={"policies": [policy.model_copy(update={"resilience": resilience})]})
        file = directory / "fleet.json"
        file.write_text(config.to_json())
        listen = ["--host", "127.0.0.1", "--port", str(port), "--admin-port", str(admin), "--log-level", "error"]
        return [sys.executable, "-m", "kvfleet", "router", *listen, "--config", str(file)]

    return Router("kvfleet, resume" if resume else "kvfleet", command)


class Recorder:
    """A worker that answers as an engine would and remembers what it was sent."""

    def __init__(self, bodies: list[bytes]) -> None:
        self._bodies = bodies

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = next((int(line[15:]) for line in head.split(b"\r\n") if line[:15] == b"content-length:"), 0)
                body = await reader.readexactly(length)
                answer: dict[str, Any] = {
                    "status": "ok",
                    "model_path": MODEL,
                    "object": "list",
                    "data": [{"id": MODEL}],
                }
                if head.startswith(b"post /v1/"):
                    self._bodies.append(body)
                    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
                    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}
                data = json.dumps(answer).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                    % (len(data), data)
                )
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def started(router: Router, row: Row, directory: Path) -> AsyncIterator[Setting]:
    """A router before workers of its own, ready."""
    core = min(os.sched_getaffinity(0))
    async with contextlib.AsyncExitStack() as stack:
        bodies: list[bytes] = []
        processes: dict[int, subprocess.Popen[bytes]] = {}
        if row.workers:
            options = ["--host", "127.0.0.1", "--speed", str(row.speed), "--enable-server-load-tracking"]
            for port in free_ports(row.workers):
                command = [sys.executable, "-m", "kvfleet", "worker", MODEL, "--port", str(port), *options]
                log = directory / f"worker-{port}.log"
                processes[port] = stack.enter_context(running(command, max(os.sched_getaffinity(0)), log))
            ports = list(processes)
        else:
            server = await asyncio.start_server(Recorder(bodies).serve, "127.0.0.1", 0, limit=2**20)
            stack.callback(server.close)
            ports = [server.sockets[0].getsockname()[1]]
        client = await stack.enter_async_context(
            httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=0))
        )
        for port in ports:
            await _ready(client, f"http://127.0.0.1:{port}/health")
        port, admin = free_ports(2)
        process = stack.enter_context(
            running(router.command(port, admin, ports, directory), core, directory / "router.log")
        )
        setting = Setting(f"http://127.0.0.1:{port}", process, processes, client, bodies)
        await _answers(setting)
        bodies.clear()
        yield setting


async def _ready(client: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(url)).status_code == 200:
                    return
            await asyncio.sleep(0.1)


async def _answers(setting: Setting) -> None:
    """Wait until requests come back."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await setting.post({"model": MODEL, "messages": MESSAGES, "max_tokens": 1})).status_code == 200:
                    return
            await asyncio.sleep(0.2)


async def run(routers: Sequence[Router], rows: Sequence[Row], directory: Path) -> dict[tuple[str, str], Cell]:
    cells = {}
    for row in rows:
        for router in routers:
            begun = time.monotonic()
            try:
                async with started(router, row, directory) as setting:
                    cell = await row.probe(setting)
            except (httpx.HTTPError, TimeoutError, RuntimeError) as error:
                cell = Cell(f"no answer in {ANSWER_TIMEOUT_S:.0f} s ({type(error).__name__})", False)
            cells[row.name, router.name] = cell
            print(f"{row.name}: {router.name}: {cell.text} ({time.monotonic() - begun:.0f} s)", file=sys.stderr)
    return cells


def table(routers: Sequence[Router], rows: Sequence[Row], cells: dict[tuple[str, str], Cell]) -> str:
    """In Markdown."""
    lines = ["| | " + " | ".join(router.name for router in routers) + " | want |"]
    lines.append("| --- " * (len(routers) + 2) + "|")
    for row in rows:
        marked = [cells[row.name, router.name] for router in routers]
        texts = [f"{'✓' if cell.wanted else '✗'} {cell.text}" for cell in marked]
        lines.append("| " + " | ".join([row.name, *texts, row.want]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", default="", help="peers to try beside it, comma-separated, or `all`: gateways that look at prefixes"
    )
    parser.add_argument(
        "--venv",
        action="append",
        type=Path,
        default=[],
        help="where peers from PyPI are installed; repeat (default: those of `make peers`)",
    )
    parser.add_argument("--rows", default="", help="comma-separated beginnings of rows (default: all)")
    arguments = parser.parse_args()
    available = peers(arguments.venv)
    wanted = [name for name in arguments.peers.split(",") if name]
    if arguments.peers == "all":
        wanted = [name for name in available if name.endswith("cache_aware")]
    if unknown := set(wanted) - set(available):
        parser.error(
            f"--peers {', '.join(sorted(unknown))}: not found here; found are {', '.join(available) or 'none'}"
        )
    prefixes = tuple(arguments.rows.split(",")) if arguments.rows else ("",)
    rows = [row for row in ROWS if row.name.startswith(prefixes)]
    routers = [ours(False), ours(True), *(available[name] for name in wanted)]
    with tempfile.TemporaryDirectory() as name:
        cells = asyncio.run(run(routers, rows, Path(name)))
    print(table(routers, rows, cells))
    return 0 if all(cell.wanted for (_, router), cell in cells.items() if router.startswith("kvfleet")) else 1


if __name__ == "__main__":
    sys.exit(main())
