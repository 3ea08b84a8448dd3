"""The reader that needs no Prometheus: it scrapes the routers' own /metrics and does the arithmetic itself.

Each process is scraped once per `read`, however many pools ask for it; only lines of wanted metrics are parsed, so a
page of thousands of series costs little. Workers are scraped only for `kvUsage`. A process that cannot be scraped is
missing from the sum, which `judge` turns into a Partial reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from kvfleet_operator.autoscale.expressions import Samples
from kvfleet_operator.autoscale.readers.fetch import FetchError, fetch
from kvfleet_operator.autoscale.readers.source import PoolQuestion, to_reading
from kvfleet_operator.autoscale.readings import Raw, Reading, failed
from kvfleet_operator.autoscale.signals import Signal, metrics_of
from kvfleet_operator.workertls import WorkerClient

MAX_PAGE_BYTES: Final = 8 * 2**20
MAX_SERIES: Final = 20_000
"""Wanted series of one process: more is not a router."""


class RouterReader:
    """Scrapes routers and workers. `client` is shared by all scrapes and closed by `aclose`."""

    def __init__(
        self, client: httpx.AsyncClient | None = None, *, timeout_s: float = 3.0, concurrency: int = 16
    ) -> None:
        self._client = client or httpx.AsyncClient(trust_env=False, timeout=None)
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(concurrency)

    async def read(self, pools: Sequence[PoolQuestion]) -> list[list[Reading]]:
        wanted: dict[str, set[str]] = {}
        clients: dict[str, WorkerClient] = {}
        for pool in pools:
            if pool.worker_client is not None:
                clients |= dict.fromkeys(pool.worker_urls, pool.worker_client)
            for signal in pool.signals:
                for url in pool.urls_for(signal):
                    wanted.setdefault(url, set()).update(metrics_of([signal]))
        wanted = {url: names for url, names in wanted.items() if names}
        pages = await asyncio.gather(*(self._scrape(url, names, clients.get(url)) for url, names in wanted.items()))
        found = dict(zip(wanted, pages, strict=True))
        return [[_reading(signal, pool, found) for signal in pool.signals] for pool in pools]

    async def samples(self, urls: Sequence[str], names: Iterable[str]) -> list[Samples]:
        """The series of these metrics from every process that answers."""
        wanted = set(names)
        pages = await asyncio.gather(*(self._scrape(url, wanted) for url in urls))
        return [page for page in pages if not isinstance(page, FetchError)]

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _scrape(self, url: str, names: set[str], worker: WorkerClient | None = None) -> Samples | FetchError:
        asking = worker or WorkerClient(self._client, {})
        try:
            async with self._slots:
                page = await fetch(
                    asking.http,
                    "GET",
                    f"{url}/metrics",
                    timeout_s=self._timeout_s,
                    max_bytes=MAX_PAGE_BYTES,
                    extensions=asking.extensions,
                )
            return parse(page, names)
        except FetchError as error:
            return error


def _reading(signal: Signal, pool: PoolQuestion, found: dict[str, Samples | FetchError]) -> Reading:
    if signal.expression is None or signal.anchor is None:
        return failed(
            signal.name,
            signal.kind,
            "a PromQL query needs a Prometheus: give the operator its URL, or use another signal",
        )
    answers = [found[url] for url in pool.urls_for(signal)]
    errors = [answer for answer in answers if isinstance(answer, FetchError)]
    if errors and len(errors) == len(answers):
        return failed(signal.name, signal.kind, f"no {signal.source} could be scraped: {errors[0]}")
    scrapes = [answer for answer in answers if not isinstance(answer, FetchError)]
    sources = [samples for samples in scrapes if signal.anchor.values(samples)]
    target = signal.target if isinstance(signal.target, float) else signal.target.evaluate(sources)
    value = signal.expression.evaluate(sources) if sources else None
    return to_reading(signal, Raw(value, target, len(sources), 0.0), pool)


def parse(page: bytes, names: Iterable[str]) -> Samples:
    """The series of the wanted metrics on a page in Prometheus's text format. Raises FetchError where it is not one."""
    wanted = frozenset(names)
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    try:
        lines = [line for line in page.decode().split("\n") if _name(line) in wanted]
        if len(lines) > MAX_SERIES:
            raise FetchError(f"the page has {len(lines)} wanted series, more than {MAX_SERIES}")
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise FetchError(f"the page is not in Prometheus's text format: {str(error)[:200]}") from error
    return samples


def _name(line: str) -> str:
    return line.partition("{")[0].partition(" ")[0]
