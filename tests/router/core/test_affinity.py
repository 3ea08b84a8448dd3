"""Sessions stay with their worker, adapters with workers that have them, as long as that costs little."""

import pytest
from routing_fleet import Fleet, config, policy, pool, request

from kvfleet_router.core import affinity
from kvfleet_router.policies import REGISTRY

ADAPTERS = ["sql", "chat"]


def with_adapters(workers=3, strategy="kvfleet", adapters=ADAPTERS):
    pools = [pool(workers=workers, adapters=adapters)]
    return Fleet(config(policy(models=("m", *adapters), strategy=strategy), pools=pools))


def session(name, n, tokens=500, **fields):
    return request(tokens, prefix=(name, n), session_id=name, **fields)


@pytest.mark.parametrize("strategy", sorted(REGISTRY))
def test_a_session_stays_with_its_worker_whatever_its_prompts(strategy):
    fleet = Fleet(workers=4, strategy=strategy)
    homes = {}
    for n in range(6):
        for name in ("a", "b", "c"):
            ticket = fleet.sent(session(name, n))
            assert homes.setdefault(name, ticket.worker) is ticket.worker, (name, n)
            fleet.answer(ticket)
            fleet.answer(fleet.sent(request(300, prefix=("other", n))))


def test_a_session_leaves_a_worker_that_would_keep_it_waiting():
    fleet = Fleet(workers=2)
    home = fleet.sent(session("a", 0))
    fleet.answer(home)
    long = fleet.sent(request(40_000, session_id="a"))
    assert long.worker is home.worker
    assert fleet.sent(session("a", 1)).worker is not home.worker


def test_a_session_leaves_a_worker_with_far_more_in_flight():
    fleet = Fleet(workers=3, strategy="round_robin")
    sent = [fleet.sent(session("a", n)) for n in range(60)]
    in_flight = sorted(worker.in_flight for worker in fleet.dispatcher.workers())
    assert len({ticket.worker for ticket in sent}) > 1
    assert in_flight[-1] < 45  # it did stay for a while, and not for good


def test_a_session_goes_elsewhere_when_its_worker_is_gone():
    fleet = Fleet(workers=2)
    home = fleet.sent(session("a", 0))
    again = fleet.retry(home)
    assert again.worker is not home.worker
    fleet.answer(again)
    assert fleet.sent(session("a", 1)).worker is again.worker  # that is its home now


def test_sessions_of_tenants_and_models_are_their_own():
    fleet = with_adapters(workers=8, strategy="random")
    homes = {
        (tenant, model): fleet.sent(session("a", 0, tenant=tenant, model=model)).worker
        for tenant in ("x", "y", "z")
        for model in ("m", "sql")
    }
    for (tenant, model), home in homes.items():
        assert fleet.sent(session("a", 1, tenant=tenant, model=model)).worker is home
    assert len(set(homes.values())) > 1


def test_sessions_are_bounded(monkeypatch):
    monkeypatch.setattr(affinity, "MAX_SESSIONS", 10)
    fleet = Fleet(workers=2)
    for n in range(100):
        fleet.answer(fleet.sent(session(f"s{n}", 0)))
    assert len(fleet.dispatcher._placement._affinity._sessions) == 10


@pytest.mark.parametrize("strategy", ["kvfleet", "lmetric", "round_robin", "least_request"])
def test_an_adapter_stays_on_workers_that_have_it(strategy):
    fleet = with_adapters(strategy=strategy)
    workers = {name: set() for name in ADAPTERS}
    for n in range(10):
        for name in ADAPTERS:
            ticket = fleet.sent(request(400, model=name, prefix=(name, n)))
            workers[name].add(ticket.worker.name)
            fleet.answer(ticket)
    assert all(len(names) == 1 for names in workers.values())
    assert workers["sql"] != workers["chat"]  # the second went where no adapter was


def test_an_adapter_spreads_where_one_worker_is_not_enough():
    fleet = with_adapters()
    names = {fleet.sent(request(6000, model="sql", prefix=n)).worker.name for n in range(3)}
    assert len(names) == 3


def test_adapters_are_forgotten_after_a_minute():
    fleet = with_adapters(workers=2)
    first = fleet.sent(request(400, model="sql", prefix=1))
    fleet.answer(first)
    fleet.now += affinity.WARM_S + 1
    for worker in fleet.dispatcher.workers():
        if worker is first.worker:
            fleet.dispatcher.cache_cleared(worker)
    seen = set()
    for n in range(20):
        ticket = fleet.sent(request(400, model="sql", prefix=("later", n)))
        fleet.answer(ticket)
        seen.add(ticket.worker.name)
        fleet.now += affinity.WARM_S + 1
    assert len(seen) == 2


def test_the_base_model_is_no_adapter():
    fleet = with_adapters(workers=3, strategy="round_robin")
    assert {fleet.sent(request(400, prefix=n)).worker.name for n in range(3)} == {"pool-0", "pool-1", "pool-2"}
