"""The process beside the router processes: their admin port as one, and the way to other pods.

    /metrics       summed over the processes (merge.py)
    /readyz        ready when all are
    /decisions     the latest of all; /decisions/{id} from whichever has it
    /workers, /loaded, and all other paths: merged, or any one's answer where all say the same

With Redis it also passes on what the processes tell each other to other pods, and what those tell to the processes. Its end is
no harm to requests: it is started again, and meanwhile only this pod's processes know of each other.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from kvfleet_api.fleetrouter import LimitsSpec
from kvfleet_router.io import wire
from kvfleet_router.io.admin import DEFAULT_LIMIT, MAX_LIMIT
from kvfleet_router.io.connection import ClientConnection, Waiting
from kvfleet_router.io.metrics import PREFIX
from kvfleet_router.io.processes import merge
from kvfleet_router.io.request import Request
from kvfleet_router.io.server import Server
from kvfleet_router.io.sharing.local import LocalBus
from kvfleet_router.io.sharing.redis_bus import RedisBus

log = logging.getLogger("kvfleet.router")

ASK_TIMEOUT_S = 1.5
"""Less than a probe's."""
SWEEP_S = 0.25
DRAIN_S = 1.0
MAX_ANSWER_BYTES = 1 << 27

Reply = tuple[int, bytes, bytes]
"""(status, body, content type)"""


class Hub(Collector):
    """The admin port's Handler."""

    def __init__(self, paths: Sequence[Path], redis: RedisBus | None) -> None:
        self._clients = {
            path.name: httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://router", timeout=ASK_TIMEOUT_S
            )
            for path in paths
        }
        self._redis = redis
        self._metrics = merge.MetricsMerge()
        self._answering: set[str] = set()
        self._seen: set[str] = set()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, request: Request, connection: ClientConnection) -> None:
        waiting = Waiting()
        connection.answer = waiting
        target = request.target.decode("ascii")
        if request.method in (b"GET", b"HEAD"):
            asked = self._merged(request.path, target)
        else:
            asked = self._passed_on(request.method.decode("ascii"), target, bytes(request.body))
        task = asyncio.create_task(self._answer(request.path, asked, connection, waiting))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(
        self, path: str, asked: Coroutine[Any, Any, Reply], connection: ClientConnection, waiting: Waiting
    ) -> None:
        try:
            status, body, content_type = await asked
        except Exception as error:  # an answer all the same: somebody waits for it
            log.exception("the processes' answers to %s could not be merged", path)
            status, content_type = 502, wire.JSON
            body = wire.error_object(502, f"The processes' answers cannot be merged: {error}.", code="bad_answers")
        if not waiting.gone:
            connection.reply(status, body, content_type=content_type)

    async def _merged(self, path: str, target: str) -> Reply:
        answers = await self._ask_all(target)
        good = [answer for answer in answers.values() if answer is not None and answer.status_code == 200]
        if path == "/metrics":
            texts = {
                name: None if answer is None or answer.status_code != 200 else answer.text
                for name, answer in answers.items()
            }
            own = generate_latest(self._registry).decode()
            return 200, self._metrics.merge({**texts, "hub": own}), CONTENT_TYPE_PLAIN_0_0_4.encode()
        if path == "/readyz":
            told = [answer.json() for answer in answers.values() if answer is not None]
            complete = len(self._seen) == len(self._clients)
            return *merge.ready(told, len(answers) - len(told), complete=complete), wire.JSON
        merged = MERGES.get(path)
        if good and merged is not None:
            return 200, merged([answer.json() for answer in good], target), wire.JSON
        if good and path.startswith("/decisions/"):
            latest = max(good, key=lambda answer: answer.json()["time"])
            return 200, latest.content, wire.JSON
        return _one_of([*good, *answers.values()])

    async def _passed_on(self, method: str, target: str, body: bytes) -> Reply:
        """What any one process answers: they all know the same."""
        for client in self._clients.values():
            answer = await self._ask(client, target, method, body)
            if answer is not None:
                return _one_of([answer])
        return _one_of([])

    async def _ask_all(self, target: str) -> dict[str, httpx.Response | None]:
        """Each process's answer, by its name; none where it gave none."""
        answers = await asyncio.gather(*(self._ask(client, target) for client in self._clients.values()))
        asked = dict(zip(self._clients, answers, strict=True))
        self._answering = {name for name, answer in asked.items() if answer is not None}
        self._seen |= self._answering
        return asked

    async def _ask(
        self, client: httpx.AsyncClient, target: str, method: str = "GET", body: bytes = b""
    ) -> httpx.Response | None:
        try:
            answer = await client.request(method, target, content=body)
        except httpx.HTTPError:
            return None
        return answer if len(answer.content) <= MAX_ANSWER_BYTES else None

    def collect(self) -> list[Metric]:
        processes = GaugeMetricFamily(PREFIX + "processes", "Router processes of this pod.", labels=("state",))
        processes.add_metric(("wanted",), len(self._clients))
        processes.add_metric(("answering",), len(self._answering))
        return [processes, *(self._redis.metrics() if self._redis is not None else ())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for client in self._clients.values():
            await client.aclose()


def _one_of(answers: Sequence[httpx.Response | None]) -> Reply:
    """The first that there is."""
    for answer in answers:
        if answer is not None:
            return answer.status_code, answer.content, answer.headers.get("content-type", "").encode()
    return 503, wire.error_object(503, "No router process answers.", code="no_process"), wire.JSON


def _limit(target: str) -> int:
    """Of /decisions; the processes have refused what is no number."""
    text = parse_qs(target.partition("?")[2]).get("limit", [str(DEFAULT_LIMIT)])[-1]
    return min(int(text), MAX_LIMIT)


MERGES: dict[str, Callable[[Sequence[Any], str], bytes]] = {
    "/decisions": lambda documents, target: merge.decisions(documents, _limit(target)),
    "/workers": lambda documents, target: merge.workers(documents),
    "/loaded": lambda documents, target: merge.loaded(documents),
}


def run_hub(
    paths: Sequence[Path],
    admin: Sequence[socket.socket],
    limits: LimitsSpec,
    local: LocalBus | None,
    redis: RedisBus | None,
) -> None:
    """Serve until SIGTERM. `paths`: where the processes answer; `admin`: the admin port's sockets."""
    uvloop.run(_run(paths, admin, limits, local, redis))


async def _run(
    paths: Sequence[Path],
    admin: Sequence[socket.socket],
    limits: LimitsSpec,
    local: LocalBus | None,
    redis: RedisBus | None,
) -> None:
    loop = asyncio.get_running_loop()
    leave = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave.set)
    if local is not None and redis is not None:
        local.start(redis.send)
        redis.start(local.send)
    hub = Hub(paths, redis)
    server = Server(hub, limits)
    await server.listen_on(admin)
    while not leave.is_set():
        server.sweep(time.monotonic())
        try:
            await asyncio.wait_for(leave.wait(), SWEEP_S)
        except TimeoutError:
            continue
    await server.drain(DRAIN_S)
    await hub.close()
    if local is not None and redis is not None:
        await redis.close()
        await local.close()
