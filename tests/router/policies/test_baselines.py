"""The baselines, each as a table: figures of the workers in, choice out."""

from collections import Counter

import pytest
from routing_fleet import Fleet, config, cost, policy, pool, request

from kvfleet_router.policies import REGISTRY


def loaded(strategy, in_flight, **fields):
    """Workers with so many requests of 1000 tokens in flight, all pending."""
    fleet = Fleet(config(policy(strategy="random"), workers=len(in_flight), **fields))
    wanted = {f"pool-{n}": count for n, count in enumerate(in_flight)}
    spare = []
    while any(wanted.values()):
        ticket = fleet.sent(request(1000, prefix=("load", len(spare))))
        if wanted[ticket.worker.name]:
            wanted[ticket.worker.name] -= 1
        else:
            spare.append(ticket)
    for ticket in spare:
        fleet.dispatcher.abandon(ticket, "not wanted")
    fleet.dispatcher.configure(config(policy(strategy=strategy), workers=len(in_flight), **fields))
    return fleet


def chosen(fleet, times=200, **fields):
    """How often each worker is chosen, nothing changing in between."""
    names = Counter()
    for n in range(times):
        ticket = fleet.sent(request(**{"tokens": 1000, "prefix": ("new", n), **fields}))
        names[int(ticket.worker.name.rpartition("-")[2])] += 1
        fleet.dispatcher.abandon(ticket, "measured")
    return names


def scores(fleet, parsed):
    """The cost of each worker for a request, by number."""
    ticket = fleet.sent(parsed)
    made = fleet.dispatcher.decisions.get(ticket.id)["tries"][0]
    fleet.dispatcher.abandon(ticket, "measured")
    return {int(c["worker"].rpartition("-")[2]): c["cost"] for c in made["candidates"]}


@pytest.mark.parametrize(
    ("in_flight", "winners"), [([0, 0, 0], {0, 1, 2}), ([2, 0, 1], {1}), ([1, 1, 2], {0, 1}), ([5, 4, 4], {1, 2})]
)
def test_least_request_takes_the_fewest_in_flight(in_flight, winners):
    assert set(chosen(loaded("least_request", in_flight))) == winners


def test_random_takes_any():
    counts = chosen(loaded("random", [9, 0, 3, 0]), 400)
    assert all(60 < counts[n] < 140 for n in range(4))


def test_power_of_two_avoids_only_the_fullest():
    counts = chosen(loaded("power_of_two", [0, 2, 4, 6]), 600)
    assert counts[3] == 0
    assert counts[0] == pytest.approx(300, abs=50)
    assert counts[1] == pytest.approx(200, abs=50)
    assert counts[2] == pytest.approx(100, abs=40)


@pytest.mark.parametrize("workers", [1, 2])
def test_power_of_two_works_with_few_workers(workers):
    assert len(chosen(Fleet(config(policy(strategy="power_of_two"), workers=workers)), 50)) == workers


def test_round_robin_gives_every_worker_its_turn():
    fleet = Fleet(config(policy(strategy="round_robin"), workers=5))
    names = [fleet.sent().worker.name for _ in range(50)]
    for start in range(0, 50, 5):
        assert len(set(names[start : start + 5])) == 5


def test_round_robin_does_not_flood_a_newcomer():
    fleet = Fleet(config(policy(strategy="round_robin"), workers=2))
    for _ in range(100):
        fleet.sent()
    fleet.dispatcher.configure(config(policy(strategy="round_robin"), workers=3))
    names = Counter(fleet.sent().worker.name for _ in range(30))
    assert names["pool-2"] == pytest.approx(10, abs=1)


def test_lmetric_is_queued_uncached_tokens_times_batch():
    fleet = loaded("lmetric", [0, 1, 3])
    assert scores(fleet, request(500, prefix="new")) == {0: 500, 1: 1500 * 2, 2: 3500 * 4}


def test_lmetric_counts_prompts_in_flight_as_cached():
    fleet = loaded("lmetric", [0, 0])
    first = fleet.sent(request(6400, prefix="shared"))
    fleet.dispatcher.first_token(first)
    costs = scores(fleet, request(6400, prefix="shared"))
    mine = int(first.worker.name[-1])
    assert costs[mine] == pytest.approx(2 * 1)  # the last token is computed in any case
    assert costs[1 - mine] == 6400


def test_ttft_min_measures_backlog_in_time():
    """One prompt of 20k tokens is longer to wait for than three of 1k."""
    fleet = loaded("ttft_min", [3, 0])
    long = fleet.sent(request(20_000, prefix="long"))
    assert long.worker.name == "pool-1"
    assert set(chosen(fleet, 20)) == {0}


def test_ttft_min_prefers_the_faster_accelerator_and_the_cached_prefix():
    slow = cost(prefill_s_per_token=4e-4)
    pools = [pool("fast", 1), pool("slow", 1, cost=slow)]
    fleet = Fleet(config(policy(pools=["fast", "slow"], strategy="ttft_min"), pools=pools))
    assert {fleet.sent(request(10, prefix=n)).worker.pool for n in range(5)} == {"fast"}
    shared = request(8000, prefix="shared")
    fleet.dispatcher.cache_stored(fleet.worker("slow-0"), shared.block_hashes)
    assert fleet.sent(shared).worker.pool == "slow"


@pytest.mark.parametrize("strategy", sorted(REGISTRY))
def test_every_strategy_names_its_parts_and_serves_a_request(strategy):
    fleet = Fleet(config(policy(strategy=strategy), workers=3))
    ticket = fleet.sent()
    candidate = fleet.dispatcher.decisions.get(ticket.id)["tries"][0]["candidates"][0]
    assert tuple(candidate["parts"]) == REGISTRY[strategy].parts
    fleet.answer(ticket)
    fleet.assert_idle()
