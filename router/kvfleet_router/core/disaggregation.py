"""Prefill and decode apart: which requests are divided, and what the first half of one looks like.

Where a policy has pools of the roles Prefill and Decode, a prompt with much to compute goes to a Prefill worker first, which
computes it, answers with one token and says where its KV entries are; a Decode worker fetches them and answers the client.
So decoding sequences are not interrupted by long prompts. What a Decode worker would find mostly cached, or is short, it
computes itself: fetching would cost more than it saves (`RoutingPolicy.spec.disaggregation.minUncachedTokens`).

The Decode worker is chosen when the prompt is computed, not before: then it is known who has room. Where no Prefill worker is
usable, or one answered without KV entries, the Decode worker computes the prompt as a Unified one would. A Decode worker that
fails sends the request back to the beginning; the Prefill worker's prefix cache makes that cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfleet_router.core.choose import Choice
    from kvfleet_router.core.ticket import Arrival

DIVISIBLE_KINDS = ("chat", "completions")
"""Endpoints that take and give `kv_transfer_params`."""


def divisible(arrival: Arrival, choice: Choice) -> bool:
    """Whether a Prefill worker should compute the prompt for the worker chosen."""
    if arrival.whole or arrival.received_tokens or choice.worker.pool_state.config.role != "Decode":
        return False
    parsed = arrival.parsed
    if parsed.kind not in DIVISIBLE_KINDS or parsed.sequences != 1 or parsed.transfers or parsed.max_output_tokens == 1:
        return False
    uncached = arrival.prompt_tokens - choice.cached_tokens
    return uncached >= arrival.lane.config.disaggregation.min_uncached_tokens
