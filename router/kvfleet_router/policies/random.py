"""random: any worker.

    cost = 0   (ties at random)

Intent: the floor every policy has to beat.
Inputs: none.
"""

from __future__ import annotations

from kvfleet_router.core.policy import Policy
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker


class Random(Policy):
    parts = ("none",)

    def score(self, arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, ...]:
        return (0.0,)
