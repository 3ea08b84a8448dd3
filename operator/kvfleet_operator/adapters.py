"""Running workers get the adapters of their pool, over their own HTTP API; what came of it goes into the world.

    GET /v1/models → reconcile.adapters.calls → POST /v1/load_lora_adapter, /v1/unload_lora_adapter → GET /v1/models

A worker is asked when it becomes ready, when its pool's list changes, and every `CALM_S` besides; where something went
wrong, again after a time that doubles up to `LAST_RETRY_S`. Workers are looked after side by side, the calls to one of
them one after another: a load may take as long as a download. Nothing here is needed for a worker to start (`reconcile.lora`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import httpx
from prometheus_client import Counter

from kvfleet_api.modelpool import ModelPool
from kvfleet_operator.api import NotLeader
from kvfleet_operator.exchange import NoAnswer, base_url, exchange
from kvfleet_operator.metrics import Metrics
from kvfleet_operator.reconcile import adapters, lora
from kvfleet_operator.reconcile.adapters import WORKER, Call, NoList, WorkerAdapters
from kvfleet_operator.reconcile.dependents import Key
from kvfleet_operator.workertls import Identity, ReadConfigMap, WorkerClients, identity_of
from kvfleet_operator.world import World

logger = logging.getLogger(__name__)
EAGER_S: Final = 1.0
CALM_S: Final = 30.0
LAST_RETRY_S: Final = 60.0
ASK_S: Final = 5.0
LOAD_S: Final = 600.0
"""A load may download. One that takes longer goes on in the engine, and is seen to be done later."""
SILENCES: Final = 3
"""Times in a row a worker must not have answered before that is told."""
PARALLEL: Final = 128


@dataclass(frozen=True, slots=True)
class _Worker:
    """A ready worker, and what it should have."""

    pool: Key
    name: str
    url: str
    identity: Identity | None
    incarnation: str
    wanted: tuple[tuple[str, str], ...]
    static: frozenset[str]

    @property
    def id(self) -> tuple[str, str]:
        return self.pool.namespace or "default", self.name


@dataclass(slots=True)
class _Turn:
    """When a worker's turn comes next, and what it was about when it last came."""

    worker: _Worker
    due: float
    failures: int = 0
    busy: bool = False


