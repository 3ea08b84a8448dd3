"""llmd_default: llm-d's default scorers: queue, KV use and prefix, weighted 2 : 2 : 3.

    cost = 2·(x − min x)/(max x − min x) + 2·kv + 3·(1 − match)     (argmin; all queues equal: the first term is 0)

    x requests queued, kv the used share of the KV cache, match the cached share of the prompt. The original takes the
    largest of 2·queue + 2·(1 − kv) + 3·match, queue = (max x − x)/(max x − min x): the same choice, 7 less that score.

Intent: a compromise of three signals, each brought to 0..1.
Inputs: the router's own accounting, the prefix index.

Differs from the original: x counts sequences sent without a first token instead of the engine's waiting requests; kv is
what the requests in flight hold over the capacity instead of the engine's metric. Neither is as late as a scrape.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfleet_router.core.policy import RelativePolicy
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker

QUEUE_WEIGHT, KV_WEIGHT, PREFIX_WEIGHT = 2.0, 2.0, 3.0


class LLMDDefault(RelativePolicy):
    parts = ("queue", "kv", "prefix")
    uses_prefix = True
    measures_cost = True

    def score_all(
        self, arrival: Arrival, workers: Sequence[Worker], cached_tokens: Sequence[float], now: float
    ) -> list[tuple[float, ...]]:
        queues = [worker.pending for worker in workers]
        least = min(queues)
        spread = (max(queues) - least) or 1
        return [
            (
                QUEUE_WEIGHT * (queue - least) / spread,
                KV_WEIGHT * min(worker.kv_used_tokens / max(worker.kv_tokens, 1.0), 1.0),
                PREFIX_WEIGHT * (1.0 - cached / arrival.prompt_tokens),
            )
            for worker, queue, cached in zip(workers, queues, cached_tokens, strict=True)
        ]
