"""What follows the fake API server in tests: sources with a sink that notes everything, and whole routers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fake_api import QUICK, FakeApi
from scripted import Bench, chat_body, fleet, post

from kvfleet_api.fleetconfig import FleetConfig, PoolConfig
from kvfleet_router.app import RouterApp
from kvfleet_router.core.dispatcher import WorkerEndpoint
from kvfleet_router.io.config_source import ConfigRejected
from kvfleet_router.io.kubernetes import KubernetesSource
from kvfleet_router.io.kubernetes_watch import Timings

EMPTY = FleetConfig(pools=[], policies=[])


def in_pool(service: str = "pool-workers", **changes: Any) -> FleetConfig:
    """A fleet of one pool whose workers are behind `service`."""
    config = fleet([], model="m")
    pool = config.pools[0].model_copy(update={"endpoints": [], "service": service})
    return config.model_copy(update={"pools": [pool], **changes})


def in_two_pools() -> FleetConfig:
    config = in_pool()
    pools = [pool.model_copy(update={"name": name, "service": f"{name}-workers"})
             for pool in config.pools for name in ("pool", "other")]  # fmt: skip
    policy = config.policies[0]
    weighted = [policy.pools[0].model_copy(update={"name": pool.name}) for pool in pools]
    return config.model_copy(update={"pools": pools, "policies": [policy.model_copy(update={"pools": weighted})]})


class Recorder:
    """A sink that notes what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.config: FleetConfig = EMPTY
        self.workers: dict[str, list[WorkerEndpoint]] = {}
        self.rejected: list[str] = []
        self.refuse = ""

    def take_config(self, config: FleetConfig) -> None:
        if self.refuse:
            raise ConfigRejected(self.refuse)
        self.config = config
        self.told.append(("config", config.revision))

    def take_endpoints(self, pool: str, endpoints: Sequence[WorkerEndpoint]) -> None:
        self.workers[pool] = list(endpoints)
        self.told.append((pool, [endpoint.name for endpoint in endpoints]))

    def reject_config(self, reason: str) -> None:
        self.rejected.append(reason)

    def pools_to_wake(self) -> Sequence[PoolConfig]:
        return ()


class Cluster:
    """An API server, and the routers and sinks that follow it."""

    def __init__(self, api: FakeApi, bench: Bench, folder: Path) -> None:
        self.api, self.bench, self.folder = api, bench, folder

    def source(self, *, timings: Timings = QUICK, **options: Any) -> KubernetesSource:
        access = self.api.mount(self.folder)
        return KubernetesSource(access, "inference/router", timings=timings, rng=random.Random(1), **options)

    async def follow(self, source: KubernetesSource | None = None) -> Recorder:
        """A sink that a source feeds."""
        recorder = Recorder()
        task = asyncio.create_task((source or self.source()).run(recorder))

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.bench.on_close(end)
        return recorder

    async def router(self, source: KubernetesSource | None = None) -> RouterApp:
        app = RouterApp(EMPTY, source=source or self.source())
        await app.start()
        self.bench.on_close(app.stop, 0.0)
        return app


def names(recorder: Recorder, pool: str = "static") -> list[str]:
    return [worker.name for worker in recorder.workers.get(pool, [])]


async def served(bench: Bench, app: RouterApp) -> str | None:
    """Which worker answered a request."""
    answer = await bench.ask(app, post(chat_body()))
    assert answer.status == 200, answer.body
    return answer.header("x-kvfleet-worker")
