"""Where the router's own time goes in one request: its steps one by one, without sockets, kernel and event loop.

    python bench/profile_request.py                     the table of docs/performance.md
    python bench/profile_request.py --bytes 1024 --requests 20000 --strategy round_robin

One router in this process, four workers that cost nothing, 32 requests under way, transports that only count. `client bytes` is all that happens
between a request's bytes and its bytes to the worker; `worker bytes` all between the answer's bytes and the end of the
accounting; the steps below each are measured by themselves, so they need not add up to it. CPU time of this process by
`time.process_time_ns`, the cost of asking for it taken off; mean without the slowest tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import orjson
from dataplane_peers import idle_fleet

from kvfleet_router.app import GC_THRESHOLDS, RouterApp, give_large_memory_back
from kvfleet_router.core import dispatcher as dispatcher_module
from kvfleet_router.core.choose import choose
from kvfleet_router.core.hashing import block_hashes, seed_of
from kvfleet_router.core.parse import read_request
from kvfleet_router.io.connection import ClientConnection
from kvfleet_router.io.exchange import Exchange
from kvfleet_router.io.request import Request
from kvfleet_router.io.templates import HeadTemplate
from kvfleet_router.io.upstream import UpstreamConnection
from kvfleet_router.io.usage import read_usage

WORKERS, UNDER_WAY, BLOCK_BYTES = 4, 32, 256
WARM_UP = 5000
"""Requests before any is measured: the log of decisions is full then, and each new one overwrites another."""
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nContent-Type: application/json\r\nAccept: */*\r\n"
    b"Authorization: Bearer sk-bench\r\nContent-Length: %d\r\n\r\n"
)
_ANSWER_BODY = orjson.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "An answer."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 256, "completion_tokens": 10, "total_tokens": 266},
    }
)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(_ANSWER_BODY),
    _ANSWER_BODY,
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = b'data: {"id":"chatcmpl-bench","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
STREAM_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Sink:
    """A transport that goes nowhere."""

    def write(self, data: bytes) -> None: ...
    def writelines(self, pieces: object) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_extra_info(self, name: str) -> Any:
        return self

    def is_closing(self) -> bool:
        return False

    family = 0


class Times:
    """CPU microseconds by step."""

    def __init__(self) -> None:
        self.samples: dict[str, list[int]] = {}
        begin = time.process_time_ns()
        for _ in range(2000):
            time.process_time_ns()
        self.clock_ns = (time.process_time_ns() - begin) / 2001

    def of(self, step: str, call: Callable[[], Any]) -> Any:
        begin = time.process_time_ns()
        result = call()
        self.samples.setdefault(step, []).append(time.process_time_ns() - begin)
        return result

    def mean_us(self, step: str) -> float:
        samples = sorted(self.samples[step])
        kept = samples[: max(len(samples) * 9 // 10, 1)]
        return max(sum(kept) / len(kept) - self.clock_ns, 0.0) / 1000


class Profile:
    def __init__(self, app: RouterApp, size: int) -> None:
        self.app = app
        self.times = Times()
        self.rng = random.Random(5)
        self.size = size
        self.shared = [self.text(size // 2) for _ in range(8)]
        self.idle: deque[ClientConnection] = deque(self.client() for _ in range(UNDER_WAY + 1))
        self.running: deque[ClientConnection] = deque()
        self.upstreams: list[UpstreamConnection] = []
        for worker in app.dispatcher.workers():
            origin = app.upstreams.origin(worker)
            for _ in range(UNDER_WAY + 1):
                upstream = UpstreamConnection(origin)
                upstream.connection_made(cast(asyncio.BaseTransport, Sink()))
                origin.keep(upstream)

    def client(self) -> ClientConnection:
        connection = ClientConnection(self.app.server)
        connection.connection_made(cast(asyncio.BaseTransport, Sink()))
        return connection

    def text(self, size: int) -> str:
        return self.rng.randbytes(size // 2 + 1).hex()[:size]

    def body(self, stream: bool) -> bytes:
        system, user = self.rng.choice(self.shared), self.text(self.size // 2)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return orjson.dumps(
            {"model": "bench", "messages": messages, "temperature": 0, "max_tokens": 16, "stream": stream}
        )

    def one(self, *, stream: bool = False) -> None:
        """A request comes, and the oldest one under way is answered."""
        body = self.body(stream)
        data = HEAD % len(body) + body
        client = self.idle.popleft()
        self.times.of("client bytes" + " (stream)" * stream, partial(client.data_received, data))
        if isinstance(client.answer, Exchange) and client.answer.upstream is not None:
            self.running.append(client)
        else:  # held: workers that cost nothing have no backlog to wait for
            raise RuntimeError("a request was not sent at once")
        self.steps(data, body)
        while len(self.running) > UNDER_WAY:
            client = self.running.popleft()
            upstream = cast(Exchange, client.answer).upstream
            assert upstream is not None
            if stream:
                upstream.data_received(STREAM_HEAD + CHUNK)
                for _ in range(8):
                    self.times.of("a token's bytes", partial(upstream.data_received, CHUNK))
                upstream.data_received(STREAM_END)
            else:
                self.times.of("worker bytes", partial(upstream.data_received, ANSWER))
            self.idle.append(client)

    def steps(self, data: bytes, body: bytes) -> None:
        """What `client bytes` consists of, each step by itself."""
        times, app, rng = self.times, self.app, self.rng
        request = Request()
        head = data[: len(data) - len(body)]
        times.of("head, parsed", partial(request.read_head, head))
        template = HeadTemplate.of(head, request)
        assert template is not None
        times.of("head, by comparison", partial(template.read, data))
        parsed = times.of("body", partial(read_request, request.path, body, request.headers))
        seed = seed_of(parsed.model, None, BLOCK_BYTES)
        blocks = times.of("hash", partial(block_hashes, parsed.prompt, seed=seed, block_bytes=BLOCK_BYTES))
        dispatcher = app.dispatcher
        times.of("look-up", partial(dispatcher._fleet.index.match, blocks))
        lane = dispatcher._routes.find(parsed)
        now = app.clock()
        arrival = times.of("arrival, with hash", partial(dispatcher._arrival, parsed, "bench", lane, now))
        candidates = arrival.lane.candidates(arrival, rng)
        fleet = dispatcher._fleet
        times.of("choose, with look-up", partial(choose, arrival, candidates, fleet.index, fleet.table, rng, now))
        times.of("usage", partial(read_usage, ANSWER))


STEPS = (
    "client bytes",
    "head, parsed",
    "head, by comparison",
    "body",
    "hash",
    "look-up",
    "arrival, with hash",
    "choose, with look-up",
    "worker bytes",
    "usage",
    "client bytes (stream)",
    "a token's bytes",
)


async def measure(size: int, requests: int, strategy: str) -> dict[str, float]:
    app = RouterApp(
        idle_fleet(range(9, 9 + WORKERS), strategy), host="127.0.0.1", port=0, admin_host="127.0.0.1", admin_port=0
    )
    await app.start()
    app.server.handler = app.proxy
    profile = Profile(app, size)
    for _ in range(max(requests // 10, WARM_UP)):
        profile.one()
    profile.times.samples.clear()
    for _ in range(requests):
        profile.one()
    for _ in range(requests // 4):
        profile.one(stream=True)
    await app.stop(0.0)
    return {step: profile.times.mean_us(step) for step in STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, nargs="+", default=[1024, 32768], help="of a prompt")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--strategy", default="kvfleet")
    arguments = parser.parse_args()
    give_large_memory_back()  # as `kvfleet router` does
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    plain = Path(dispatcher_module.__file__).suffix == ".py"
    columns = [asyncio.run(measure(size, arguments.requests, arguments.strategy)) for size in arguments.bytes]
    build = f"{'plain' if plain else 'compiled'}, Python {sys.version.split()[0]}"
    print(f"| CPU us, {arguments.strategy}, {build} | {' | '.join(f'{size} B' for size in arguments.bytes)} |")
    print(f"| --- |{' --- |' * len(columns)}")
    for step in STEPS:
        print(f"| {step} | {' | '.join(f'{column[step]:.1f}' for column in columns)} |")


if __name__ == "__main__":
    main()
