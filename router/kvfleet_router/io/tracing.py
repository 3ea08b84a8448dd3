"""OpenTelemetry: a span per request, sent to a collector by OTLP over HTTP in JSON, where `--otlp-endpoint` says one.

At a request's end a tuple goes into a bounded queue; once a second a task makes spans of what is there and sends them. A
collector that is away costs spans, counted, never a request. The client's `traceparent` (W3C) makes the span part of its trace
and says whether it is sampled; it goes on to the worker as it came. Requests without one are traces of their own, of which
a share is sampled.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import httpx
import orjson
from prometheus_client.core import CounterMetricFamily, Metric

if TYPE_CHECKING:
    from kvfleet_router.io.exchange import Exchange
    from kvfleet_router.io.usage import Usage

log = logging.getLogger("kvfleet.router")

MAX_QUEUED: Final = 16_384
BATCH: Final = 512
EVERY_S: Final = 1.0
SEND_TIMEOUT_S: Final = 5.0
PREFIX: Final = "kvfleet_router_"
SERVER_KIND: Final = 2
UNSET, ERROR = 0, 2
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class Ended(NamedTuple):
    """A request that has ended, as the hot path leaves it."""

    trace_id: bytes
    """In hex; empty: a new trace."""
    parent_id: bytes
    path: str
    request_id: bytes
    model: str
    outcome: str
    cause: str
    decision: str
    worker: str
    pool: str
    policy: str
    tries: int
    started_at: float
    first_byte_at: float
    ended_at: float
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None


class Tracer:
    def __init__(
        self, endpoint: str, *, clock: Callable[[], float], epoch_s: float, rng: random.Random, share: float = 1.0
    ) -> None:
        """`endpoint`: the collector's base URL, such as http://localhost:4318. `epoch_s`: what makes Unix time of the clock's.
        `share`: of the requests that carry no `traceparent`, how many are sampled."""
        self.url = f"{endpoint.rstrip('/')}/v1/traces"
        self._clock = clock
        self._epoch_s = epoch_s
        self._rng = rng
        self._share = share
        self._queue: deque[Ended] = deque()
        self.sent = self.dropped = 0
        self._failing = False

    # The exchanges call

    def ended(self, exchange: Exchange, outcome: str, cause: str = "", usage: Usage | None = None) -> None:
        """A request has ended, one way or another."""
        trace_id = parent_id = b""
        given = exchange.request.headers.get(b"traceparent")
        match = None if given is None else _TRACEPARENT.fullmatch(given)
        if match is not None and match[1].strip(b"0") and match[2].strip(b"0"):
            if not int(match[3], 16) & 1:
                return
            trace_id, parent_id = match[1], match[2]
        elif self._share < 1.0 and self._rng.random() >= self._share:
            return
        if len(self._queue) >= MAX_QUEUED:
            self.dropped += 1
            return
        ticket = exchange.ticket
        self._queue.append(
            Ended(
                trace_id,
                parent_id,
                exchange.request.path,
                exchange.request_id,
                exchange.parsed.model,
                outcome,
                cause,
                "" if ticket is None else ticket.id,
                "" if ticket is None else ticket.worker.name,
                "" if ticket is None else ticket.worker.pool,
                "" if ticket is None else ticket.policy.name,
                0 if ticket is None else ticket.attempt + 1,
                exchange.started_at,
                exchange.first_byte_at,
                self._clock(),
                None if usage is None else usage.prompt,
                None if usage is None else usage.output,
                None if usage is None else usage.cached,
            )
        )

    # The rest is off the hot path

    async def run(self) -> None:
        """Send what has queued up, until cancelled; then what is left."""
        async with httpx.AsyncClient(timeout=SEND_TIMEOUT_S) as client:
            try:
                while True:
                    await asyncio.sleep(EVERY_S)
                    while self._queue:
                        await self._send(client)
            except asyncio.CancelledError:
                if self._queue:
                    await self._send(client)
                raise

    def metrics(self) -> Iterator[Metric]:
        spans = CounterMetricFamily(PREFIX + "spans", "Spans of traces, by what became of them.", labels=("result",))
        spans.add_metric(("sent",), self.sent)
        spans.add_metric(("dropped",), self.dropped)
        yield spans

    async def _send(self, client: httpx.AsyncClient) -> None:
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), BATCH))]
        content = orjson.dumps(self.document(batch))
        try:
            answer = await client.post(self.url, content=content, headers={"content-type": "application/json"})
            answer.raise_for_status()
        except httpx.HTTPError as error:
            self.dropped += len(batch)
            if not self._failing:
                log.warning("spans are lost, %s did not take them: %r", self.url, error)
            self._failing = True
        else:
            self.sent += len(batch)
            self._failing = False

    def document(self, batch: list[Ended]) -> dict[str, Any]:
        """An OTLP ExportTraceServiceRequest, in the JSON encoding of protobuf."""
        resource = {"attributes": _attributes({"service.name": "kvfleet-router"})}
        spans = [self._span(ended) for ended in batch]
        return {
            "resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "kvfleet"}, "spans": spans}]}]
        }

    def _span(self, ended: Ended) -> dict[str, Any]:
        attributes = {
            "url.path": ended.path,
            "gen_ai.request.model": ended.model,
            "gen_ai.usage.input_tokens": ended.input_tokens,
            "gen_ai.usage.output_tokens": ended.output_tokens,
            "kvfleet.cached_tokens": ended.cached_tokens,
            "kvfleet.request_id": ended.request_id.decode("latin-1"),
            "kvfleet.outcome": ended.outcome,
            "kvfleet.decision": ended.decision,
            "kvfleet.worker": ended.worker,
            "kvfleet.pool": ended.pool,
            "kvfleet.policy": ended.policy,
            "kvfleet.tries": ended.tries or None,
            "error.type": ended.cause,
        }
        span: dict[str, Any] = {
            "traceId": ended.trace_id.decode() or f"{self._rng.getrandbits(128) or 1:032x}",
            "spanId": f"{self._rng.getrandbits(64) or 1:016x}",
            "name": f"{ended.path.rpartition('/')[2]} {ended.model}".strip(),
            "kind": SERVER_KIND,
            "startTimeUnixNano": self._nanoseconds(ended.started_at),
            "endTimeUnixNano": self._nanoseconds(ended.ended_at),
            "attributes": _attributes(attributes),
            "status": {"code": ERROR, "message": ended.cause} if ended.outcome == "failed" else {"code": UNSET},
        }
        if ended.parent_id:
            span["parentSpanId"] = ended.parent_id.decode()
        if ended.first_byte_at:
            span["events"] = [{"name": "first byte", "timeUnixNano": self._nanoseconds(ended.first_byte_at)}]
        return span

    def _nanoseconds(self, at: float) -> str:
        return str(int((at + self._epoch_s) * 1e9))


def _attributes(values: dict[str, str | int | None]) -> list[dict[str, Any]]:
    """Those that are not empty."""
    return [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for key, value in values.items()
        if value is not None and value != ""
    ]
