"""dynamo_kv: NVIDIA Dynamo's KV router: blocks to prefill plus blocks in use.

    cost = 1.0·(new + queued) + active      KV blocks, argmin (the original's softmax at temperature 0; ties at random)

    new     = max(0, the prompt's blocks − those cached on the worker)
    queued  = uncached blocks of prompts sent without a first token
    active  = blocks held by the requests in flight

Intent: prefill and decode load in one unit, both from the router's own book-keeping.
Inputs: the router's own accounting, the prefix index.

Differs from the original: active leaves out the blocks that this request would add. Tokens are divided by 16, the
engine's usual block, whatever the size of the index's blocks: the choice does not depend on it.
"""

from __future__ import annotations

from kvfleet_router.core.policy import Policy
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker

PREFILL_SCALE = 1.0
BLOCK_TOKENS = 16


class DynamoKV(Policy):
    parts = ("new", "queued", "active")
    uses_prefix = True
    measures_cost = True

    def score(self, arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, ...]:
        return (
            PREFILL_SCALE * max(arrival.prompt_tokens - cached_tokens, 0.0) / BLOCK_TOKENS,
            PREFILL_SCALE * worker.pending_uncached_tokens / BLOCK_TOKENS,
            worker.kv_used_tokens / BLOCK_TOKENS,
        )
