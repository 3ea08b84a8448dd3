"""Reads DCGM's power telemetry, at its exporters or from a Prometheus, and gives the dispatcher what belongs to its workers.

A device belongs to the worker its `pod` label names (`exported_pod`: as Prometheus calls it where both sides have one). At a
URL with `{host}` or `{port}` every device is that worker's. What cannot be read is counted and tried again; the dispatcher
finds out by itself that readings stay away.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

import httpx
import orjson
from prometheus_client.core import CounterMetricFamily, Metric

from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_router.core.dispatcher import Dispatcher, Worker
from kvfleet_router.core.telemetry import DeviceReading

log = logging.getLogger("kvfleet.router")

ENERGY = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"
POWER = "DCGM_FI_DEV_POWER_USAGE"
TIMEOUT_S = 5.0
MAX_PAGE_BYTES = 8 * 2**20
MAX_SAMPLES = 20_000
CONCURRENCY = 16
QUERY = f'{{__name__=~"{ENERGY}|{POWER}"}}'

_LINE = re.compile(rf"^({ENERGY}|{POWER})\{{([^\n]*)\}}[ \t]+([^ \t\n]+)", re.MULTILINE)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')

Sample = tuple[str, Mapping[str, str], float]
"""(metric, labels, value)"""


def exposition(text: str) -> Iterator[Sample]:
    """The two metrics out of an exporter's page."""
    for count, (name, labels, value) in enumerate(_LINE.findall(text)):
        if count >= MAX_SAMPLES:
            return
        try:
            yield name, dict(_LABEL.findall(labels)), float(value)
        except ValueError:
            continue


def query_result(body: bytes) -> Iterator[Sample]:
    """The two metrics out of Prometheus's answer to an instant query. Raises ValueError where it is none."""
    document: Any = orjson.loads(body)
    try:
        rows = document["data"]["result"]
        for row in rows[:MAX_SAMPLES]:
            yield row["metric"]["__name__"], row["metric"], float(row["value"][1])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"no result of an instant query: {error!r}") from error


def by_worker(
    samples: Iterable[Sample], names: frozenset[str], only: str | None = None
) -> dict[str, dict[str, DeviceReading]]:
    """Worker → device → reading. `only`: every device is this worker's."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for metric, labels, value in samples:
        worker = only or labels.get("exported_pod") or labels.get("pod") or ""
        if worker not in names:
            continue
        device = labels.get("UUID") or labels.get("gpu") or ""
        found.setdefault(worker, {}).setdefault(device, {})[metric] = value
    return {
        worker: {
            device: DeviceReading(
                values[ENERGY] / 1000 if ENERGY in values else None,
                values.get(POWER),
            )
            for device, values in devices.items()
        }
        for worker, devices in found.items()
    }


class Telemetry:
    """Follows the configuration's TelemetrySpec until cancelled."""

    def __init__(self, dispatcher: Dispatcher, *, speed: float = 1.0) -> None:
        """`speed`: how much faster than real time the dispatcher's clock is."""
        self._dispatcher = dispatcher
        self._speed = speed
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._said: set[str] = set()
        self.scrapes: Counter[str] = Counter()
        """By result: ok, failed."""

    async def run(self) -> None:
        """Read on, every `intervalSeconds`."""
        async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
            while True:
                spec = self._dispatcher.config.telemetry
                if spec is not None:
                    await self.read(client, spec)
                pause_s = spec.interval_seconds if spec is not None else 5.0
                await asyncio.sleep(max(pause_s / self._speed, 0.05))

    async def read(self, client: httpx.AsyncClient, spec: TelemetrySpec) -> None:
        """Everything once."""
        workers = {worker.name: worker for worker in self._dispatcher.workers()}
        if spec.prometheus_url:
            url = spec.prometheus_url.rstrip("/") + "/api/v1/query?" + urlencode({"query": QUERY})
            found = await self._fetch(client, url, workers, None)
        else:
            questions = [question for url in spec.dcgm_urls for question in _resolved(url, workers)]
            answers = await asyncio.gather(*(self._fetch(client, url, workers, only) for url, only in questions))
            found = {}
            for answer in answers:
                for name, devices in answer.items():
                    found.setdefault(name, {}).update(devices)
        for name, devices in found.items():
            self._dispatcher.measured(workers[name], devices)

    async def _fetch(
        self, client: httpx.AsyncClient, url: str, workers: Mapping[str, Worker], only: str | None
    ) -> dict[str, dict[str, DeviceReading]]:
        try:
            async with self._slots, asyncio.timeout(TIMEOUT_S):
                body = await _get(client, url)
            samples = query_result(body) if "/api/v1/query?" in url else exposition(body.decode("utf-8", "replace"))
            found = by_worker(samples, frozenset(workers), only)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, TimeoutError) as error:
            self.scrapes["failed"] += 1
            if url not in self._said and len(self._said) < 1000:
                self._said.add(url)
                log.warning("power telemetry: %s: %s", url, error or type(error).__name__)
            return {}
        self.scrapes["ok"] += 1
        self._said.discard(url)
        return found

    def metrics(self) -> Iterable[Metric]:
        if not self.scrapes:
            return []
        family = CounterMetricFamily(
            "kvfleet_router_telemetry_scrapes", "Readings of power telemetry, by result.", labels=("result",)
        )
        for result, count in self.scrapes.items():
            family.add_metric((result,), count)
        return [family]


def _resolved(url: str, workers: Mapping[str, Worker]) -> list[tuple[str, str | None]]:
    """(URL, the worker that all of it is about)"""
    if "{host}" not in url and "{port}" not in url:
        return [(url, None)]
    return [
        (
            url.replace("{host}", f"[{worker.host}]" if ":" in worker.host else worker.host).replace(
                "{port}", str(worker.port)
            ),
            name,
        )
        for name, worker in workers.items()
    ]


async def _get(client: httpx.AsyncClient, url: str) -> bytes:
    body = bytearray()
    async with client.stream("GET", url, headers={"accept-encoding": "identity"}) as response:
        response.raise_for_status()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_PAGE_BYTES:
                raise ValueError(f"more than {MAX_PAGE_BYTES} bytes")
    return bytes(body)
