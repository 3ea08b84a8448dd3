"""Which workers' circuits are open, and how they close again (breaker.py holds each one's state).

Where somebody probes (`probing`), an ejected worker's health is asked after its pause, and again until it is well; only then one
request at a time is risked on it. Where nobody does, or the worker has no such endpoint, a request is the trial when the pause ends.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvfleet_api.routingpolicy import ResilienceSpec
    from kvfleet_router.core.pool import Fleet
    from kvfleet_router.core.worker import Worker

PROBE_PERIOD_S: Final = 2.0
"""Between two probes of a worker that is not well, in the mean: drawn from half to one and a half of it, so that the probes of many
routers for a node's many workers do not come together."""


class Circuits:
    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self._fleet = fleet
        self._rng = rng
        self._ejected: set[Worker] = set()
        self.probing = False
        """Whether somebody takes what is due from `due_probes`."""

    def forget(self, workers: Iterable[Worker]) -> None:
        self._ejected.difference_update(workers)

    def forget_removed(self) -> None:
        self._ejected = {worker for worker in self._ejected if not worker.removed}

    def answered(self, worker: Worker, *, whole: bool = True) -> None:
        if worker.breaker.success(whole):
            self._ejected.discard(worker)
            self._fleet.version += 1

    def failed(self, worker: Worker, now: float, resilience: ResilienceSpec) -> None:
        out = 1 + sum(each.pool == worker.pool for each in self._ejected)
        share = resilience.eject_at_failure_percent / 100 if 2 * out <= len(worker.pool_state.workers) else 1.0
        if worker.breaker.failure(now, share) and not worker.removed:
            worker.breaker.probe_path = resilience.probe_path
            self._ejected.add(worker)
            self._fleet.version += 1
            worker.cache.clear()  # most likely restarted

    def catch_up(self, now: float) -> None:
        """Trials whose time has come begin."""
        if self._ejected:
            for worker in [worker for worker in self._ejected if not self._probed(worker)]:
                if worker.breaker.elapsed(now):
                    self._ejected.discard(worker)
                    self._fleet.version += 1

    def trials(self) -> list[float | None]:
        """When those begin that need no probe."""
        return [worker.breaker.open_until for worker in self._ejected if not self._probed(worker)]

    def due_probes(self, now: float, most: int) -> list[Worker]:
        """Up to `most` workers to be asked now whether they are well; each is told of by `probed`, exactly once."""
        due: list[Worker] = []
        for worker in self._ejected:
            if len(due) >= most:
                break
            if worker.assignable and self._probed(worker) and worker.breaker.begin_probe(now):
                due.append(worker)
        return due

    def probed(self, worker: Worker, now: float, healthy: bool | None, told: str) -> None:
        """What the probe said. `healthy` None: the worker has no such endpoint, so a request has to find out."""
        pause_s = PROBE_PERIOD_S * self._rng.uniform(0.5, 1.5)
        if worker.breaker.probed(now, healthy is not False, pause_s, told):
            self._ejected.discard(worker)
            self._fleet.version += 1

    def _probed(self, worker: Worker) -> bool:
        return self.probing and worker.breaker.probe_path != ""
