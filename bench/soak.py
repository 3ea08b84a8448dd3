"""A soak: mixed load for minutes while workers are killed at random; then every request must be accounted for.

    .venv/bin/python bench/soak.py                     # ten minutes
    .venv/bin/python bench/soak.py --seconds 30 --json out.json

A router process (`resilience.resume` on) stands before simulated vLLM processes that are killed (SIGKILL, or SIGTERM as a rollout
does) and started again. Clients stream, ask for whole answers, pipeline, leave half-way, read slowly, write slowly, send large
and broken bodies. Each request ends for its client in exactly one way:

    completed   whole: a stream up to [DONE] with the very text that its prompt has (nothing lost or said twice), a whole JSON answer
    failed      an error a client can read: OpenAI's error body, or a stream's error event with a code and [DONE]
    cancelled   its client left
    unclear     anything else

The end: no request is unclear; the router counted as many requests as were sent; nothing is in flight, queued or held; as many
client connections, asyncio tasks and files are open as before; memory has not grown. Exit status 1: one of these is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from dataplane import resident_mib
from dataplane_peers import urls

from kvfleet.local import free_ports
from kvfleet_api.compile import static_fleet

MODEL = "soak"
PROMPTS = [f"Tell me story number {number}. " + "It is long. " * (number * 7) for number in range(48)]
TOKENS = 40
"""Of the longest stream."""
WORKERS, SPEED = 4, 8.0
ALL_AT_ONCE = 0.15
"""Of the kills, those of all workers together: nobody can go on then."""
PATIENCE_S = 60.0
"""After so long without a byte an answer is lost."""
SETTLE_S = 20.0
GROWTH_MIB = 24.0
"""What the router may grow from the run's second quarter to its last: caches that still fill."""


class Lost(Exception):
    """An answer that is none."""


