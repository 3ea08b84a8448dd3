"""A router that does not hear the others of its fleet does not take the very best worker each time, as they would as well."""

from collections import Counter

import pytest
from replicas import Replica, passes
from routing_fleet import Fleet, config, cost, policy, pool, request


def chosen(fleet, count=60):
    """Workers of requests that are over before the next one comes."""
    names = Counter()
    for _ in range(count):
        ticket = fleet.sent(request(3000, prefix=fleet.count))
        names[ticket.worker.name] += 1
        fleet.dispatcher.abandon(ticket, "test")
    return names


def two_nearly_equal(routers, strategy="kvfleet"):
    """pool-0 is 2 % faster than pool-1, and pool-2 half as fast."""
    speeds = {"fast": 40e-6, "near": 40.8e-6, "slow": 80e-6}
    pools = [pool(name, workers=1, cost=cost(prefill_s_per_token=speed)) for name, speed in speeds.items()]
    fleet = config(policy(pools=tuple(speeds), strategy=strategy), pools=pools)
    return fleet.model_copy(update={"routers": routers})


def test_one_router_takes_the_best():
    assert set(chosen(Fleet(two_nearly_equal(1), seed=3))) == {"fast-0"}


@pytest.mark.parametrize("strategy", ["ttft_min", "kvfleet_latency"])
def test_one_of_several_takes_the_better_of_two_that_are_nearly_best(strategy):
    fleet = Fleet(two_nearly_equal(3, strategy), seed=3)
    assert set(chosen(fleet)) == {"fast-0"}, "the better of two, where there are two"


def test_of_many_that_are_nearly_best_many_are_taken():
    pools = [pool(f"p{n}", workers=1, cost=cost(prefill_s_per_token=(40 + n / 5) * 1e-6)) for n in range(6)]
    names = tuple(p.name for p in pools)
    fleet = config(policy(pools=names, strategy="ttft_min"), pools=pools)
    assert set(chosen(Fleet(fleet))) == {"p0-0"}
    several = chosen(Fleet(fleet.model_copy(update={"routers": 2})), 200)
    assert len(several) >= 4
    assert several["p0-0"] == max(several.values())


def test_it_takes_the_best_again_as_soon_as_it_hears_the_others():
    one, other = Replica(1), Replica(2)
    for each in (one, other):
        each.dispatcher.configure(each.dispatcher.config.model_copy(update={"routers": 2}))
        assert each.dispatcher._placement.near > 0
    passes(0.1, one, other)
    for each in (one, other):
        each.dispatcher.replicas.heard = each.sharing.peers
        assert each.dispatcher._placement.near == 0
