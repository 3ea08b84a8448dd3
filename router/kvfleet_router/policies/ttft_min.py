"""ttft_min: the worker with the least predicted time to first token.

    cost = backlog + own + step + kv_wait   (core/predict.py; argmin, ties at random)

Intent: greedy: best for this request, blind to what it does to the others.
Inputs: the router's own accounting, the prefix index, the cost model with its calibration.
"""

from __future__ import annotations

from kvfleet_router.core.columns import Array, Columns
from kvfleet_router.core.policy import Policy
from kvfleet_router.core.predict import ttft_parts, ttft_parts_many
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker


class TTFTMin(Policy):
    parts = ("backlog", "prefill", "step", "kv_wait")
    uses_prefix = True
    measures_cost = True
    in_seconds = True
    columns_from = 40
    tie = 0.0005

    def score(self, arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, ...]:
        return ttft_parts(arrival, worker, cached_tokens, now)

    def score_many(self, arrival: Arrival, workers: Columns, cached_tokens: Array, now: float) -> tuple[Array, ...]:
        return ttft_parts_many(arrival, workers, cached_tokens, now)
