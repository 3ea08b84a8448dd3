"""Predicts what a request meets on a worker: the shared half of every policy that looks ahead, and of decision records.

With L prompt tokens, u of them uncached, E the expected output, and the worker's own figures (worker.py):

    own      = infl · g·(Pp·u + Pq·u·(L − u/2))                 its own prefill
    backlog  = infl · max(0, Σ pending prefill − min(now − head began, head's prefill))
    step     = W + H·n + C·ctx                                  the decode step that yields its first token
    infl     = 1 + step/(max_step_tokens·g·Pp)                  prefill steps carry the decoding sequences along
    kv_wait  = deficit·(E·(step + 1 ms) + backlog/2)/used       while KV tokens (or sequence slots) are short
    TTFT     = backlog + own + step + kv_wait

`*_many` are the same formulas over columns of workers (columns.py); a test holds the two together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from kvfleet_router.core.columns import Array, Columns
    from kvfleet_router.core.ticket import Arrival
    from kvfleet_router.core.worker import Worker

STEP_SLACK_S: Final = 0.001
"""The engine's own overhead of a step."""


def backlog_s(worker: Worker, now: float) -> float:
    """Seconds until the worker could begin with another prompt."""
    left = worker.backlog_s
    if not left:
        return 0.0
    elapsed, head = now - worker.head_since, worker.head_prefill_s
    left -= head if elapsed > head else elapsed
    return worker.inflation * left if left > 0.0 else 0.0


def ttft_parts(arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, float, float, float]:
    """(backlog, own, step, kv_wait) in seconds."""
    prompt = arrival.prompt_tokens
    uncached = prompt - cached_tokens
    prefill = uncached * (worker.prefill_s_per_token + worker.prefill_s_per_token_pair * (prompt - uncached / 2))
    step = worker.step_now_s
    backlog = backlog_s(worker, now)
    expected = arrival.expected_output_tokens
    kv_wait = 0.0
    deficit = worker.kv_used_tokens + uncached + arrival.received_tokens + expected - worker.kv_tokens
    surplus = worker.decoding + worker.pending + 1 - worker.max_sequences
    if deficit > 0.0 or surplus > 0:
        life = expected * (step + STEP_SLACK_S) + backlog / 2
        if deficit > 0.0:
            kv_wait = deficit * life / max(worker.kv_used_tokens, 1.0)
        if surplus > 0:
            kv_wait = max(kv_wait, surplus * life / worker.max_sequences)
    return backlog, worker.inflation * prefill, step, kv_wait


def ttft_parts_many(
    arrival: Arrival, workers: Columns, cached_tokens: Array, now: float
) -> tuple[Array, Array, Array, Array]:
    """`ttft_parts` for every worker of the columns."""
    prompt = arrival.prompt_tokens
    uncached = prompt - cached_tokens
    prefill = uncached * (workers.prefill_s_per_token + workers.prefill_s_per_token_pair * (prompt - uncached / 2))
    step = workers.step_now_s
    left = workers.backlog_s - np.minimum(now - workers.head_since, workers.head_prefill_s)
    backlog = workers.inflation * np.maximum(left, 0.0)
    expected = arrival.expected_output_tokens
    life = expected * (step + STEP_SLACK_S) + backlog / 2
    needed = uncached + arrival.received_tokens + expected
    deficit = np.maximum(workers.kv_used_tokens + needed - workers.kv_tokens, 0.0)
    kv_wait = deficit * life / np.maximum(workers.kv_used_tokens, 1.0)
    surplus = np.maximum(workers.decoding + workers.pending + 1.0 - workers.max_sequences, 0.0)
    kv_wait = np.maximum(kv_wait, surplus * life / workers.max_sequences)
    return backlog, workers.inflation * prefill, step, kv_wait
