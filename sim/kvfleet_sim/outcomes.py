"""From what came of each request to the figures that are compared. Pure.

A request is inside its SLO if its first token came within max(TTFT SLO, 3 x unloaded TTFT) of being sent and its mean time
between tokens is at most the ITL SLO. Unloaded TTFT: its prompt, uncached, on an idle worker of the fastest pool. The factor
is the router's own (`UNLOADED_FACTOR`): no policy can serve an 80,000-token prompt within a second.

Times are over completed requests; attainment and goodput count failed ones as missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.core.dispatcher import UNLOADED_FACTOR
from kvfleet_sim.fleet import Array, Run


@dataclass(frozen=True, slots=True)
class Slo:
    """What a client of the fleet is promised."""

    ttft_s: float
    itl_s: float

    @classmethod
    def of(cls, config: FleetConfig, model: str) -> Slo:
        """That of the first RoutingPolicy for the model."""
        policy = next(policy for policy in config.policies if model in policy.models)
        return cls(policy.ttft_slo_s, policy.itl_slo_s)


@dataclass(frozen=True, slots=True)
class Figures:
    """One run in numbers; NaN where nothing completed. The names are those of the JSON output."""

    completed: int
    failed: int
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    itl_p99_ms: float
    """Of the requests' mean times between tokens."""
    goodput_rps: float
    """Requests inside their SLO, per second of arrivals."""
    slo_attainment: float
    """Share of the requests inside their SLO."""
    prefix_hit_ratio: float
    """Share of the prompt tokens that engines found in their caches."""
    joules_per_token: float
    """Joules of the whole fleet, idling included, per output token."""
    worker_share: float = 1.0
    """Share of the workers' time in which they were there (on, starting or leaving)."""
    worker_hours: float = 0.0
    """Hours that workers were there, all together."""
    joules: float = 0.0
    """Of the whole fleet."""
    starts: int = 0
    """Workers started while the fleet ran."""


def unloaded_ttft_s(config: FleetConfig, prompt_tokens: Array) -> Array:
    """TTFT of uncached prompts on an idle worker of the fastest pool that has workers."""
    costs = [pool.cost for pool in config.pools if pool.endpoints]
    context = prompt_tokens / 2
    times = [
        prompt_tokens * (cost.prefill_s_per_token + cost.prefill_s_per_token_pair * context) + cost.step_s
        for cost in costs
    ]
    fastest: Array = np.minimum.reduce(times)
    return fastest


def inside_slo(run: Run, config: FleetConfig, slo: Slo) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which requests were served as promised."""
    limit_s = np.maximum(slo.ttft_s, UNLOADED_FACTOR * unloaded_ttft_s(config, run.prompt_tokens))
    # Comparisons with NaN are false: what failed is not inside.
    return np.asarray((run.ttft_s <= limit_s) & (run.itl_s <= slo.itl_s))


def figures(run: Run, config: FleetConfig, slo: Slo, rate_rps: float) -> Figures:
    """`rate_rps`: at which the requests were sent."""
    done = run.completed
    good = int(inside_slo(run, config, slo).sum())
    nothing = not done.any()
    ttft_ms = run.ttft_s[done] * 1000 if not nothing else np.array([np.nan])
    itl_ms = run.itl_s[done] * 1000 if not nothing else np.array([np.nan])
    p50, p90, p99 = (float(value) for value in np.percentile(ttft_ms, (50, 90, 99)))
    return Figures(
        completed=int(done.sum()),
        failed=int((~done).sum()),
        ttft_mean_ms=float(ttft_ms.mean()),
        ttft_p50_ms=p50,
        ttft_p90_ms=p90,
        ttft_p99_ms=p99,
        itl_p99_ms=float(np.percentile(itl_ms, 99)),
        goodput_rps=good / len(done) * rate_rps,
        slo_attainment=good / len(done),
        prefix_hit_ratio=float(run.cached_tokens[done].sum() / run.prompt_tokens[done].sum())
        if not nothing
        else np.nan,
        joules_per_token=float(run.joules / run.output_tokens[done].sum()) if not nothing else np.nan,
        worker_share=run.worker_share,
        worker_hours=run.worker_seconds / 3600,
        joules=run.joules,
        starts=run.starts,
    )
