"""Where a request would rather go, whatever the strategy: to its session's worker, or to one that has its adapter at hand.

    session   (`x-session-id`)  the worker that got the session's last request: it has the answer's KV entries too, and
                                whatever else the engine keeps
    adapter   (LoRA)            workers that ran the adapter in the last minute: no other one has to load it and give up
                                another for it. Where there is none, those that have run the fewest adapters

A preference is worth waiting `PATIENCE_S` for: strategies that count in seconds stay with it while it costs no more than that
above the best; for others it holds until the worker has far more in flight than its peers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvfleet_router.core.ticket import Arrival
    from kvfleet_router.core.worker import Worker

PATIENCE_S: Final = 0.25
MAX_SESSIONS: Final = 65_536
"""The sessions used last are known."""
WARM_S: Final = 60.0
"""An adapter that a worker ran so long ago is still loaded, most likely."""
CROWDED_FACTOR, CROWDED_REQUESTS = 2.0, 8
"""In flight beyond so many times the mean, and so many more: a preference is no reason to go there."""

Session = tuple[str, str, str]
"""(model, tenant, session)"""


class Affinity:
    """What was sent where, as far as it matters to whoever comes next."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[Session, Worker] = OrderedDict()
        self._adapters: dict[str, dict[Worker, float]] = {}  # adapter -> worker -> when it last got a request for it

    def assigned(self, arrival: Arrival, worker: Worker, now: float) -> None:
        """The worker answers this request."""
        parsed = arrival.parsed
        if parsed.session_id is not None:
            sessions = self._sessions
            key = (arrival.lane.model, parsed.tenant, parsed.session_id)
            sessions[key] = worker
            sessions.move_to_end(key)
            if len(sessions) > MAX_SESSIONS:
                sessions.popitem(last=False)
        if arrival.lane.adapter:
            self._adapters.setdefault(arrival.lane.model, {})[worker] = now

    def preferred(self, arrival: Arrival, workers: Sequence[Worker], now: float) -> list[Worker]:
        """Those of `workers` that this request would rather go to; none: it does not care."""
        parsed = arrival.parsed
        if parsed.session_id is not None:
            session = self._sessions.get((arrival.lane.model, parsed.tenant, parsed.session_id))
            if session is not None and session in workers:
                return [session]
        return self._with_adapter(arrival.lane.model, workers, now) if arrival.lane.adapter else []

    def _with_adapter(self, adapter: str, workers: Sequence[Worker], now: float) -> list[Worker]:
        used = self._adapters.get(adapter, {})
        for worker in [worker for worker, at in used.items() if worker.removed or at < now - WARM_S]:
            del used[worker]
        warm = [worker for worker in workers if worker in used]
        if warm:
            return warm
        loaded = [
            sum(other.get(worker, -WARM_S) >= now - WARM_S for other in self._adapters.values()) for worker in workers
        ]
        fewest = min(loaded)
        return [worker for worker, count in zip(workers, loaded, strict=True) if count == fewest]


def crowded(worker: Worker, workers: Sequence[Worker]) -> bool:
    """Whether it has far more in flight than its peers."""
    mean = sum(other.in_flight for other in workers) / len(workers)
    return worker.in_flight > CROWDED_FACTOR * mean + CROWDED_REQUESTS
