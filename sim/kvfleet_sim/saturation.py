"""How much a fleet can take: its saturation rate, by which loads are named, and a policy's SLO capacity. Pure.

Saturation is a property of fleet and load, not of the policies compared: the higher of two baselines' throughputs
(`REFERENCES`) while requests arrive a quarter faster than they are answered. So load 0.8 is the same rate for every policy.

SLO capacity is a policy's own: the highest rate at which at least 95 % of the requests are inside their SLO, by bisection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvfleet_api.cost import CostModel
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_sim.fleet import Run, simulate, with_policy
from kvfleet_sim.workload import Load, LoadRequest

REFERENCES: Final = ("lmetric", "ttft_min")
OVERLOAD: Final = 1.25
"""Arrival rate over throughput at which throughput is measured."""
OVERLOAD_BOUNDS: Final = (1.1, 1.5)
MAX_TRIES: Final = 6
WARM_UP_SHARE: Final = 0.2
"""The first part of the arrivals: caches are cold and queues short."""
WANTED_ATTAINMENT: Final = 0.95
CAPACITY_PRECISION: Final = 0.02


def saturation_rps(
    config: FleetConfig, load: Load, model: str, on_progress: Callable[[int], None] | None = None
) -> float:
    """Requests per second that the fleet answers when more arrive."""
    rate_rps = upper_bound_rps(config, load.requests(1.0, 0))
    best_rps = 0.0
    for policy in REFERENCES:
        rate_rps, throughput = _overloaded(with_policy(config, policy), load, model, rate_rps, on_progress)
        best_rps = max(best_rps, throughput)
    return best_rps


def upper_bound_rps(config: FleetConfig, load: list[LoadRequest]) -> float:
    """Throughput if every prefix were computed once and every batch were full."""
    seen: set[int] = set()
    hits = []
    for request in load:
        cached = next((i for i, key in enumerate(request.block_keys) if key not in seen), len(request.block_keys))
        hits.append(cached / max(len(request.block_keys), 1))
        seen.update(request.block_keys)
    workers = [pool.cost for pool in config.pools for _ in pool.endpoints]
    return sum(len(load) / sum(map(_service_s, [cost] * len(load), load, hits)) for cost in workers)


def _service_s(cost: CostModel, request: LoadRequest, hit_ratio: float) -> float:
    """Seconds of a worker that a request takes in a full batch."""
    context = request.prompt_tokens + request.output_tokens / 2
    step_s = cost.step_s / cost.max_sequences + cost.step_s_per_sequence + cost.step_s_per_context_token * context
    uncached = max(request.prompt_tokens * (1 - hit_ratio), 1.0)
    return cost.prefill_s(uncached, request.prompt_tokens) + request.output_tokens * step_s


def _overloaded(
    config: FleetConfig, load: Load, model: str, rate_rps: float, on_progress: Callable[[int], None] | None
) -> tuple[float, float]:
    """A rate that overloads the fleet, not by much, and the throughput then."""
    throughput = rate_rps
    for _ in range(MAX_TRIES):
        requests = load.requests(rate_rps, 0)
        run = simulate(config, requests, model=model, block_tokens=load.block_tokens, on_progress=on_progress)
        throughput = throughput_rps(run, rate_rps)
        if OVERLOAD_BOUNDS[0] <= rate_rps / throughput <= OVERLOAD_BOUNDS[1]:
            break
        rate_rps = OVERLOAD * throughput
    return rate_rps, throughput


def throughput_rps(run: Run, rate_rps: float) -> float:
    """Requests answered per second while requests arrived, warm-up aside."""
    finish_s = run.finish_s[run.completed]
    if not len(finish_s):
        raise ValueError("no request of the load was answered: look at the fleet's context length and KV tokens")
    end_s = len(run.sent_s) / rate_rps
    start_s = WARM_UP_SHARE * end_s
    answered = int(((finish_s > start_s) & (finish_s <= end_s)).sum())
    if answered < 10:  # too short a load to be in full swing
        return float(len(finish_s) / finish_s.max())
    return answered / (end_s - start_s)


def slo_capacity_rps(attainment: Callable[[float], float], first_rps: float) -> float:
    """The highest rate with 95 % attainment, to 2 %; 0 where there is none above a sixteenth of `first_rps`."""
    low, high = 0.0, first_rps
    while attainment(high) >= WANTED_ATTAINMENT:
        low, high = high, high * 1.25
        if high > 16 * first_rps:
            return low  # more than the load's own length can show
    if not low:
        low = high / 2
        while attainment(low) < WANTED_ATTAINMENT:
            low, high = low / 2, low
            if low < first_rps / 16:
                return 0.0
    while high - low > CAPACITY_PRECISION * high:
        middle = (low + high) / 2
        if attainment(middle) >= WANTED_ATTAINMENT:
            low = middle
        else:
            high = middle
    return low