class Client:
    """One connection, raw; closes with the block."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.writer.transport.abort()

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(PATIENCE_S):
            raw = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = raw[:-4].split("\r\n")
        headers = dict(text.split(": ", 1) for text in lines)
        return int(line.split(" ")[1]), {name.lower(): value for name, value in headers.items()}

    async def chunk(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def whole(self, expected_id: str) -> str:
        """The verdict on a complete answer."""
        status, headers = await self.head()
        async with asyncio.timeout(PATIENCE_S):
            body = await self.reader.readexactly(int(headers["content-length"]))
        value = json.loads(body)
        if headers["x-request-id"] != expected_id:
            raise Lost("the answer of another request")
        if status == 200:
            if value["choices"][0]["finish_reason"] not in ("length", "stop"):
                raise Lost(f"an answer ended by {value['choices'][0]['finish_reason']}")
            return "completed"
        if not value["error"]["message"]:
            raise Lost(f"{status} without a message")
        return "failed"


class Soak:
    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.seconds: float = arguments.seconds
        self.clients: int = arguments.clients
        self.rng = random.Random(arguments.seed)
        self.directory = directory
        self.port, self.admin, *self.ports = free_ports(2 + WORKERS)
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.verdicts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.unclear: list[str] = []
        self.kills: Counter[str] = Counter()
        self.resident: list[float] = []
        self._ids = itertools.count()
        self._texts: dict[tuple[int, bool], str] = {}
        """What each prompt is answered with, as a stream that nothing happened to had it."""

    # Processes

    def start_worker(self, port: int) -> None:
        options = ["--host", "127.0.0.1", "--port", str(port), "--speed", str(SPEED), "--max-model-len", "16384"]
        command = [sys.executable, "-m", "kvfleet", "worker", MODEL, *options]
        log = (self.directory / f"worker-{port}.log").open("ab")
        self.workers[port] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def start_router(self) -> subprocess.Popen[bytes]:
        config = static_fleet(urls(self.ports), "kvfleet", MODEL)
        policy = config.policies[0]
        resilience = policy.resilience.model_copy(update={"resume": True})
        file = self.directory / "fleet.json"
        file.write_text(
            config.model_copy(update={"policies": [policy.model_copy(update={"resilience": resilience})]}).to_json()
        )
        listen = ["--host", "127.0.0.1", "--port", str(self.port), "--admin-port", str(self.admin)]
        command = [sys.executable, "-m", "kvfleet", "router", *listen, "--config", str(file), "--log-level", "error"]
        log = (self.directory / "router.log").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    async def killer(self, until: float) -> None:
        """Kill a worker now and then, and now and then all of them."""
        pause_s = min(8.0, self.seconds / 6)
        while time.monotonic() < until - pause_s:
            await asyncio.sleep(self.rng.uniform(0.5, 1.5) * pause_s)
            how = self.rng.choice((signal.SIGKILL, signal.SIGTERM))
            victims = self.ports if self.rng.random() < ALL_AT_ONCE else [self.rng.choice(self.ports)]
            for port in victims:
                self.workers[port].send_signal(how)
            for port in victims:
                await asyncio.to_thread(self.workers[port].wait)
                self.kills[how.name] += 1
                self.start_worker(port)

    # Clients

    def request(self, *, stream: bool, prompt: int, chat: bool, **fields: Any) -> tuple[str, bytes]:
        """(id, bytes of a request)."""
        text = PROMPTS[prompt]
        asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        body = {"model": MODEL, "stream": stream, "max_tokens": TOKENS, **asked, **fields}
        return self.raw(json.dumps(body).encode(), "/v1/chat/completions" if chat else "/v1/completions")

    def raw(self, body: bytes, path: str = "/v1/chat/completions") -> tuple[str, bytes]:
        name = f"soak-{next(self._ids)}"
        head = f"POST {path} HTTP/1.1\r\nhost: r\r\nx-request-id: {name}\r\ncontent-type: application/json\r\n"
        return name, head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body)

    async def read_stream(self, client: Client, prompt: int, chat: bool, pause_s: float = 0.0) -> str:
        status, headers = await client.head()
        if status != 200:
            async with asyncio.timeout(PATIENCE_S):
                body = await client.reader.readexactly(int(headers["content-length"]))
            if not json.loads(body)["error"]["message"]:
                raise Lost(f"{status} without a message")
            return "failed"
        data = b""
        while piece := await client.chunk():
            data += piece
            if pause_s:
                await asyncio.sleep(pause_s)
        *events, done, rest = [event.removeprefix(b"data: ") for event in data.split(b"\n\n")]
        if (done, rest) != (b"[DONE]", b""):
            raise Lost(f"a stream that ends with {data[-80:]!r}")
        values = [json.loads(event) for event in events]
        if "error" in values[-1]:
            if not values[-1]["error"]["code"]:
                raise Lost("an error without a code")
            return "failed"
        choices = [value["choices"][0] for value in values if value["choices"]]
        text = "".join((choice["delta"].get("content") if chat else choice["text"]) or "" for choice in choices)
        expected = self._texts.setdefault((prompt, chat), text)
        if text != expected:
            raise Lost(f"the text differs: {len(text)} characters, not {len(expected)}")
        if [choice["finish_reason"] for choice in choices if choice["finish_reason"]] != ["length"]:
            raise Lost("a stream without one finish reason")
        return "completed"

    async def streams(self) -> list[str]:
        prompt, chat = self.rng.randrange(len(PROMPTS)), self.rng.random() < 0.5
        async with Client(self.port) as client:
            verdicts = []
            for _ in range(self.rng.randrange(1, 4)):
                client.writer.write(self.request(stream=True, prompt=prompt, chat=chat)[1])
                verdicts.append(await self.judged(self.read_stream(client, prompt, chat)))
                if verdicts[-1] != "completed":
                    break
            return verdicts

    async def slow_reader(self) -> list[str]:
        prompt = self.rng.randrange(len(PROMPTS))
        async with Client(self.port) as client:
            client.writer.write(self.request(stream=True, prompt=prompt, chat=True)[1])
            return [await self.judged(self.read_stream(client, prompt, True, pause_s=0.05))]

    async def slow_writer(self) -> list[str]:
        name, data = self.request(stream=False, prompt=self.rng.randrange(len(PROMPTS)), chat=True)
        async with Client(self.port) as client:
            for start in range(0, len(data), 97):
                client.writer.write(data[start : start + 97])
                await asyncio.sleep(0.01)
            return [await self.judged(client.whole(name))]

    async def pipelines(self) -> list[str]:
        asked = [
            self.request(stream=False, prompt=self.rng.randrange(len(PROMPTS)), chat=True, max_tokens=8)
            for _ in range(4)
        ]
        async with Client(self.port) as client:
            client.writer.write(b"".join(data for _, data in asked))
            return [await self.judged(client.whole(name)) for name, _ in asked]

    async def leaves(self) -> list[str]:
        """Goes away while it waits, or inside a stream."""
        prompt = self.rng.randrange(len(PROMPTS))
        async with Client(self.port) as client:
            client.writer.write(self.request(stream=self.rng.random() < 0.8, prompt=prompt, chat=True)[1])
            await client.writer.drain()
            with contextlib.suppress(TimeoutError, ValueError, asyncio.IncompleteReadError):
                async with asyncio.timeout(self.rng.uniform(0.02, 0.3)):
                    await client.head()
                    for _ in range(self.rng.randrange(TOKENS)):
                        await client.chunk()
            return ["cancelled"]

    async def big_body(self) -> list[str]:
        size = self.rng.randrange(1, 4) << 20
        message = {"role": "user", "content": "x" * size}
        name, data = self.raw(json.dumps({"model": MODEL, "messages": [message], "max_tokens": 1}).encode())
        async with Client(self.port) as client:
            client.writer.write(data)
            return [await self.judged(client.whole(name))]

    async def broken_body(self) -> list[str]:
        name, data = self.raw(
            self.rng.choice((b"{", b'{"model": 1}', b'{"model": "soak"}', b'{"model": "other"}', b""))
        )
        async with Client(self.port) as client:
            client.writer.write(data)
            return [await self.judged(client.whole(name))]

    KINDS: tuple[tuple[Callable[[Soak], Awaitable[list[str]]], int], ...] = (
        (streams, 8),
        (slow_reader, 2),
        (slow_writer, 1),
        (pipelines, 3),
        (leaves, 4),
        (big_body, 1),
        (broken_body, 1),
    )

    async def judged(self, verdict: Awaitable[str]) -> str:
        try:
            return await verdict
        except (Lost, OSError, TimeoutError, ValueError, KeyError, LookupError, asyncio.IncompleteReadError) as error:
            self.unclear.append(f"{type(error).__name__}: {error}")
            return "unclear"

    async def user(self, until: float) -> None:
        kinds, weights = zip(*self.KINDS, strict=True)
        while time.monotonic() < until:
            (kind,) = self.rng.choices(kinds, weights)
            verdicts = await kind(self)
            self.kinds[kind.__name__] += len(verdicts)
            self.verdicts.update(verdicts)
            await asyncio.sleep(self.rng.expovariate(5.0))

    # The whole

    async def run(self) -> dict[str, Any]:
        for port in self.ports:
            self.start_worker(port)
        router = self.start_router()
        try:
            async with httpx.AsyncClient(timeout=10.0) as client:
                await self._until_ready(client)
                before = await self._state(client, router.pid)
                until = time.monotonic() + self.seconds
                watching = asyncio.create_task(self._watch(router.pid))
                await asyncio.gather(self.killer(until), *(self.user(until) for _ in range(self.clients)))
                watching.cancel()
                after = await self._settled(client, router.pid, before)
        finally:
            for process in (router, *self.workers.values()):
                process.kill()
                process.wait()
        return self._result(before, after)

    async def _until_ready(self, client: httpx.AsyncClient) -> None:
        """Ready, and each worker once asked: what is opened lazily is open."""
        async with asyncio.timeout(PATIENCE_S):
            for url in (*(f"{base}/health" for base in urls(self.ports)), f"http://127.0.0.1:{self.admin}/readyz"):
                while True:
                    with contextlib.suppress(httpx.HTTPError):
                        if (await client.get(url)).status_code == 200:
                            break
                    await asyncio.sleep(0.1)

    async def _watch(self, pid: int) -> None:
        while True:
            self.resident.append(resident_mib(pid))
            await asyncio.sleep(self.seconds / 100)

    async def _metrics(self, client: httpx.AsyncClient) -> dict[str, float]:
        """Sums over labels."""
        text = (await client.get(f"http://127.0.0.1:{self.admin}/metrics")).text
        sums: Counter[str] = Counter()
        for line in text.splitlines():
            if line.startswith("kvfleet_router_"):
                name, _, value = line.rpartition(" ")
                sums[name.partition("{")[0].removeprefix("kvfleet_router_")] += float(value)
                if "requests_total{" in name:
                    sums["outcome " + name.partition('outcome="')[2].partition('"')[0]] += float(value)
        return dict(sums)

    async def _state(self, client: httpx.AsyncClient, pid: int) -> dict[str, float]:
        state = await self._metrics(client)
        state["files"] = open_files(pid)
        return state

    async def _settled(self, client: httpx.AsyncClient, pid: int, before: dict[str, float]) -> dict[str, float]:
        """As soon as nothing is open any more that was not before, or SETTLE_S later."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            state = await self._state(client, pid)
            left = [
                name for name in ("in_flight", "client_connections", "tasks", "files") if state[name] > before[name]
            ]
            if not left or time.monotonic() > deadline:
                return state
            await asyncio.sleep(0.5)

    def _result(self, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
        outcomes = {name.split(" ")[1]: int(value) for name, value in after.items() if name.startswith("outcome ")}
        sent = sum(self.verdicts.values())
        quarter = max(len(self.resident) // 4, 1)
        second, last = self.resident[quarter : 2 * quarter], self.resident[-quarter:]
        growth = statistics.median(last) - statistics.median(second or last)
        checks = {
            "every request ended clearly": not self.verdicts["unclear"],
            "the router counted each request once": sum(outcomes.values()) == sent,
            "nothing is in flight, queued or held": not any(
                after[name] for name in ("in_flight", "worker_in_flight", "queue_depth", "request_body_bytes")
            ),
            "no client connection is left": after["client_connections"] == before["client_connections"],
            "no task is left": after["tasks"] <= before["tasks"],
            "no file is left open": after["files"] <= before["files"],
            "memory is flat": growth < GROWTH_MIB,
            "workers were killed under load": sum(self.kills.values()) > 0 and self.verdicts["completed"] > 0,
        }
        return {
            "seconds": self.seconds,
            "requests": sent,
            "verdicts": dict(self.verdicts),
            "kinds": dict(self.kinds),
            "router's outcomes": outcomes,
            "kills": dict(self.kills),
            "tries on another worker": int(after["retries_total"]),
            "tasks before, after": [int(before["tasks"]), int(after["tasks"])],
            "files before, after": [int(before["files"]), int(after["files"])],
            "router MiB in the second quarter, the last": [
                round(statistics.median(part), 1) for part in (second, last)
            ],
            "router MiB, ten times": [round(size) for size in self.resident[:: max(len(self.resident) // 10, 1)]],
            "unclear": self.unclear[:10],
            "checks": checks,
        }


def open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the load lasts")
    parser.add_argument("--clients", type=int, default=24, help="requests at once, about")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = asyncio.run(Soak(arguments, Path(name)).run())
    for key, value in result.items():
        if key != "checks":
            print(f"{key:46} {json.dumps(value)}")
    for check, holds in result["checks"].items():
        print(f"{'ok' if holds else 'NOT SO':46} {check}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
