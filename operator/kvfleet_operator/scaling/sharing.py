"""Several pools of one model: the demand of all of them, given to each in the order of its tier and of joules per token.

The routers' queue is shared out equally among a policy's pools, and requests in flight are where the routers put them: the
sum over the pools is the model's demand, how it is spread says nothing about where it should be. `ranking` says that. What
a pool is sized for replaces the value of its `concurrency` reading. Where one of the pools cannot be read in full, or is
scaled on something else, each goes by its own figure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_operator.autoscale.ranking import PoolCapacity, rank_pools, share_demand
from kvfleet_operator.autoscale.readings import Reading
from kvfleet_operator.scaling.pools import MEAN_REQUEST, ScaledPool

SIGNAL = "concurrency"


def shared(
    pools: Sequence[ScaledPool], readings: Sequence[Sequence[Reading]], fleets: Mapping[str, FleetConfig]
) -> list[list[Reading]]:
    """The readings, with demand shared out. `fleets`: by namespace."""
    told = [list(each) for each in readings]
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, pool in enumerate(pools):
        groups[pool.scope.namespace, pool.config.model, pool.config.role].append(index)
    for (namespace, _, _), members in groups.items():
        found = {index: _demand(told[index]) for index in members}
        if len(members) > 1 and all(reading is not None for reading in found.values()):
            demands = {index: reading for index, reading in found.items() if reading is not None}
            values = _shares([pools[index] for index in members], list(demands.values()), fleets[namespace])
            for index, value in zip(members, values, strict=True):
                place = told[index].index(demands[index])
                told[index][place] = replace(demands[index], value=value)
    return told


def _demand(readings: Sequence[Reading]) -> Reading | None:
    return next((reading for reading in readings if reading.signal == SIGNAL and reading.fresh), None)


def _shares(pools: Sequence[ScaledPool], demands: Sequence[Reading], fleet: FleetConfig) -> list[float]:
    """What each pool is sized for."""
    costs = {pool.name: pool.config.cost for pool in pools}
    ranks = [ranked.name for ranked in rank_pools(costs, MEAN_REQUEST, min(pool.itl_slo_s for pool in pools))]
    tiers = {pool.name: _tier(pool, fleet) for pool in pools}
    capacities = {
        pool.name: PoolCapacity(
            pool.name, demand.target or 1.0, pool.workers.ready, pool.autoscaling.max_replicas
        )
        for pool, demand in zip(pools, demands, strict=True)
    }  # fmt: skip
    order = sorted(ranks, key=lambda name: (tiers[name], ranks.index(name)))
    total = sum(demand.value or 0.0 for demand in demands)
    shares = share_demand(total, [capacities[name] for name in order])
    return [shares[pool.name] for pool in pools]


def _tier(pool: ScaledPool, fleet: FleetConfig) -> int:
    """The best that a policy gives it."""
    tiers = [ref.tier for policy in fleet.policies for ref in policy.pools if ref.name == pool.scope.pool]
    return min(tiers, default=0)
