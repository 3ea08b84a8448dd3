"""Power budgets, and the least they must allow for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvfleet_api.common import Resource
from kvfleet_api.cost import CostModel
from kvfleet_api.fleetconfig import PoolConfig
from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_api.modelpool import ModelPool
from kvfleet_api.problems import Problem, problem_of
from kvfleet_api.routingpolicy import RoutingPolicy


def watts(budget: int | None) -> float | None:
    return None if budget is None else float(budget)


def least_watts(cost: CostModel, workers: int) -> tuple[float, float]:
    """What `workers` (at least one) draw when idle, and what the first request on one of them adds. Watts."""
    step_s = cost.decode_step_s(1, 0)
    working = cost.decode_step_joules(1, 0) / step_s if step_s > 0 else 0.0
    return cost.idle_watts * max(workers, 1), max(working - cost.idle_watts, 0.0)


def report_small_budgets(
    router: FleetRouter | None,
    pools: Sequence[ModelPool],
    policies: Sequence[RoutingPolicy],
    compiled: Sequence[PoolConfig],
    problems: list[Problem],
) -> None:
    """Budgets under which not even one request could run. `compiled`: of `pools`, in their order."""
    least = {
        config.name: least_watts(config.cost, pool.spec.least_workers)
        for config, pool in zip(compiled, pools, strict=True)
    }

    def check(resource: Resource, field: str, budget: int | None, whose: Iterable[str]) -> None:
        needs = [least[name] for name in whose if name in least]
        if budget is None or not needs:
            return
        needed = sum(idle for idle, _ in needs) + min(added for _, added in needs)
        if budget < needed:
            message = (
                f"{budget} W are less than the {needed:.0f} W of its idle workers and one request: no request can run; "
                "raise it, or have fewer workers"
            )
            problems.append(problem_of(resource, field, "Accepted", "BudgetTooSmall", message, "Warning"))

    for pool in pools:
        check(pool, "spec.maxWatts", pool.spec.max_watts, [pool.metadata.name])
    for policy in policies:
        energy = policy.spec.energy
        if energy.mode == "Strict":
            check(policy, "spec.energy.maxWatts", energy.max_watts, [ref.name for ref in policy.spec.pools])
    if router is not None:
        check(router, "spec.maxWatts", router.spec.max_watts, least)