class AdapterLoader:
    def __init__(
        self,
        world: World,
        on_report: Callable[[Key], None],
        metrics: Metrics,
        read: ReadConfigMap,
        *,
        fence: Callable[[], None] = lambda: None,
        eager_s: float = EAGER_S,
        calm_s: float = CALM_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_report(pool)` is called when something new is known of one of its workers; `read` gives ConfigMaps, with the authorities
        to trust; `fence` is called before each change."""
        self._world = world
        self._on_report = on_report
        self._fence = fence
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._clients = WorkerClients(read, options={"limits": unlimited})
        self._eager_s = eager_s
        self._calm_s = calm_s
        self._clock = clock
        self._turns: dict[tuple[str, str], _Turn] = {}
        self._limit = asyncio.Semaphore(PARALLEL)
        self._calls = Counter(
            "kvfleet_operator_adapter_calls",
            "Requests to workers by action (load, unload) and result (done, failed).",
            ["action", "result"],
            registry=metrics.registry,
        )

    async def run(self) -> None:
        """For ever. Ends with NotLeader where the Lease is lost."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    for turn in self._due():
                        turn.busy = True
                        group.create_task(self._take(turn))
                    await asyncio.sleep(self._eager_s)
        finally:
            await self._clients.aclose()

    async def first(self) -> None:
        """Learn what every worker has, and change nothing yet: conditions are judged by it after a start."""
        await asyncio.gather(*(self._look(worker) for worker in self._workers()))

    def _workers(self) -> list[_Worker]:
        return [worker for pool in self._world.pools() for worker in self._workers_of(pool)]

    def _workers_of(self, pool: ModelPool) -> list[_Worker]:
        key = Key("ModelPool", pool.metadata.namespace, pool.metadata.name)
        wanted, static = tuple(adapters.wanted(pool.spec).items()), frozenset(lora.static_names(pool.spec))
        identity, port = identity_of(pool), pool.spec.engine.port
        return [
            _Worker(
                key, name, base_url(pod.ip, port, tls=identity is not None), identity, pod.incarnation, wanted, static
            )
            for name, pod in self._world.lora_workers(pool).items()
        ]

    def _due(self) -> list[_Turn]:
        now, present = self._clock(), {worker.id: worker for worker in self._workers()}
        self._turns = {id_: turn for id_, turn in self._turns.items() if id_ in present or turn.busy}
        for id_, worker in present.items():
            turn = self._turns.setdefault(id_, _Turn(worker, now))
            if turn.worker != worker and not turn.busy:
                turn.worker, turn.due, turn.failures = worker, now, 0
        return [turn for turn in self._turns.values() if turn.due <= now and not turn.busy]

    async def _take(self, turn: _Turn) -> None:
        fine = False
        try:
            async with self._limit:
                fine = await self._attend(turn)
        except NotLeader:
            raise
        except Exception:
            logger.exception(
                "%s: looking after worker %s failed; will be tried again", turn.worker.pool, turn.worker.name
            )
        turn.failures = 0 if fine else turn.failures + 1
        retry_s = min(LAST_RETRY_S, self._eager_s * 2 ** min(turn.failures, 20))
        turn.due = self._clock() + (self._calm_s if fine else retry_s)
        turn.busy = False

    async def _attend(self, turn: _Turn) -> bool:
        """Bring one worker's adapters about. False where something is to be tried again."""
        worker = turn.worker
        try:
            loaded = await self._loaded(worker)
            failures: dict[str, str] = {}
            todo = adapters.calls(dict(worker.wanted), loaded, worker.static)
            for call in todo:
                if problem := await self._call(worker, call):
                    failures[call.name] = problem
            if todo:
                loaded = await self._loaded(worker)
        except (NoAnswer, NoList) as error:
            logger.debug("%s: worker %s: %s", worker.pool, worker.name, error)
            if turn.failures + 1 >= SILENCES:
                known = self._world.adapters.get(worker.id, WorkerAdapters())
                self._tell(worker, WorkerAdapters(known.loaded, {WORKER: str(error)}))
            return False
        self._tell(worker, WorkerAdapters(loaded, failures))
        return not failures

    async def _look(self, worker: _Worker) -> None:
        async with self._limit:
            try:
                self._tell(worker, WorkerAdapters(await self._loaded(worker)))
            except (NoAnswer, NoList) as error:
                logger.info("%s: worker %s: %s", worker.pool, worker.name, error)

    async def _loaded(self, worker: _Worker) -> dict[str, str]:
        client = await self._clients.of(worker.identity)
        url, extensions = f"{worker.url}/v1/models", client.extensions
        status, body = await exchange(client.http, "GET", url, timeout_s=ASK_S, extensions=extensions)
        if status != 200:
            raise NoList(f"GET {worker.url}/v1/models: HTTP {status}")
        return adapters.read_models(body)

    async def _call(self, worker: _Worker, call: Call) -> str | None:
        """What is wrong afterwards, if anything."""
        client = await self._clients.of(worker.identity)
        url, extensions = f"{worker.url}{call.path}", client.extensions
        self._fence()
        status, body = await exchange(client.http, "POST", url, json=call.body, timeout_s=LOAD_S, extensions=extensions)
        problem = adapters.verdict(call, status, body)
        self._calls.labels(call.action, "failed" if problem else "done").inc()
        known = self._world.adapters.get(worker.id, WorkerAdapters()).failures.get(call.name)
        level = logging.INFO if problem is None else logging.DEBUG if problem == known else logging.WARNING
        logger.log(
            level, "%s: worker %s: %s %s: %s", worker.pool, worker.name, call.action, call.name, problem or "done"
        )
        return problem

    def _tell(self, worker: _Worker, found: WorkerAdapters) -> None:
        gone = self._world.get(Key("Pod", *worker.id)) is None
        if not gone and self._world.adapters.get(worker.id) != found:
            self._world.adapters[worker.id] = found
            self._on_report(worker.pool)
