"""Power budgets: of a pool, of a policy's pools (`energy.mode: Strict`), of all pools. A request that would exceed one waits.

What workers draw is the cost model's word (`pool.worker_watts`), not a meter's: it is known at once, for every worker. Who waits for
power claims it: until the claim ends, less urgent requests get none of that budget, whatever policy or pool they are for.
Whoever still waits renews its claim whenever it is decided again, which is more often than claims end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.core.pool import Fleet, Pool, worker_watts
from kvfleet_router.core.routes import Candidates, Lane
from kvfleet_router.core.worker import Worker

CLAIM_S: Final = 0.05
"""Held requests are decided again at least every 10 ms."""


class PowerBudget:
    """Watts that some pools may draw together."""

    __slots__ = ("_claimed_until", "_priority", "max_watts", "pools", "whose")

    def __init__(self, whose: str, max_watts: float, pools: Sequence[Pool]) -> None:
        self.whose = whose
        """As in messages: `pool llama`."""
        self.max_watts = max_watts
        self.pools = tuple(pools)
        self._priority = 0
        self._claimed_until = float("-inf")

    def drawn_watts(self) -> float:
        return sum(pool.watts() for pool in self.pools)

    def spare_watts(self, share: float) -> float:
        """What is left of the budget. `share`: the part of it above the workers' idle power that is this router's."""
        if share >= 1.0:
            return self.max_watts - self.drawn_watts()
        idle = sum(pool.cost.idle_watts * len(pool.workers) for pool in self.pools)
        return idle + (self.max_watts - idle) * share - self.drawn_watts()

    def claim(self, priority: int, now: float) -> None:
        """A request of this priority waits for power."""
        if now >= self._claimed_until or priority <= self._priority:
            self._priority, self._claimed_until = priority, now + CLAIM_S

    def claimed_since(self, then: float) -> bool:
        """Somebody waited for power at that time or later."""
        return then < self._claimed_until

    def claimed_before(self, priority: int, now: float) -> bool:
        """Somebody more urgent waits for power."""
        return now < self._claimed_until and self._priority < priority


def named(budgets: Sequence[PowerBudget]) -> str:
    """As in messages."""
    return ", ".join(f"{budget.whose} ({budget.max_watts:.0f} W)" for budget in budgets)


def configure_budgets(config: FleetConfig, fleet: Fleet, lanes: Sequence[Lane]) -> list[PowerBudget]:
    """The configured budgets, each handed to the lanes whose pools it is about."""
    pools = fleet.pools
    shared = [
        PowerBudget(f"pool {p.name}", p.max_watts, [pools[p.name]]) for p in config.pools if p.max_watts is not None
    ]
    if config.max_watts is not None:
        shared.append(PowerBudget("all pools", config.max_watts, list(pools.values())))
    strict = {
        p.name: PowerBudget(f"policy {p.name}", p.max_watts, [pools[ref.name] for ref in p.pools])
        for p in config.policies
        if p.max_watts is not None and p.energy_mode == "Strict"
    }
    for lane in lanes:
        own = strict.get(lane.config.name)
        its = {*lane.pools, *lane.prefill_pools}
        budgets = [budget for budget in shared if not its.isdisjoint(budget.pools)]
        lane.power_budgets = tuple(budgets if own is None else [*budgets, own])
    return [*shared, *strict.values()]


def affordable(
    candidates: Candidates, budgets: Sequence[PowerBudget], priority: int, share: float, now: float
) -> Candidates | tuple[PowerBudget, ...]:
    """The candidates on which one more sequence exceeds no budget; or, where there is none, the budgets that are short."""
    within = list(candidates.workers)
    short = []
    for budget in budgets:
        spare = -1.0 if budget.claimed_before(priority, now) else budget.spare_watts(share)
        left = [worker for worker in within if worker.pool_state not in budget.pools or _added_watts(worker) <= spare]
        if len(left) < len(within):
            short.append(budget)
            within = left
    if len(within) == len(candidates.workers):
        return candidates
    return Candidates(within) if within else tuple(short)


def _added_watts(worker: Worker) -> float:
    """What one more sequence would add."""
    return worker_watts(worker, 1) - worker_watts(worker)
