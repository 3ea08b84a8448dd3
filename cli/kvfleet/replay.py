"""Replays a trace against an OpenAI endpoint and measures what a client sees.

Requests leave at the trace's times, whatever the answers do (open loop): a slow server cannot slow its own load down.
Each request is a streamed chat completion with usage; a connection is used once. `speed` compresses time: arrivals come
`speed` times faster, and every latency is reported in the trace's seconds, multiplied back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

from kvfleet_sim.traces import TraceRow, prompt_text

USAGE_TAIL_BYTES = 4096
"""The last bytes of a stream kept for the usage chunk."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one request got. Times in the trace's seconds."""

    row: TraceRow
    ok: bool
    ttft_s: float
    e2e_s: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    worker: str = ""
    decision: str = ""
    error: str = ""

    @property
    def itl_s(self) -> float:
        """Mean time between tokens; 0 for a single token."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class _Stream(asyncio.Protocol):
    """One request on one connection; `done` resolves when the answer ended or the connection did."""

    def __init__(self, head: bytes, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._request = head + body
        self._clock = loop.time
        self.done: asyncio.Future[None] = loop.create_future()
        self.sent_s = 0.0
        self.first_s = 0.0
        self.last_s = 0.0
        self.status = 0
        self.headers: dict[str, str] = {}
        self.tail = b""
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.sent_s = self._clock()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.tail = str(error).encode()
            self._transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.last_s = self._clock()
        if not self.first_s:
            self.first_s = self.last_s
        self.tail = (self.tail + body)[-USAGE_TAIL_BYTES:]

    def on_message_complete(self) -> None:
        self.complete = True
        self._transport.close()
        self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def replay(
    rows: Sequence[TraceRow],
    *,
    url: str,
    model: str,
    speed: float = 1.0,
    timeout_s: float = 120.0,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Send every row to `url` (`http://host:port`) and return the outcomes in the rows' order.

    `timeout_s` is real time for one whole request; a request that exceeds it counts as failed.
    """
    start = asyncio.get_running_loop().time()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_one(row, start, url, model, speed, timeout_s, on_done)) for row in rows]
    return [task.result() for task in tasks]


async def _one(
    row: TraceRow,
    start: float,
    url: str,
    model: str,
    speed: float,
    timeout_s: float,
    on_done: Callable[[Outcome], None],
) -> Outcome:
    loop = asyncio.get_running_loop()
    due = start + row.arrival_s / speed
    # Build the body only when it is due: a trace's prompts together are larger than its rows.
    await asyncio.sleep(max(0.0, due - loop.time()))
    address = urlsplit(url)
    head, body = _request(row, address.netloc, model)
    stream = _Stream(head, body)
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(lambda: stream, address.hostname or "", address.port or 80)
            await stream.done
        outcome = _outcome(row, stream, speed)
    except TimeoutError:
        stream._transport.abort()
        outcome = Outcome(row, ok=False, ttft_s=0.0, e2e_s=0.0, error=f"no complete answer within {timeout_s:g} s")
    except OSError as error:
        outcome = Outcome(row, ok=False, ttft_s=0.0, e2e_s=0.0, error=f"connection failed: {error}")
    on_done(outcome)
    return outcome


def _request(row: TraceRow, host: str, model: str) -> tuple[bytes, bytes]:
    body = orjson.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt_text(row)}],
            "max_tokens": row.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode(), body


def _outcome(row: TraceRow, stream: _Stream, speed: float) -> Outcome:
    usage = _usage(stream.tail)
    error = ""
    if stream.status != 200:
        error = f"HTTP {stream.status}: {stream.tail[:200].decode('utf-8', 'replace')}"
    elif not stream.complete or not stream.tail.endswith(b"data: [DONE]\n\n"):
        error = "the stream ended before [DONE]"
    elif usage.get("completion_tokens") != row.output_tokens:
        error = f"{usage.get('completion_tokens')} tokens instead of {row.output_tokens}"
    return Outcome(
        row,
        ok=not error,
        ttft_s=(stream.first_s - stream.sent_s) * speed,
        e2e_s=(stream.last_s - stream.sent_s) * speed,
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        output_tokens=usage.get("completion_tokens", 0),
        worker=stream.headers.get("x-kvfleet-worker", ""),
        decision=stream.headers.get("x-kvfleet-decision", ""),
        error=error,
    )


def _usage(tail: bytes) -> dict[str, Any]:
    """`usage` of the last chunk before [DONE]; empty where there is none."""
    for line in reversed(tail.split(b"\n\n")):
        if line.startswith(b"data: {"):
            try:
                return dict(orjson.loads(line[6:]).get("usage") or {})
            except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError):
                return {}
    return {}
