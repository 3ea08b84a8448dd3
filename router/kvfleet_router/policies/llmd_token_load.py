"""llmd_token_load: llm-d's newer guide: among the workers that hold the prefix, the fewest tokens to prefill.

    sticky = workers with a match ≥ 0.80 of the prompt
    if there are any, and least TTFT of the sticky − least TTFT of all ≤ 18 s:   only the sticky are left
    cost = min(uncached tokens pending + this request's, T) / T,   T = 4,194,304                          (argmin)

Intent: strict affinity until it costs too much time; load in tokens instead of requests.
Inputs: the router's own accounting, the prefix index, the cost model with its calibration (TTFT).

Differs from the original: TTFT is predicted by the cost model (core/predict.py) instead of tokens in flight over a fixed
prefill throughput; tokens count until the first token came; nothing is explored at random.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfleet_router.core.policy import RULED_OUT, RelativePolicy
from kvfleet_router.core.predict import ttft_parts
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker

AFFINITY_THRESHOLD = 0.80
MAX_TTFT_PENALTY_S = 18.0
FULL_LOAD_TOKENS = 4_194_304


class LLMDTokenLoad(RelativePolicy):
    parts = ("not_sticky", "token_load")
    uses_prefix = True
    measures_cost = True

    def score_all(
        self, arrival: Arrival, workers: Sequence[Worker], cached_tokens: Sequence[float], now: float
    ) -> list[tuple[float, ...]]:
        prompt = arrival.prompt_tokens
        sticky = [cached >= AFFINITY_THRESHOLD * prompt for cached in cached_tokens]
        if any(sticky):
            ttfts = [
                sum(ttft_parts(arrival, worker, cached, now))
                for worker, cached in zip(workers, cached_tokens, strict=True)
            ]
            best_sticky = min(ttft for ttft, sticks in zip(ttfts, sticky, strict=True) if sticks)
            if best_sticky - min(ttfts) > MAX_TTFT_PENALTY_S:
                sticky = [True] * len(workers)
        else:
            sticky = [True] * len(workers)
        return [
            (
                0.0 if sticks else RULED_OUT,
                min(worker.pending_uncached_tokens + prompt - cached, FULL_LOAD_TOKENS) / FULL_LOAD_TOKENS,
            )
            for worker, cached, sticks in zip(workers, cached_tokens, sticky, strict=True)
        ]
