"""Workers that come and go while a simulated fleet runs: what decides how many, and what it is told. Pure.

Every `period_s` a Controller sees its pools and answers how many workers each should have. What it adds starts: it draws idle
power for the start-up time, takes no requests, and comes with an empty cache. What it takes away drains, then is off and
draws `off_watts`. Workers that start go first, then those that routers were told to spare, then those with the fewest requests,
of those the one idle for longest.

`Parking` is the controller of a fleet without an autoscaler: workers that were idle for long enough are switched off, and
one is started when those that are on are loaded. The two are apart, in time and in load, so that restarts stay rare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PoolView:
    """What a controller knows of a pool: what the router publishes, and its workers."""

    name: str
    ready: int
    """Workers that take requests."""
    starting: int
    total: int
    """Workers there can be."""
    in_flight: int
    """Requests at the pool's workers."""
    packed: float
    """The same work in sequences of workers that are filled to the pack target."""
    held: int
    """Requests held at the routers, of every pool."""
    served: int
    """Requests ever sent to the pool."""
    pack_target: int
    predicted_ttft_s: float
    load: float
    """Mean over its workers, 0 idle to 1 at the edge of the SLO."""
    idle_s: tuple[float, ...]
    """How long each ready worker has had nothing to do; 0 where it has."""

    @property
    def wanted(self) -> int:
        return self.ready + self.starting


class Controller(Protocol):
    """Decides how many workers each pool has."""

    @property
    def period_s(self) -> float:
        """Seconds between two decisions."""

    def wanted(self, pools: Sequence[PoolView], now_s: float) -> Mapping[str, int]:
        """Workers wanted now, by pool; pools left out stay as they are."""

    def leaving(self) -> Mapping[str, int]:
        """Of those last wanted, workers that are likely to go soon, by pool: the routers are told to spare them."""


@dataclass(frozen=True, slots=True)
class Elastic:
    """How workers come and go."""

    controller: Controller
    startup_s: float = 60.0
    """From the decision until the worker takes requests."""
    off_watts: float = 0.0
    """What a worker that is off still draws. 0: its device went back to whoever lent it."""


class Parking:
    """Off after `idle_s` without work; on again when the load of those on exceeds `wake_load`, or requests are held."""

    def __init__(self, idle_s: float = 60.0, *, wake_load: float = 0.5, keep: int = 1, period_s: float = 2.0) -> None:
        """`keep`: workers that are always on, over all pools."""
        self._idle_s, self._wake_load, self._keep = idle_s, wake_load, keep
        self._woken_s = -math.inf
        self.period_s = period_s

    def leaving(self) -> Mapping[str, int]:
        return {}  # an idle worker is what it waits for

    def wanted(self, pools: Sequence[PoolView], now_s: float) -> Mapping[str, int]:
        on = sum(pool.wanted for pool in pools)
        ready = sum(pool.ready for pool in pools)
        load = sum(pool.load * pool.ready for pool in pools) / max(ready, 1)
        held = max((pool.held for pool in pools), default=0)
        if held or load > self._wake_load:
            self._woken_s = now_s
            asleep = [pool for pool in pools if pool.wanted < pool.total]
            if not asleep or any(pool.starting for pool in pools):
                return {}
            busiest = max(asleep, key=lambda pool: pool.load)
            return {busiest.name: busiest.wanted + 1}
        if now_s - self._woken_s < self._idle_s:
            return {}
        decided = {}
        for pool in pools:
            tired = sum(idle_s >= self._idle_s for idle_s in pool.idle_s)
            leaving = min(tired, on - self._keep)
            if leaving > 0:
                on -= leaving
                decided[pool.name] = pool.wanted - leaving
        return decided
