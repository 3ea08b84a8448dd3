"""aibrix_prefix_cache: AIBrix's prefix-cache: the best match that is not overloaded, else the fewest requests.

    if max(load) − min(load) > 8:                              only workers with the least load are left
    if one left has a match and load ≤ mean + 1·σ of those left:
                                                               cost = unmatched %, then load, among these   (argmin)
    else:                                                      cost = load

Intent: affinity bounded twice: by the spread of load, and by the standard deviation.
Inputs: requests in flight (load), the prefix index.

Differs from the original: load counts this router's requests (and what its replicas tell) instead of a cached metric of
the pods; matches come from the router's prefix index instead of a table of hashes with its own LRU and 20 min to live.
"Unmatched %, then load" is one sum, a percent weighing more than any load. A match of any length is at least 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from statistics import fmean

from kvfleet_router.core.policy import RULED_OUT, RelativePolicy
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker

IMBALANCE_REQUESTS = 8
DEVIATIONS = 1.0
PERCENT_COST = 1e6
"""More than any load: percents decide first."""


class AIBrixPrefixCache(RelativePolicy):
    parts = ("imbalance", "overload", "unmatched", "in_flight")
    uses_prefix = True
    measures_cost = True

    def score_all(
        self, arrival: Arrival, workers: Sequence[Worker], cached_tokens: Sequence[float], now: float
    ) -> list[tuple[float, ...]]:
        loads = [worker.in_flight for worker in workers]
        least = min(loads)
        highest = least if max(loads) - least > IMBALANCE_REQUESTS else max(loads)
        left = [load for load in loads if load <= highest]
        mean = fmean(left)
        bound = mean + DEVIATIONS * sqrt(fmean([(load - mean) ** 2 for load in left]))
        percents = [ceil(100.0 * cached / arrival.prompt_tokens) for cached in cached_tokens]
        fits = [
            percent > 0 and load <= highest and load <= bound for percent, load in zip(percents, loads, strict=True)
        ]
        by_match = any(fits)
        return [
            (
                RULED_OUT if load > highest else 0.0,
                RULED_OUT if by_match and not fit else 0.0,
                PERCENT_COST * (100 - percent) if by_match else 0.0,
                float(load),
            )
            for load, percent, fit in zip(loads, percents, fits, strict=True)
        ]
