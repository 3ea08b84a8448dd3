"""Scoring one by one and by columns is the same decision; equal costs are drawn at random."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_fleet import Fleet, config, cost, policy, pool, request

from kvfleet_router.core.choose import choose
from kvfleet_router.policies import REGISTRY

BY_COLUMNS = sorted(name for name, strategy in REGISTRY.items() if strategy.columns_from is not None)


def busy_fleet(seed, workers, strategy, **fields):
    """Two kinds of workers in many states: prompts pending and decoding, shared prefixes, full caches, learned rates."""
    rng = random.Random(seed)
    slow = cost(prefill_s_per_token=8e-5, kv_tokens=30_000, max_sequences=4)
    pools = [pool("fast", workers - workers // 3), pool("slow", workers // 3, cost=slow)]
    fleet = Fleet(config(policy(pools=["fast", "slow"], strategy="random", **fields), pools=pools), seed=seed)
    live = []
    for _ in range(workers * 4):
        fleet.now += rng.expovariate(20)
        live.append(fleet.sent(request(rng.choice([50, 2000, 9000]), prefix=rng.randrange(5), tail=rng.randrange(9))))
        if rng.random() < 0.7:
            ticket = live.pop(rng.randrange(len(live)))
            if rng.random() < 0.6:
                fleet.dispatcher.first_token(ticket)
                live.append(ticket)
            else:
                fleet.answer(ticket, ttft=rng.random() / 10, seconds=rng.random(), output_tokens=rng.randrange(1, 200))
    fields = {"pools": ["fast", "slow"], "strategy": strategy, **fields}
    fleet.dispatcher.configure(config(policy(**fields), pools=pools))
    return fleet


def decide(fleet, parsed, columns_from, monkeypatch):
    """The parts of every candidate's cost and the workers that may be chosen."""
    dispatcher = fleet.dispatcher
    lane = dispatcher._routes.find(parsed)
    arrival = dispatcher._arrival(parsed, "x", lane, fleet.now)
    arrival.load = 0.35
    monkeypatch.setattr(type(lane.policy), "columns_from", columns_from)
    monkeypatch.setattr("kvfleet_router.core.choose.MAX_CANDIDATES", 1000)
    candidates = lane.candidates(arrival, random.Random(1))
    arrival.unlike = candidates.unlike
    rng = random.Random(1)
    choice = choose(arrival, candidates, dispatcher._fleet.index, dispatcher._fleet.table, rng, fleet.now)
    parts = {name: (cached, scores) for name, cached, scores in choice.scored.rows()}
    return parts, choice


@pytest.mark.parametrize("strategy", BY_COLUMNS)
@pytest.mark.parametrize("fields", [{}, {"energy_mode": "Prefer"}, {"itl_slo_s": 0.012, "ttft_slo_s": 0.2}])
@pytest.mark.parametrize("seed", range(4))
def test_columns_score_as_one_by_one(strategy, fields, seed, monkeypatch):
    fleet = busy_fleet(seed, 20, strategy, **fields)
    for tokens in (40, 3000, 20_000):
        parsed = request(tokens, prefix=seed, tail=3)
        slowly, one = decide(fleet, parsed, None, monkeypatch)
        fast, many = decide(fleet, parsed, 1, monkeypatch)
        assert slowly.keys() == fast.keys()
        for name, (cached, scores) in slowly.items():
            assert fast[name][0] == pytest.approx(cached)
            assert np.allclose(fast[name][1], scores, rtol=1e-9, atol=1e-12), name
        assert (many.worker.name, many.cached_blocks) == (one.worker.name, one.cached_blocks)
        assert many.cost == pytest.approx(one.cost)


@given(st.integers(0, 2**20), st.integers(40, 50), st.integers(1, 30_000))
@settings(max_examples=15, deadline=None)
def test_large_fleets_choose_the_least_cost(seed, workers, tokens):
    fleet = busy_fleet(seed, workers, "kvfleet")
    with pytest.MonkeyPatch.context() as patch:
        parsed = request(tokens, prefix=seed % 5)
        parts, choice = decide(fleet, parsed, 40, patch)
        costs = {name: sum(scores) for name, (_, scores) in parts.items()}
        assert costs[choice.worker.name] <= min(costs.values()) + 0.0005 + 1e-9


def test_a_changed_fleet_is_seen_by_the_columns():
    fleet = Fleet(workers=45)
    seen = set()
    for n in range(120):
        ticket = fleet.sent(request(500, prefix=n))
        seen.add(ticket.worker.name)
        if n == 60:
            kept = [worker.endpoint for worker in fleet.dispatcher.workers()][:40]
            fleet.dispatcher.set_endpoints("pool", kept)
            gone = {worker for worker in seen if worker not in {endpoint.name for endpoint in kept}}
        if n > 60:
            assert ticket.worker.name not in gone
    assert len(seen) == 45


def test_equals_are_drawn_at_random():
    fleet = Fleet(workers=4)
    drawn = Counter()
    for n in range(400):
        ticket = fleet.sent(request(10, prefix=n))
        drawn[ticket.worker.name] += 1
        fleet.dispatcher.abandon(ticket, "gone")
    assert len(drawn) == 4
    assert min(drawn.values()) > 60
