"""least_request: the worker with the fewest requests in flight.

    cost = requests in flight   (argmin; ties at random)

Intent: balances by count, whatever the requests weigh.
Inputs: requests in flight.
"""

from __future__ import annotations

from kvfleet_router.core.policy import Policy
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker


class LeastRequest(Policy):
    parts = ("in_flight",)

    def score(self, arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, ...]:
        return (float(worker.in_flight),)
