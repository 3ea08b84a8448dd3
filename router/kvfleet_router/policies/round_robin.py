"""round_robin: every worker in turn.

    cost = requests this worker has got so far − least of all candidates   (argmin; ties at random)

Intent: the plain baseline. Counting what each got, instead of remembering whose turn it is, keeps the policy without
state. A worker that joins late starts at the count of the others (`Worker.sent_requests`), so it is not flooded.
Inputs: requests sent so far.
"""

from __future__ import annotations

from kvfleet_router.core.policy import Policy
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker


class RoundRobin(Policy):
    parts = ("turns",)

    def score(self, arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, ...]:
        return (float(worker.sent_requests),)
