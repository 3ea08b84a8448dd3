"""Asks ejected workers whether they are well (`GET` of the policy's `resilience.probePath`), so that no client's request has to.

Any answer below 400 says yes; 404, 405 and 501 say that this engine has no such path, and a request has to find out; everything else,
no answer within TIMEOUT_S included, says no. At most CONCURRENCY probes run at once, each on a connection of its own that is
closed again: what is to be found out is whether the worker accepts and answers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import httpx
from prometheus_client.core import CounterMetricFamily, Metric

if TYPE_CHECKING:
    from kvfleet_router.core.dispatcher import Dispatcher, Worker
    from kvfleet_router.io.models import Spawn
    from kvfleet_router.io.tls import WorkerTrust, WorkerTrusts

TIMEOUT_S = 2.0
CONCURRENCY = 16
NO_SUCH_PATH = (404, 405, 501)


class Prober:
    """For one router; `sweep` is called a few times a second."""

    def __init__(self, dispatcher: Dispatcher, trusts: WorkerTrusts, spawn: Spawn) -> None:
        self._dispatcher = dispatcher
        self._trusts = trusts
        self._spawn = spawn
        self._running = 0
        self._results: Counter[tuple[str, str]] = Counter()
        """Probes by (pool, result)."""
        dispatcher.probing = True

    def sweep(self) -> None:
        """Begin the probes that are due."""
        for worker in self._dispatcher.due_probes(CONCURRENCY - self._running):
            self._running += 1
            self._spawn(self._probe(worker, worker.breaker.probe_path))

    async def _probe(self, worker: Worker, path: str) -> None:
        healthy: bool | None = False
        told = "no answer"
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status = await _status(worker.url, path, self._trusts.of(worker.pool))
            healthy = None if status in NO_SUCH_PATH else status < 400
            told = f"status {status}"
        except TimeoutError:
            told = f"no answer within {TIMEOUT_S:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            told = str(error) or type(error).__name__
        finally:
            self._running -= 1
            result = {True: "healthy", False: "unhealthy", None: "no_such_path"}[healthy]
            self._results[worker.pool, result] += 1
            self._dispatcher.probed(worker, healthy, told)

    def metrics(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "kvfleet_router_probes", "Questions to ejected workers whether they are well.", labels=("pool", "result")
        )
        for labels, count in self._results.items():
            family.add_metric(labels, count)
        return [family]


async def _status(url: str, path: str, trust: WorkerTrust) -> int:
    verify = trust.context if url.startswith("https:") else False
    extensions = {} if trust.server_name is None else {"sni_hostname": trust.server_name}
    async with (
        httpx.AsyncClient(timeout=TIMEOUT_S, verify=verify, trust_env=False) as client,
        client.stream("GET", url + path, extensions=extensions) as answer,
    ):
        return answer.status_code  # the body does not matter: a worker could make it as long as it likes
