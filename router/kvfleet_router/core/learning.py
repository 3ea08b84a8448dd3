"""What a finished request teaches: about its model's prompts and answers, its worker's steps, and its worker's cache."""

from __future__ import annotations

from typing import Final

from kvfleet_router.core.calibration import FADE
from kvfleet_router.core.exact import learn_exact
from kvfleet_router.core.ticket import Ticket

CONTRADICTIONS_TO_FORGET: Final = 3
"""Reports in a row that next to nothing of a long expected prefix was cached: the view of the worker's cache is wrong."""
CONTRADICTION_TOKENS: Final = 1024
STREAM_OVERHEAD_CHUNKS: Final = 2
"""Chunks of a stream that carry no token: the role at the beginning, the end mark."""


def learn(
    ticket: Ticket, output_tokens: int | None, prompt_tokens: int | None, cached_tokens: int | None, now: float
) -> None:
    """Take in what the engine reported; without a report, a stream's chunks stand for its tokens."""
    parsed, worker = ticket.parsed, ticket.worker
    pool = worker.pool_state
    tokens = output_tokens
    if tokens is None and parsed.stream:
        tokens = ticket.chunks - STREAM_OVERHEAD_CHUNKS
    if tokens is not None and tokens > 0 and not ticket.hands_on:
        tokens = max(tokens // parsed.sequences, 1)
        pool.stats.outputs.observe(parsed.tenant, tokens)
        if parsed.stream and not ticket.arrival.resumed:
            worker.calibrate_decode(ticket, tokens, now)
    if prompt_tokens is not None and prompt_tokens > 0:
        stats = pool.stats
        stats.mean_prompt_tokens += (1.0 - FADE) * (prompt_tokens - stats.mean_prompt_tokens)
        uncached = prompt_tokens - min(ticket.cached_tokens if cached_tokens is None else cached_tokens, prompt_tokens)
        stats.mean_uncached_tokens += (1.0 - FADE) * (uncached - stats.mean_uncached_tokens)
        if parsed.prompt_tokens is None and parsed.prompt_bytes:
            pool.stats.ratio.observe(parsed.prompt_bytes, prompt_tokens)
            pool.fit_blocks_if_moved()
    expected = 0.0 if ticket.arrival.received_tokens else ticket.cached_tokens  # what came along says nothing of caches
    if ticket.precise:
        if cached_tokens is not None:
            learn_exact(ticket, cached_tokens)
    elif cached_tokens is not None and expected >= CONTRADICTION_TOKENS:
        wrong = cached_tokens < 0.1 * expected
        worker.contradictions = worker.contradictions + 1 if wrong else 0
        if worker.contradictions >= CONTRADICTIONS_TO_FORGET:
            worker.contradictions = 0
            worker.cache.clear()
