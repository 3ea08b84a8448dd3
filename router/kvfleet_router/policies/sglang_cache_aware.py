"""sglang_cache_aware: SGLang's cache_aware: the best match, unless load is out of balance or nothing matches.

    if max(load) − min(load) > 64 and max(load) > 1.5·min(load):   cost = load                        (argmin)
    else if the best matched share of the prompt > 0.3:            cost = 1 − matched share
    else:                                                          cost = size of the worker's tree

Intent: affinity while load is even; new prefixes go where the least is cached.
Inputs: requests in flight (load), the prefix index.

Differs from the original: matches come from the router's prefix index (whole blocks, fed by KV events where there are
any, as large as the worker's KV cache) instead of an approximate tree of text that is trimmed by size; the size of the
tree is the number of blocks indexed for the worker. Thresholds are the defaults of the gateway's command line.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfleet_router.core.policy import RelativePolicy
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker

IMBALANCE_REQUESTS = 64
IMBALANCE_RATIO = 1.5
CACHE_THRESHOLD = 0.3


class SGLangCacheAware(RelativePolicy):
    parts = ("in_flight", "unmatched", "tree_blocks")
    uses_prefix = True
    measures_cost = True

    def score_all(
        self, arrival: Arrival, workers: Sequence[Worker], cached_tokens: Sequence[float], now: float
    ) -> list[tuple[float, ...]]:
        loads = [worker.in_flight for worker in workers]
        least, most = min(loads), max(loads)
        if most - least > IMBALANCE_REQUESTS and most > IMBALANCE_RATIO * least:
            return [(float(load), 0.0, 0.0) for load in loads]
        if max(cached_tokens) > CACHE_THRESHOLD * arrival.prompt_tokens:
            return [(0.0, 1.0 - cached / arrival.prompt_tokens, 0.0) for cached in cached_tokens]
        return [(0.0, 0.0, float(len(worker.cache))) for worker in workers]
