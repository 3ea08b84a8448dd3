"""Demand of one model over several pools: to the pool of fewest joules per token first, by tier before that."""

import pytest

from kvfleet_api.compile import compile_fleet
from kvfleet_operator.autoscale.autoscaler import Autoscaler
from kvfleet_operator.autoscale.budget import Budget
from kvfleet_operator.autoscale.readings import Quality, Reading
from kvfleet_operator.scaling.pools import ScaledPool, scope_of, step_of
from kvfleet_operator.scaling.sharing import shared

TARGET = 10.0


def a_fleet(make, *pools, tiers=None, priorities=None, **profiles):
    """Pools (name → (ready workers, maxReplicas)) of one model, each on a profile of its own, and their configuration."""
    tiers, priorities = tiers or {}, priorities or {}
    manifests, parsed = [], []
    for name, (_, most) in pools:
        autoscaling = {"minReplicas": 0, "maxReplicas": most, "priority": priorities.get(name, 0)}
        manifest = make.pool(name, profile=name, autoscaling=autoscaling)
        manifests.append(make.profile(name))
        manifests[-1]["spec"]["prior"]["stepMillijoulesPerWeightGB"] = profiles[name]
        parsed.append(make.parse(manifest))
    policy = make.policy(pools=[name for name, _ in pools])
    for ref in policy["spec"]["pools"]:
        ref["tier"] = tiers.get(ref["name"], 0)
    config = compile_fleet(None, parsed, [make.parse(policy)], [make.parse(each) for each in manifests]).config
    configs = {pool.name: pool for pool in config.pools}
    scaled = []
    for pool, (name, (ready, _)) in zip(parsed, pools, strict=True):
        workload = {"kind": "Deployment", "spec": {"replicas": ready}, "status": {"readyReplicas": ready}}
        scope = scope_of(config, configs[name])
        scaled.append(ScaledPool(pool, pool.spec.autoscaling, configs[name], 0.05, workload, scope, ()))
    return scaled, {"default": config}


def reading(value, quality=Quality.FRESH):
    return Reading("concurrency", "AverageValue", quality, value, TARGET)


def values(scaled, fleets, *demands):
    found = shared(scaled, [[each] for each in demands], fleets)
    return {pool.scope.pool: readings[0].value for pool, readings in zip(scaled, found, strict=True)}


def test_the_frugal_pool_is_sized_for_all_it_can_carry_and_the_other_for_the_rest(make):
    scaled, fleets = a_fleet(make, ("hungry", (0, 9)), ("frugal", (0, 3)), hungry=400, frugal=100)
    assert values(scaled, fleets, reading(20.0), reading(0.0)) == {"frugal": 20.0, "hungry": 0.0}
    assert values(scaled, fleets, reading(25.0), reading(25.0)) == {"frugal": 30.0, "hungry": 20.0}


def test_a_worse_pool_is_kept_until_the_better_one_has_workers_ready(make):
    scaled, fleets = a_fleet(make, ("hungry", (2, 9)), ("frugal", (0, 3)), hungry=400, frugal=100)
    assert values(scaled, fleets, reading(20.0), reading(0.0)) == {"frugal": 20.0, "hungry": 20.0}


def test_a_policys_tiers_come_before_joules(make):
    pools = [("hungry", (0, 9)), ("frugal", (0, 3))]
    scaled, fleets = a_fleet(make, *pools, tiers={"frugal": 1}, hungry=400, frugal=100)
    assert values(scaled, fleets, reading(20.0), reading(0.0)) == {"frugal": 0.0, "hungry": 20.0}


@pytest.mark.parametrize("quality", [Quality.PARTIAL, Quality.STALE, Quality.FAILED])
def test_where_one_pool_cannot_be_read_each_goes_by_its_own_figure(make, quality):
    scaled, fleets = a_fleet(make, ("hungry", (0, 9)), ("frugal", (0, 3)), hungry=400, frugal=100)
    assert values(scaled, fleets, reading(20.0), reading(5.0, quality)) == {"frugal": 5.0, "hungry": 20.0}


def test_a_pool_alone_is_left_alone(make):
    scaled, fleets = a_fleet(make, ("only", (1, 3)), only=100)
    assert values(scaled, fleets, reading(70.0)) == {"only": 70.0}


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("b", "a")])
def test_under_a_budget_the_pool_of_higher_priority_grows_first(make, first, second):
    scaled, _ = a_fleet(make, ("a", (0, 9)), ("b", (0, 9)), priorities={first: 1}, a=100, b=100)
    activity = (reading(40.0), reading(0.0))
    steps = [step_of(pool, [reading(40.0)], activity) for pool in scaled]
    results = Autoscaler().step(steps, 0.0, Budget(gpus=5))
    assert {key.partition("/")[2]: result.decision.desired for key, result in results.items()} == {first: 4, second: 1}
