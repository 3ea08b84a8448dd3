"""lmetric: queued uncached tokens times batch size.

    cost = (Σ uncached tokens of prompts without a first token + this one's) · (requests in flight + 1)   (argmin)

Intent: one product stands for both the wait and the interference. Prompts in flight count as cached. The simple baseline
that is hardest to beat.
Inputs: the router's own accounting, the prefix index.
"""

from __future__ import annotations

from kvfleet_router.core.policy import Policy
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker


class LMetric(Policy):
    parts = ("tokens_x_batch",)
    uses_prefix = True
    measures_cost = True

    def score(self, arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, ...]:
        tokens = worker.pending_uncached_tokens + arrival.prompt_tokens - cached_tokens
        return (tokens * (worker.in_flight + 1),)
