"""Wakes pools at zero: where a request waits and no worker is there, the router itself sets the workload's scale to 1.

It asks nobody: the operator may be away, and what brings the worker up then (the Deployment's controller, the scheduler)
are Kubernetes' own parts. Only 0 becomes 1, and only on the very version that said 0, so that no router ever takes back what
the autoscaler, or another replica, decided meanwhile. How many workers the waiting requests need is the autoscaler's to say.

Looked for every `LOOK_S`. A pool that was woken is looked at again after `AGAIN_S` if requests still wait for it: it may
have been put to sleep once more. Failures are tried again after pauses that grow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import httpx
import msgspec
from prometheus_client.core import CounterMetricFamily, Metric

from kvfleet_api.fleetconfig import PoolConfig
from kvfleet_router.io.kubernetes_access import Access
from kvfleet_router.io.kubernetes_watch import Failure, Metadata, Timings, as_failure, check_answer, whole_body
from kvfleet_router.io.metrics import PREFIX

log = logging.getLogger("kvfleet.router")
LOOK_S: Final = 0.05
AGAIN_S: Final = 5.0
MAX_SCALE_BYTES: Final = 1_048_576
APIS: Final = {"deployments": "apps/v1", "leaderworkersets": "leaderworkerset.x-k8s.io/v1"}
FIELD_MANAGER: Final = "kvfleet-router"


class _Replicas(msgspec.Struct):
    replicas: int = 0


class _Scale(msgspec.Struct):
    metadata: Metadata
    spec: _Replicas


@dataclass
class _Attempt:
    """The latest one for a pool."""

    task: asyncio.Task[None]
    next_at: float = 0.0
    failures: int = 0
    told: str = ""
    """What was wrong with it, so that the log says it once."""


class Waker:
    def __init__(
        self,
        access: Access,
        namespace: str,
        *,
        timings: Timings = Timings(),
        look_s: float = LOOK_S,
        again_s: float = AGAIN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._access = access
        self._namespace = namespace
        self._timings = timings
        self._look_s = look_s
        self._again_s = again_s
        self._clock = clock
        self._attempts: dict[str, _Attempt] = {}
        self._results: dict[tuple[str, str], int] = {}
        """By (pool, result)."""

    async def run(self, wanted: Callable[[], Sequence[PoolConfig]]) -> None:
        """Wake what `wanted` names, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._look(wanted(), group)
                await asyncio.sleep(self._look_s)

    def _look(self, pools: Sequence[PoolConfig], group: asyncio.TaskGroup) -> None:
        names = {pool.name for pool in pools}
        self._attempts = {
            name: attempt for name, attempt in self._attempts.items() if name in names or not attempt.task.done()
        }
        for pool in pools:
            attempt = self._attempts.get(pool.name)
            if attempt is None:
                self._attempts[pool.name] = _Attempt(group.create_task(self._try(pool)))
            elif attempt.task.done() and self._clock() >= attempt.next_at:
                attempt.task = group.create_task(self._try(pool))

    async def _try(self, pool: PoolConfig) -> None:
        attempt, told = self._attempts.get(pool.name), ""
        try:
            result = await self._wake(pool)
        except Exception as error:
            failure = as_failure(error)
            told = str(failure)
            result = "conflict" if failure.status == 409 else "failed"
            if result == "failed" and (attempt is None or attempt.told != told):
                log.error("pool %s is at zero, requests wait, and it cannot be woken: %s", pool.name, failure)
        else:
            log.info("pool %s: %s", pool.name, "woken" if result == "woken" else "its workers are starting")
        if attempt is not None:
            attempt.told = told
            attempt.failures = 0 if result != "failed" else attempt.failures + 1
            attempt.next_at = self._clock() + self._pause_s(attempt.failures)
        key = (pool.name, result)
        self._results[key] = self._results.get(key, 0) + 1

    def _pause_s(self, failures: int) -> float:
        if not failures:
            return self._again_s
        first_s, longest_s = self._timings.backoff_s
        return min(longest_s, first_s * 2.0 ** min(failures - 1, 30))

    async def _wake(self, pool: PoolConfig) -> str:
        """`woken`, or `awake`: its replicas were above 0 already. Raises Failure and what httpx raises."""
        plural, _, name = (pool.wake_target or "").partition("/")
        if plural not in APIS or not name:
            raise Failure("bad_config", f"wakeTarget {pool.wake_target!r} is no workload: update the operator")
        path = f"/apis/{APIS[plural]}/namespaces/{self._namespace}/{plural}/{name}/scale"
        timings = self._timings
        async with self._access.client(connect_timeout_s=timings.connect_s, read_timeout_s=timings.list_s) as client:
            async with client.stream("GET", path, headers=self._access.headers()) as response:
                await check_answer(response)
                scale = msgspec.json.decode(await whole_body(response, MAX_SCALE_BYTES), type=_Scale)
            if scale.spec.replicas > 0:
                return "awake"
            patch = {"metadata": {"resourceVersion": scale.metadata.resource_version}, "spec": {"replicas": 1}}
            await self._patch(client, path, msgspec.json.encode(patch))
        return "woken"

    async def _patch(self, client: httpx.AsyncClient, path: str, body: bytes) -> None:
        headers = {**self._access.headers(), "content-type": "application/merge-patch+json"}
        query = {"fieldManager": FIELD_MANAGER}
        async with client.stream("PATCH", path, params=query, content=body, headers=headers) as response:
            await check_answer(response)

    def metrics(self) -> Iterator[Metric]:
        wakes = CounterMetricFamily(
            PREFIX + "wakes",
            "Tries to wake a pool at zero, by result: woken, awake (it was), conflict (others were faster), failed.",
            labels=("pool", "result"),
        )
        for key, count in self._results.items():
            wakes.add_metric(key, count)
        yield wakes
