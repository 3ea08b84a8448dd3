"""What a reader is asked, and what a reader is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvfleet_operator.autoscale.readings import DEFAULT_MAX_AGE_S, Raw, Reading, judge
from kvfleet_operator.autoscale.signals import Signal
from kvfleet_operator.workertls import WorkerClient


@dataclass(frozen=True, slots=True)
class PoolQuestion:
    """The signals to read for one pool, and who should be able to answer."""

    signals: Sequence[Signal]
    router_urls: Sequence[str]
    """`http://host:port` of the admin port of every ready router that serves the pool."""
    worker_urls: Sequence[str] = ()
    """`http://host:port` or `https://host:port` of every ready worker."""
    worker_client: WorkerClient | None = None
    """Who asks the workers. None: who asks the routers."""

    def urls_for(self, signal: Signal) -> Sequence[str]:
        return self.worker_urls if signal.source == "worker" else self.router_urls


class Reader(Protocol):
    """Reads signals. Never raises for what a server did: the readings say it."""

    async def read(self, pools: Sequence[PoolQuestion]) -> list[list[Reading]]:
        """For each pool, a reading for each of its signals, in their order."""
        ...

    async def aclose(self) -> None: ...


def to_reading(signal: Signal, raw: Raw, pool: PoolQuestion, max_age_s: float = DEFAULT_MAX_AGE_S) -> Reading:
    """What `raw` amounts to, given how many should have contributed."""
    if isinstance(signal.target, float):
        raw = Raw(raw.value, signal.target, raw.sources, raw.age_s)
    return judge(
        signal.name,
        signal.kind,
        raw,
        expected_sources=None if signal.source == "query" else len(pool.urls_for(signal)),
        source_name="series" if signal.source == "query" else signal.source,
        max_age_s=max_age_s,
    )
