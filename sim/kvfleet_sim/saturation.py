"""How much a fleet can take: its saturation rate, by which loads are named, and a policy's SLO capacity. Pure.

Saturation is a property of fleet and load, not of the policies compared: workers over the seconds of a worker that a request
takes in full batches, with as much of its prompt cached as a baseline (`REFERENCE`) finds in overload. So load 0.8 is the
same rate for every policy, and a short trace gives about the same rate as a long one (throughput in overload does not: while
it is measured, the long answers are still running). A policy that finds more in the caches can be stable above load 1.

SLO capacity is a policy's own: the highest rate at which at least 95 % of the requests are inside their SLO, by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from kvfleet_api.cost import CostModel
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_sim.fleet import Array, simulate
from kvfleet_sim.variants import with_policy
from kvfleet_sim.workload import Load, LoadRequest

REFERENCE: Final = "lmetric"
WANTED_ATTAINMENT: Final = 0.95
CAPACITY_PRECISION: Final = 0.02
SEARCH_RANGE: Final = 16.0
"""How far above and below the first rate a capacity is searched."""


def saturation_rps(
    config: FleetConfig, load: Load, model: str, on_progress: Callable[[int], None] | None = None
) -> float:
    """Requests per second that the fleet can answer. Raises ValueError where it can answer none."""
    requests = load.requests(1.0, 0, patient=False)
    overload_rps = answered_rps(config, requests, _most_cached(requests, load.block_tokens))
    requests = load.requests(overload_rps, 0, patient=False)
    run = simulate(
        with_policy(config, REFERENCE),
        requests,
        model=model,
        block_tokens=load.block_tokens,
        on_progress=on_progress,
    )
    if not run.completed.any():
        raise ValueError("no request of the load was answered: look at the fleet's context length and KV tokens")
    return answered_rps(config, requests, np.nan_to_num(run.cached_tokens))


def answered_rps(config: FleetConfig, load: Sequence[LoadRequest], cached_tokens: Array) -> float:
    """Requests per second that the workers can answer in full batches, with so many of each prompt's tokens cached."""
    return sum(1.0 / _service_s(pool.cost, load, cached_tokens) for pool in config.pools for _ in pool.endpoints)


def _service_s(cost: CostModel, load: Sequence[LoadRequest], cached_tokens: Array) -> float:
    """Mean seconds of a worker that a request takes: its prefill, and its share of full decode steps."""
    prompt = np.array([request.prompt_tokens for request in load], dtype=np.float64)
    output = np.array([request.output_tokens for request in load], dtype=np.float64)
    uncached = prompt - cached_tokens
    prefill_s = uncached * (cost.prefill_s_per_token + cost.prefill_s_per_token_pair * (prompt - uncached / 2))
    context = float((output * (prompt + output / 2)).sum() / output.sum())  # of a sequence in a step
    sequences = max(min(cost.max_sequences, cost.kv_tokens / context), 1.0)
    decode_s = float(output.mean()) * cost.decode_step_s(sequences, sequences * context) / sequences
    return float(prefill_s.mean()) + decode_s


def _most_cached(load: Sequence[LoadRequest], block_tokens: int) -> Array:
    """Tokens cached of each prompt if nothing were ever evicted and all workers shared one cache."""
    seen: set[int] = set()
    cached = np.zeros(len(load))
    for number, request in enumerate(load):
        keys = request.block_keys
        blocks = next((depth for depth, key in enumerate(keys) if key not in seen), len(keys))
        cached[number] = min(blocks * block_tokens, request.prompt_tokens - 1)
        seen.update(keys)
    return cached


def slo_capacity_rps(attainment: Callable[[float], float], first_rps: float) -> float:
    """The highest rate with 95 % attainment, to 2 %; 0 where even a sixteenth of `first_rps` is too much."""
    low, high = 0.0, first_rps
    while attainment(high) >= WANTED_ATTAINMENT:
        low, high = high, high * 1.25
        if high > SEARCH_RANGE * first_rps:
            return low  # the load is over before anything fills up
    if not low:
        low = high / 2
        while attainment(low) < WANTED_ATTAINMENT:
            low, high = low / 2, low
            if low < first_rps / SEARCH_RANGE:
                return 0.0
    while high - low > CAPACITY_PRECISION * high:
        middle = (low + high) / 2
        if attainment(middle) >= WANTED_ATTAINMENT:
            low = middle
        else:
            high = middle
    return low
