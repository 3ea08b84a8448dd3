"""Budgets of a pool, of a policy and of all pools: what would exceed one waits, the less urgent the longer."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_fleet import COST, Fleet, config, policy, pool, request

from kvfleet_router.core.dispatcher import Held, Ticket
from kvfleet_router.core.energy import watts
from kvfleet_router.io.energy_metrics import EnergyMetrics

IDLE = COST.idle_watts
ONE = watts(COST, 1, 0.0, COST.decode_step_s(1, 0.0))
"""A worker with one sequence."""


def two_models(**fields):
    pools = [pool("a", workers=1, model="a"), pool("b", workers=1, model="b")]
    policies = [policy("pa", models=["a"], pools=["a"]), policy("pb", models=["b"], pools=["b"])]
    return Fleet(config(*policies, pools=pools).model_copy(update=fields))


def drawn(fleet):
    return sum(pool.watts() for pool in fleet.dispatcher.pools())


@pytest.mark.parametrize("mode", ["Off", "Prefer", "Strict"])
def test_a_pools_budget_holds_whatever_the_mode(mode):
    """Room for one working worker beside an idle one: all go to the same."""
    fleet = Fleet(config(policy(energy_mode=mode), pools=[pool(max_watts=IDLE + ONE + 100)]))
    tickets = [fleet.sent(request(100, prefix=n)) for n in range(4)]
    assert len({ticket.worker for ticket in tickets}) == 1
    free = Fleet(config(policy(strategy="round_robin")))
    assert len({free.sent(request(100, prefix=n)).worker for n in range(4)}) == 2


def test_the_fleets_budget_is_shared_by_its_pools():
    fleet = two_models(max_watts=IDLE + ONE + 20)
    first = fleet.sent(request(100, model="a"))
    held = fleet.held(request(100, model="b"))
    fleet.answer(first)
    assert not held.waiting
    assert isinstance(fleet.called_back[0], Ticket)


def test_a_policys_budget_is_about_its_pools_together_and_only_in_mode_strict():
    pools = [pool("a", workers=1, model="a"), pool("b", workers=1, model="b")]
    both = policy(models=["a", "b"], pools=["a", "b"], energy_mode="Strict", max_watts=IDLE + ONE + 20)
    fleet = Fleet(config(both, pools=pools))
    fleet.sent(request(100, model="a"))
    fleet.held(request(100, model="b"))
    lenient = Fleet(config(both.model_copy(update={"energy_mode": "Prefer"}), pools=pools))
    lenient.sent(request(100, model="a"))
    lenient.sent(request(100, model="b"))


def test_who_waits_for_power_gets_it_before_less_urgent_requests_of_other_policies():
    fleet = two_models(max_watts=IDLE + ONE + 20)
    first = fleet.sent(request(100, model="a"))
    urgent = fleet.held(request(100, model="b", priority=-1))
    later = fleet.held(request(100, model="a", prefix=7, priority=5))  # there would be room on `a` for it
    fleet.now += 0.01
    fleet.dispatcher.tick()
    assert urgent.waiting
    assert later.waiting
    fleet.answer(first)
    assert not urgent.waiting
    assert later.waiting
    [ticket] = fleet.called_back
    fleet.answer(ticket)
    assert not later.waiting


def test_a_claim_ends_with_whoever_made_it():
    fleet = two_models(max_watts=IDLE + ONE + 20)
    fleet.sent(request(100, model="a"))
    urgent = fleet.held(request(100, model="b", priority=-1))
    fleet.dispatcher.cancel(urgent)
    fleet.now += 1.0
    fleet.sent(request(100, model="a", prefix=7, priority=5))


def test_asking_what_would_happen_claims_nothing():
    fleet = two_models(max_watts=IDLE + ONE + 20)
    fleet.sent(request(100, model="a"))
    told = fleet.dispatcher.dry_run(request(100, model="b", priority=-1))
    assert "the power budget of all pools" in told["why"]
    fleet.sent(request(100, model="a", prefix=7, priority=5))


def test_a_request_that_waited_for_power_in_vain_is_told_whose_budget_it_was():
    fleet = Fleet(config(pools=[pool(max_watts=200.0)]))
    fleet.held(request(100))
    for _ in range(61):
        fleet.now += 1.0
        fleet.dispatcher.tick()
    [refusal] = fleet.called_back
    assert (refusal.status, refusal.code) == (503, "queue_timeout")
    assert "the power budget of pool pool (200 W) was used up; raise maxWatts" in refusal.message


def test_a_raised_budget_lets_those_who_wait_go():
    fleet = two_models(max_watts=2 * IDLE + 1)
    held = fleet.held(request(100, model="a"))
    fleet.dispatcher.configure(fleet.dispatcher.config.model_copy(update={"max_watts": None}))
    assert not held.waiting


def test_a_router_that_does_not_hear_the_others_takes_its_part():
    budget = 2 * IDLE + 2 * (ONE - IDLE) + 40
    alone = two_models(max_watts=budget)
    deaf = two_models(max_watts=budget, routers=2)
    for fleet in (alone, deaf):
        fleet.sent(request(100, model="a"))
    alone.sent(request(100, model="b"))
    held = deaf.held(request(100, model="b"))
    deaf.dispatcher.replicas.heard = 1
    deaf.now += 0.05
    deaf.dispatcher.tick()
    assert not held.waiting


def test_metrics_show_what_is_drawn_of_each_budget():
    fleet = Fleet(config(policy(energy_mode="Strict", max_watts=2000.0), pools=[pool(max_watts=900.0)]))
    fleet.sent(request(100))
    samples = {
        s.name: s
        for metric in EnergyMetrics(fleet.dispatcher)()
        for s in metric.samples
        if s.labels.get("budget") == "pool pool"
    }
    assert samples["kvfleet_power_budget_watts"].value == 900.0
    assert samples["kvfleet_power_drawn_watts"].value == pytest.approx(drawn(fleet))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    budget=st.floats(300.0, 3000.0),
    pool_budget=st.one_of(st.none(), st.floats(200.0, 1500.0)),
)
def test_no_admission_exceeds_a_budget_and_everybody_is_answered(seed, budget, pool_budget):
    rng = random.Random(seed)
    pools = [pool("a", workers=2, model="a", max_watts=pool_budget), pool("b", workers=2, model="b")]
    policies = [policy(f"p{name}", models=[name], pools=[name]) for name in "ab"]
    fleet = Fleet(config(*policies, pools=pools).model_copy(update={"max_watts": budget}))
    running, waiting, came, gone = [], [], 0, 0

    def take(result):
        nonlocal gone
        if isinstance(result, Ticket):
            running.append(result)
            assert drawn(fleet) <= budget + 1e-6
            if pool_budget is not None and result.worker.pool_state.name == "a":
                assert result.worker.pool_state.watts() <= pool_budget + 1e-6
        elif isinstance(result, Held):
            waiting.append(result)
        else:
            gone += 1

    for _ in range(60):
        fleet.now += rng.random() * 0.2
        if rng.random() < 0.6:
            came += 1
            take(fleet.submit(model=rng.choice("ab"), tokens=rng.choice([100, 2000]), priority=rng.choice([-1, 0, 3])))
        elif running:
            fleet.answer(running.pop(rng.randrange(len(running))), ttft=0.0, seconds=0.01, output_tokens=3)
        fleet.dispatcher.tick()
        for result in fleet.called_back:
            take(result)
        fleet.called_back.clear()
    for _ in range(400):
        while running:
            fleet.answer(running.pop(), ttft=0.0, seconds=0.01, output_tokens=3)
        fleet.now += 1.0
        fleet.dispatcher.tick()
        done, fleet.called_back[:] = list(fleet.called_back), []
        for result in done:
            take(result)
    assert not any(held.waiting for held in waiting)
    fleet.assert_idle()
    assert len(fleet.dispatcher._placement.queue) == 0
    assert came >= gone
