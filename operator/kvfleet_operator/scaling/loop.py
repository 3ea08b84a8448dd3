"""Round after round: look, read, decide, bring about.

    every period_s      all pools: signals → Autoscaler.step → replicas, marks, status
    every wake_s        pools at zero: has a router requests for one? is there a pool that is new, or that somebody else
                        scaled? Then the round of all pools comes at once.

Signals come from Prometheus where there is one. Whether a pool is idle is always asked of the routers themselves: what
Prometheus knows is as old as its last scrape. A round takes bounded time: what was not read by then counts as failed.
No error ends the loop but the loss of the Lease.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Final

from kvfleet_operator.api import ApiError, KubeApi, NotLeader
from kvfleet_operator.autoscale.autoscaler import Autoscaler
from kvfleet_operator.autoscale.budget import Budget
from kvfleet_operator.autoscale.readers.fetch import FetchError
from kvfleet_operator.autoscale.readers.routers import RouterReader
from kvfleet_operator.autoscale.readers.source import PoolQuestion, Reader
from kvfleet_operator.autoscale.readings import Reading, failed
from kvfleet_operator.autoscale.startup import StartupTimes
from kvfleet_operator.exchange import base_url
from kvfleet_operator.metrics import Metrics
from kvfleet_operator.resources import CONFIG_MAP, pod_address
from kvfleet_operator.scaling.effects import Effects
from kvfleet_operator.scaling.pools import ScaledPool, scaled_pools, step_of
from kvfleet_operator.scaling.sharing import shared
from kvfleet_operator.statuses import StatusWriter
from kvfleet_operator.workertls import WorkerClients, identity_of
from kvfleet_operator.world import World

logger = logging.getLogger(__name__)
History = Callable[[str, float, float, float], Awaitable[list[tuple[float, float]]]]
"""(query, start, end, step in Unix seconds) → (time, value). Raises FetchError."""
HISTORY_S: Final = 14 * 86_400
HISTORY_STEP_S: Final = 300
HISTORY_LIMIT_S: Final = 10.0
READ_LIMIT_S: Final = 30.0
"""What could not be read within this time counts as failed."""


@dataclass(frozen=True, slots=True)
class ScalerOptions:
    period_s: float = 15.0
    wake_s: float = 2.0
    read_limit_s: float = READ_LIMIT_S
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if self.period_s <= 0 or self.wake_s <= 0:
            raise ValueError("autoscaling seconds must be above 0: correct them")


class Scaler:
    def __init__(
        self,
        api: KubeApi,
        world: World,
        statuses: StatusWriter,
        metrics: Metrics,
        *,
        now: Callable[[], datetime],
        reader: Reader | None = None,
        history: History | None = None,
        options: ScalerOptions = ScalerOptions(),
        namespaces: Collection[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`reader` None: the routers themselves are asked for the signals. `history`: who knows their past, if anybody."""
        self._world = world
        self._metrics = metrics
        self._now = now
        self._routers = RouterReader()
        self._workers = WorkerClients(partial(api.get, CONFIG_MAP), options={"timeout": None})
        self._reader = reader or self._routers
        self._history = history
        self._options = options
        self._namespaces = namespaces
        self._clock = clock
        self._effects = Effects(api, world, statuses, self._routers)
        self._autoscaler = Autoscaler()
        self._round_at: float | None = None
        self._learned: set[str] = set()
        """Pools whose past was asked for."""
        self._startups: dict[str, StartupTimes] = {}
        self._left: dict[str, int] = {}
        """Pool → workers wanted as the last round left it."""

    async def run(self) -> None:
        """Until cancelled; raises NotLeader once this process may not write any more."""
        try:
            while True:
                try:
                    await self.look()
                except NotLeader:
                    raise
                except Exception:
                    self._metrics.scaling_rounds.labels("error").inc()
                    logger.exception("a round of autoscaling failed; the next one follows")
                await asyncio.sleep(min(self._options.wake_s, self._options.period_s))
        finally:
            await self._reader.aclose()
            await self._routers.aclose()
            await self._workers.aclose()

    async def look(self) -> bool:
        """A round, if it is time for one. True where there was one."""
        pools = scaled_pools(self._world, self._namespaces)
        if not await self._due(pools):
            return False
        self._round_at = started = self._clock()
        await self._round(pools)
        self._metrics.scaling_seconds.observe(self._clock() - started)
        return True

    async def _due(self, pools: Sequence[ScaledPool]) -> bool:
        if self._round_at is None or self._clock() - self._round_at >= self._options.period_s:
            return True
        if {pool.name: pool.workers.wanted for pool in pools} != self._left:
            return True
        asleep = [pool for pool in pools if pool.workers.wanted == 0]
        asked = [PoolQuestion(pool.activity[:1], pool.router_urls) for pool in asleep]
        busy = await self._read(self._routers, asked)
        return any(reading.value for [reading] in busy)

    async def _round(self, pools: Sequence[ScaledPool]) -> None:
        questions = [await self._question(pool) for pool in pools]
        activity_asked = [PoolQuestion(pool.activity, pool.router_urls) for pool in pools]
        readings, activity = await asyncio.gather(
            self._read(self._reader, questions), self._read(self._routers, activity_asked)
        )
        fleets = {pool.scope.namespace: self._world.fleet(pool.scope.namespace).config for pool in pools}
        readings = shared(pools, readings, fleets)
        await self._learn(pools)
        now = self._now()
        startups = self._measured(pools)
        steps = [step_of(*each) for each in zip(pools, readings, activity, startups, strict=True)]
        results = self._autoscaler.step(steps, now.timestamp(), self._options.budget)
        self._left = {pool.name: pool.workers.wanted for pool in pools}
        ok = True
        for pool, read in zip(pools, readings, strict=True):
            result = results[pool.name]
            self._metrics.scaling.show(pool.scope, pool.workers, result, read)
            try:
                if await self._effects.bring_about(pool, result, now):
                    self._left[pool.name] = result.decision.desired
                    direction = "up" if result.decision.desired > pool.workers.wanted else "down"
                    self._metrics.scalings.labels(*pool.name.split("/"), direction).inc()
            except ApiError as error:
                ok = False
                logger.warning("%s: not scaled: %s; will be tried again", pool.name, error)
        self._metrics.scaling.keep({pool.name for pool in pools})
        self._metrics.scaling_rounds.labels("ok" if ok else "error").inc()

    async def _question(self, pool: ScaledPool) -> PoolQuestion:
        """Workers are looked up for the pools alone that are scaled on something only workers know."""
        if not pool.asks_workers:
            return PoolQuestion(pool.signals, pool.router_urls)
        try:
            addresses = [pod_address(pod) for pod in await self._effects.pods(pool)]
        except ApiError as error:
            logger.warning("%s: its workers cannot be listed: %s", pool.name, error)
            addresses = []
        identity = identity_of(pool.pool)
        workers = [base_url(ip, pool.config.port, tls=identity is not None) for ip in addresses if ip is not None]
        return PoolQuestion(pool.signals, pool.router_urls, workers, await self._workers.of(identity))

    def _measured(self, pools: Sequence[ScaledPool]) -> list[float | None]:
        """What each pool's workers took to start."""
        self._startups = {pool.name: self._startups.get(pool.name) or StartupTimes() for pool in pools}
        for pool in pools:
            self._startups[pool.name].see(pool.starts, pool.startup_limit_s)
        return [self._startups[pool.name].usual_s for pool in pools]

    async def _learn(self, pools: Sequence[ScaledPool]) -> None:
        """The past of pools that are new here, for their forecasts. Without it they learn from now on."""
        new = [pool for pool in pools if pool.name not in self._learned]
        self._learned = {pool.name for pool in pools}
        if self._history is None or not new:
            return
        end_s = self._now().timestamp()
        for pool in new:
            demand = next((s.expression for s in pool.signals if s.kind == "AverageValue" and s.expression), None)
            if demand is None:
                continue
            try:
                async with asyncio.timeout(HISTORY_LIMIT_S):
                    past = await self._history(demand.promql(), end_s - HISTORY_S, end_s, HISTORY_STEP_S)
            except (FetchError, TimeoutError) as error:
                logger.warning("%s: its past demand cannot be read: %s", pool.name, error or "no answer in time")
                return  # the others' neither
            self._autoscaler.learn(pool.name, past)

    async def _read(self, reader: Reader, questions: Sequence[PoolQuestion]) -> list[list[Reading]]:
        limit_s = self._options.read_limit_s
        try:
            async with asyncio.timeout(limit_s):
                return await reader.read(questions)
        except TimeoutError:
            message = f"the signals could not all be read within {limit_s:g} s"
            return [[failed(signal.name, signal.kind, message) for signal in asked.signals] for asked in questions]
