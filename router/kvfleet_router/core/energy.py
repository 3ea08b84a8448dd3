"""Joules: what a request adds on a worker, what a pool draws, and how full a worker should be.

ΔE  = ep·u + E·(E1 + Ec·(L + E/2)) + (E0 − P_idle·W)·E·(1 + B·n)/(n + 1)     n: sequences already there
P   = P_idle while idle, else the larger of P_idle and step joules / step time
b*  = least of 2·E0/E1, (ITL SLO − W)/(H + C·context + prefill/answer), KV tokens / context, max sequences    of means
      J/token is within 1.5 of its floor at 2·E0/E1: fuller workers save little and only add latency
      every sequence brings a prefill with it, which interrupts all others once in as many steps as its answer has tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfleet_api.cost import CostModel

if TYPE_CHECKING:
    from kvfleet_router.core.columns import Array, Columns
    from kvfleet_router.core.ticket import Arrival
    from kvfleet_router.core.worker import Worker


def marginal_joules(arrival: Arrival, worker: Worker, uncached_tokens: float, breach: float = 0.0) -> float:
    """[ΔE] Joules the request adds on this worker. `breach` [B], 0 to 1: so far, sharing steps with others saves nothing."""
    expected = arrival.expected_output_tokens
    token = worker.token_joules + worker.context_token_joules * (arrival.prompt_tokens + expected / 2)
    others = worker.decoding + worker.pending
    fixed = worker.fixed_step_joules * expected * (1.0 + breach * others) / (others + 1)
    return worker.prefill_token_joules * uncached_tokens + expected * token + fixed


def marginal_joules_many(
    arrival: Arrival, workers: Columns, uncached_tokens: Array, breach: Array | float = 0.0
) -> Array:
    """`marginal_joules` for every worker of the columns."""
    expected = arrival.expected_output_tokens
    token = workers.token_joules + workers.context_token_joules * (arrival.prompt_tokens + expected / 2)
    others = workers.decoding + workers.pending
    fixed = workers.fixed_step_joules * expected * (1.0 + breach * others) / (others + 1.0)
    return workers.prefill_token_joules * uncached_tokens + expected * token + fixed


def watts(cost: CostModel, sequences: int, context_tokens: float, step_s: float) -> float:
    """[P] What a worker with these sequences draws."""
    if not sequences:
        return cost.idle_watts
    return max(cost.idle_watts, cost.decode_step_joules(sequences, context_tokens) / step_s)


def pack_target(
    cost: CostModel,
    *,
    step_s: float,
    step_s_per_sequence: float,
    itl_slo_s: float,
    context_tokens: float,
    prefill_s_per_output_token: float = 0.0,
) -> int:
    """[b*] Sequences to fill a worker with before another one is used; `context_tokens`: mean of a sequence."""
    limits = [float(cost.max_sequences), cost.kv_tokens / max(context_tokens, 1.0)]
    if cost.token_joules > 0 and cost.step_joules > 0:
        limits.append(2.0 * cost.step_joules / cost.token_joules)
    slope = step_s_per_sequence + cost.step_s_per_context_token * context_tokens + prefill_s_per_output_token
    if slope > 0:
        limits.append((itl_slo_s - step_s) / slope)
    return max(int(min(limits)), 1)
