"""Every autoscaled pool, one step at a time: readings in, numbers of workers out. Pure but for the memory it keeps.

For each pool: what its activity says, the lower bound (the largest of schedule and forecast), HPA's decision, sleep if
it has been idle for long enough; then the budget over all pools of a step. What is remembered of a pool (windows,
changes, activity, forecast) has a fixed size and goes when the pool is no longer given.

The caller owns everything else: reading the signals, writing `replicas`, conditions and status (`report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from kvfleet_api.modelpool import AutoscalingSpec
from kvfleet_operator.autoscale.behavior import ScalerState
from kvfleet_operator.autoscale.budget import Budget, Claim, allocate
from kvfleet_operator.autoscale.decide import Decision, Floor, Workers, decide
from kvfleet_operator.autoscale.forecast import DEFAULT_STARTUP_S, Forecast, SeasonalForecaster
from kvfleet_operator.autoscale.idleness import Activity, idle_s, may_sleep, observe
from kvfleet_operator.autoscale.readings import Reading
from kvfleet_operator.autoscale.schedule import ScheduleProblem, schedule_floor


@dataclass(frozen=True, slots=True)
class PoolStep:
    """What is known of one pool in one step."""

    key: str
    """`namespace/name`."""
    spec: AutoscalingSpec
    workers: Workers
    readings: Sequence[Reading]
    busy: Reading
    """Requests in flight or held for the pool (`signals.activity_signals`)."""
    served: Reading
    """Requests ever served."""
    startup_s: float | None = None
    """From creating a worker until it is ready, as measured; None: no worker was seen to start yet."""
    gpus_per_worker: int = 1
    watts_per_worker: float = 0.0
    joules_per_token: float = 0.0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PoolResult:
    """What one step says about a pool."""

    decision: Decision
    schedule_problems: Sequence[ScheduleProblem] = ()
    forecast: Forecast | None = None
    startup_s: float | None = None


@dataclass(slots=True)
class _Memory:
    scaler: ScalerState = field(default_factory=ScalerState)
    activity: Activity | None = None
    forecaster: SeasonalForecaster = field(default_factory=SeasonalForecaster)


class Autoscaler:
    """Remembers what each pool's decisions rest on."""

    def __init__(self) -> None:
        self._pools: dict[str, _Memory] = {}

    def step(self, pools: Sequence[PoolStep], now_s: float, budget: Budget = Budget()) -> dict[str, PoolResult]:
        """Decide for all pools at Unix time `now_s`. Pools that are not given are forgotten."""
        self._pools = {pool.key: self._pools.get(pool.key) or _Memory() for pool in pools}
        results = {pool.key: self._decide(pool, now_s) for pool in pools}
        return _rationed(pools, results, budget)

    def learn(self, key: str, history: Sequence[tuple[float, float]]) -> None:
        """Teach a pool's forecast its past demand, as (Unix time, demand) in order of time. For a pool's first step."""
        memory = self._pools.setdefault(key, _Memory())
        memory.forecaster.learn(history)

    def _decide(self, pool: PoolStep, now_s: float) -> PoolResult:
        memory = self._pools[pool.key]
        woken = memory.scaler.wanted == 0 and pool.workers.wanted > 0
        memory.activity = observe(None if woken else memory.activity, pool.busy, pool.served, now_s)
        floor, problems = schedule_floor(pool.spec.schedule, now_s)
        forecast = _forecast(pool, memory, now_s)
        if forecast is not None and forecast.usable and pool.spec.forecast.mode == "Raise":
            floor = max(floor, _forecast_floor(pool, forecast), key=lambda bound: bound.replicas)
        decision = decide(pool.spec, pool.readings, pool.workers, memory.scaler, now_s, floor=floor)
        memory.scaler = decision.state
        sees = decision.blind is None and floor.replicas == 0
        if pool.workers.wanted and sees and may_sleep(pool.spec, memory.activity, now_s):
            decision = _asleep(decision, pool, idle_s(memory.activity, now_s))
        return PoolResult(decision, problems, forecast, pool.startup_s)


def _demand(pool: PoolStep) -> Reading | None:
    """The reading that says how much work there is, whatever the fleet: the first total with a target per worker."""
    return next((reading for reading in pool.readings if reading.kind == "AverageValue" and reading.fresh), None)


def _forecast(pool: PoolStep, memory: _Memory, now_s: float) -> Forecast | None:
    if pool.spec.forecast.mode == "Off":
        return None
    demand = _demand(pool)
    if demand is not None and demand.value is not None:
        memory.forecaster.observe(now_s, demand.value)
    return memory.forecaster.forecast(now_s, _lead_s(pool))


def _lead_s(pool: PoolStep) -> float:
    wanted = pool.spec.forecast.lead_seconds
    measured = DEFAULT_STARTUP_S if pool.startup_s is None else pool.startup_s
    return measured if wanted is None else float(wanted)


def _forecast_floor(pool: PoolStep, forecast: Forecast) -> Floor:
    demand = _demand(pool)
    if demand is None or demand.target is None:
        return Floor()
    # A sliver of a worker is none, or a pool would never be expected to be idle.
    workers = ceil(max(0.0, forecast.demand / demand.target - pool.spec.tolerance_percent / 100))
    return Floor(min(workers, pool.spec.max_replicas), f"forecast: {forecast.message}")


def _asleep(decision: Decision, pool: PoolStep, idle_for_s: float) -> Decision:
    message = f"no request for {idle_for_s:.0f} s; goes from {pool.workers.wanted} to 0"
    return replace(decision, desired=0, reason="Idle", message=message, held_back_by=None, leaving=0)


def _rationed(pools: Sequence[PoolStep], results: Mapping[str, PoolResult], budget: Budget) -> dict[str, PoolResult]:
    """The results after the budget had its say."""
    if budget.gpus is None and budget.watts is None:
        return dict(results)
    claims = [
        Claim(
            pool.key,
            pool.workers.wanted,
            results[pool.key].decision.desired,
            least=min(pool.spec.min_replicas, results[pool.key].decision.desired),
            gpus_per_worker=pool.gpus_per_worker,
            watts_per_worker=pool.watts_per_worker,
            joules_per_token=pool.joules_per_token,
            priority=pool.priority,
        )
        for pool in pools
    ]
    return {
        grant.pool: _granted(results[grant.pool], grant.replicas, grant.held_back_by)
        for grant in allocate(claims, budget)
    }


def _granted(result: PoolResult, replicas: int, held_back_by: str | None) -> PoolResult:
    if held_back_by is None:
        return result
    decision = result.decision
    message = f"{decision.message}; gets {replicas}: {held_back_by}"
    rationed = replace(decision, desired=replicas, reason="Budget", message=message, held_back_by=held_back_by)
    return replace(result, decision=rationed)
