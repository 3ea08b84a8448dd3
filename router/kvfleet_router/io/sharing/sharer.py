"""Keeps this router and the others of its fleet informed of each other: the clockwork around core/sharing.py.

A Bus carries messages to all other replicas and brings theirs: LocalBus (local.py) between the processes of one pod, RedisBus
(redis_bus.py) between pods. Whatever happens to it, `send` neither waits nor raises: no request ever depends on it.

A flush takes microseconds where little happens. Where it takes longer (hundreds of busy workers, dozens of replicas) flushes
become rarer, so that telling never takes more than a twentieth of the core. What counts is CPU time: a process that was kept from
running in the middle of a flush (too few cores, a container's CPU limit) must not fall silent for twenty times as long.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvfleet_router.core.dispatcher import Dispatcher
from kvfleet_router.core.shareduse import Usage
from kvfleet_router.core.sharing import FLUSH_S, Sharing

log = logging.getLogger("kvfleet.router")

PREFIX = "kvfleet_router_sharing_"
BUSY_SHARE = 20
"""A flush that took t of CPU time is followed by a pause of at least this many times t, …"""
MAX_PAUSE_S = 0.25
"""… but no longer than this: who is silent for a second counts as gone."""

Hear = Callable[[Sequence[bytes]], None]


class Bus(Protocol):
    """See the module's text. `hear` is called within the event loop, with messages of anybody, one's own included."""

    def start(self, hear: Hear) -> None: ...

    def send(self, messages: Sequence[bytes]) -> None: ...

    async def close(self) -> None: ...

    @property
    def reachable(self) -> bool:
        """Whether others can hear what is sent."""

    def others(self, routers: int) -> int:
        """How many other replicas should be heard over it, where the fleet has so many router processes."""

    def metrics(self) -> Iterable[Metric]: ...


class Sharer:
    def __init__(self, dispatcher: Dispatcher, bus: Bus, *, identity: int, usage: Usage | None = None) -> None:
        """`usage`: API keys whose limits shall hold for all replicas together."""
        self.sharing = Sharing(dispatcher, clock=time.monotonic, identity=identity, usage=usage)
        self._dispatcher = dispatcher
        self._bus = bus
        self._timer: asyncio.TimerHandle | None = None
        self._busy_s = 0.0
        self._spent_s = 0.0  # since the last flush began
        self._told = self._heard = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._bus.start(self.hear)
        self._flush()

    async def close(self) -> None:
        """Say goodbye, and be silent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._bus.send([self.sharing.leave()])
            await self._bus.close()

    def _flush(self) -> None:
        began = time.thread_time()
        try:
            messages = self.sharing.flush(reachable=self._bus.reachable)
            self._told += len(messages)
            self._bus.send(messages)
            self._dispatcher.replicas.heard = self.sharing.peers
        except Exception:
            log.exception("replicas could not be told; the next time comes all the same")
        self._spent_s += time.thread_time() - began
        self._busy_s += self._spent_s
        self._timer = self._loop.call_later(min(max(FLUSH_S, BUSY_SHARE * self._spent_s), MAX_PAUSE_S), self._flush)
        self._spent_s = 0.0

    def hear(self, messages: Sequence[bytes]) -> None:
        began = time.thread_time()
        try:
            self._heard += len(messages)
            for message in messages:
                self.sharing.hear(message)
            self.sharing.apply()
        except Exception:
            log.exception("what a replica told could not be used")
        self._spent_s += time.thread_time() - began

    def metrics(self) -> list[Metric]:
        sharing = self.sharing
        peers = GaugeMetricFamily(PREFIX + "peers", "Other router processes that are heard.")
        peers.add_metric((), sharing.peers)
        expected = GaugeMetricFamily(PREFIX + "expected_peers", "Other router processes that should be heard.")
        expected.add_metric((), self._bus.others(self._dispatcher.config.routers))
        messages = CounterMetricFamily(PREFIX + "messages", "Messages between replicas.", labels=("direction",))
        messages.add_metric(("out",), self._told)
        messages.add_metric(("in",), self._heard)
        ignored = CounterMetricFamily(
            PREFIX + "ignored_messages", "Messages that were not believed, by cause.", labels=("cause",)
        )
        for cause, count in sharing.ignored.items():
            ignored.add_metric((cause,), count)
        missed = CounterMetricFamily(PREFIX + "missed_messages", "Messages of others that never came.")
        missed.add_metric((), sharing.missed)
        dropped = CounterMetricFamily(
            PREFIX + "dropped_blocks", "Blocks placed that others were never told of: too many waited."
        )
        dropped.add_metric((), sharing.dropped_blocks)
        busy = CounterMetricFamily(PREFIX + "busy_seconds", "Time spent on telling and hearing.")
        busy.add_metric((), self._busy_s)
        return [peers, expected, messages, ignored, missed, dropped, busy, *self._bus.metrics()]


def connected(over: str, value: bool) -> Metric:
    """Whether others can be reached `over` this way."""
    family = GaugeMetricFamily(PREFIX + "connected", "1 while other replicas can be told.", labels=("over",))
    family.add_metric((over,), value)
    return family
