"""aibrix_preble: AIBrix's prefix-cache-preble: exploit a long match, else explore by cost.

    if the longest match > 0.5 of the prompt:   cost = load, among the workers with the longest match   (argmin)
    else:                                       cost = prefill + decode                                  seconds
        prefill = backlog + own prefill of the uncached tokens
        decode  = (sequences on the worker + this request's) · E · step

    E expected output tokens, step the decode step as it is now (core/predict.py).

Intent: Preble's split: who shares more than half computes little wherever the rest is, so follow the cache; who shares
less is work, so go where there is the least of it.
Inputs: requests in flight (load), the router's own accounting, the prefix index, the cost model with its calibration.

Differs from the original: the costs are those of the work in flight, by the accelerator's cost model, where the original
adds up what was sent in the last 3 minutes by formulas for Mistral 7B on two kinds of GPU; the expected output is
learned instead of 45 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfleet_router.core.policy import RULED_OUT, RelativePolicy
from kvfleet_router.core.predict import ttft_parts
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker

EXPLOIT_ABOVE = 0.5


class AIBrixPreble(RelativePolicy):
    parts = ("shorter_match", "in_flight", "prefill", "decode")
    uses_prefix = True
    measures_cost = True

    def score_all(
        self, arrival: Arrival, workers: Sequence[Worker], cached_tokens: Sequence[float], now: float
    ) -> list[tuple[float, ...]]:
        longest = max(cached_tokens)
        if longest > EXPLOIT_ABOVE * arrival.prompt_tokens:
            return [
                (0.0 if cached == longest else RULED_OUT, float(worker.in_flight), 0.0, 0.0)
                for worker, cached in zip(workers, cached_tokens, strict=True)
            ]
        costs: list[tuple[float, ...]] = []
        for worker, cached in zip(workers, cached_tokens, strict=True):
            backlog, own, step, _ = ttft_parts(arrival, worker, cached, now)
            sequences = worker.pending + worker.decoding + arrival.parsed.sequences
            costs.append((0.0, 0.0, backlog + own, sequences * arrival.expected_output_tokens * step))
        return costs
