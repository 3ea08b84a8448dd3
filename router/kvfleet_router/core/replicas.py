"""What replicas of the router tell each other of their loads, from the side of one of them: sharing.py makes messages of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from kvfleet_router.core.placement import Placed, Placement
from kvfleet_router.core.pool import Fleet
from kvfleet_router.core.worker import Load

NEAR_SHARE: Final = 0.05
"""While there are routers that are not heard: how much dearer than the least a worker may be and still be chosen."""
NOTHING: Mapping[str, float] = MappingProxyType({})


class Replicas:
    def __init__(self, fleet: Fleet, placement: Placement, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._placement = placement
        self._clock = clock
        self._routers = 1
        self._heard = 0

    def configure(self, routers: int) -> None:
        """`routers`: how many the fleet has, this one included."""
        self._routers = routers
        self.heard = self._heard

    @property
    def heard(self) -> int:
        """Other routers of the fleet whose loads are known. To be set by whoever hears them."""
        return self._heard

    @heard.setter
    def heard(self, count: int) -> None:
        self._heard = count
        alone = count < self._routers - 1
        self._placement.near = NEAR_SHARE if alone else 0.0
        self._placement.power_share = 1.0 / self._routers if alone else 1.0

    def loads(self) -> dict[str, Load]:
        """What this router has in flight, by worker: to be told to the others."""
        return {worker.name: replace(worker.own) for worker in self._fleet.workers() if worker.own.in_flight}

    def changed_loads(self) -> dict[str, Load]:
        """Of these, those of the workers where something happened since this was last asked."""
        untold = self._fleet.table.untold
        loads = {worker.name: replace(worker.own) for worker in untold}
        untold.clear()
        return loads

    def told(self, elsewhere: Mapping[str, Load], prefilled_s: Mapping[str, float] = NOTHING) -> None:
        """What all others together have in flight on these workers, and the prefill time that first tokens of theirs ended since
        they told last. Unknown workers are nobody's."""
        now = self._clock()
        workers = self._fleet.by_name()
        for name, load in elsewhere.items():
            if (worker := workers.get(name)) is not None:
                worker.told(load, prefilled_s.get(name, 0.0), now)
        self._placement.pump(None, now)

    def share(self) -> list[Placed]:
        """From now on, keep account of what others want to know: new blocks on workers are appended here. Whoever asks takes them
        out."""
        placed: list[Placed] = []
        self._placement.placed = placed
        self._fleet.index.list_all_blocks()  # others tell the ends of prompts
        self._fleet.table.untold.clear()
        return placed
