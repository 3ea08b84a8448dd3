"""What other replicas of the router have in flight counts as load, and goes when they say so."""

from dataclasses import astuple

import pytest
from routing_fleet import Fleet, request

from kvfleet_router.core.dispatcher import Load, Ticket


def tell(fleet, *others):
    """Give the fleet the sum of what the others have in flight."""
    total = {}
    for other in others:
        for name, load in other.dispatcher.loads().items():
            before = astuple(total.get(name, Load()))
            total[name] = Load(*(a + b for a, b in zip(before, astuple(load), strict=True)))
    fleet.dispatcher.told(total)


def test_a_replica_avoids_what_another_has_loaded():
    one, other = Fleet(workers=2), Fleet(workers=2)
    busy = one.sent(request(2000, prefix=1)).worker.name
    tell(other, one)
    assert {other.sent(request(500, prefix=n)).worker.name for n in range(2, 5)} == {"pool-0", "pool-1"} - {busy}


def test_figures_are_the_sum_and_fall_back_to_the_own_ones():
    one, other = Fleet(workers=1), Fleet(workers=1)
    mine, theirs = one.dispatcher.workers()[0], other.dispatcher.workers()[0]
    one.sent(request(1000, prefix=1))
    theirs_first = other.sent(request(3000, prefix=2))
    other.dispatcher.first_token(theirs_first)
    alone = (mine.backlog_s, mine.kv_used_tokens, mine.step_now_s)
    tell(one, other)
    assert (mine.in_flight, mine.pending, mine.decoding) == (2, 1, 1)
    assert mine.kv_used_tokens == pytest.approx(alone[1] + theirs.kv_used_tokens)
    assert mine.step_now_s > alone[2]
    assert one.dispatcher.loads()["pool-0"].in_flight == 1
    tell(one)
    assert (mine.backlog_s, mine.kv_used_tokens, mine.step_now_s) == alone
    assert mine.in_flight == 1


def test_own_accounting_is_unmoved_by_what_others_tell():
    one, other = Fleet(workers=1), Fleet(workers=1)
    ticket = one.sent(request(1000, prefix=1))
    elsewhere = other.sent(request(1000, prefix=2))
    tell(one, other)
    one.answer(ticket)
    assert one.dispatcher.loads() == {}
    other.answer(elsewhere)
    tell(one, other)
    one.assert_idle()


def test_the_limit_of_requests_in_flight_holds_across_replicas():
    limit = {"max_in_flight_per_worker": 1}
    one, other = Fleet(workers=1, admission=limit), Fleet(workers=1, admission=limit)
    ticket = one.sent(request(10))
    tell(other, one)
    held = other.held(request(10))
    one.answer(ticket)
    tell(other, one)
    assert [type(result) for result in other.called_back] == [Ticket]
    assert not held.waiting


def test_loads_of_unknown_workers_are_nobodys():
    fleet = Fleet(workers=1)
    fleet.dispatcher.told({"gone": Load(in_flight=5, pending=5)})
    fleet.assert_idle()
