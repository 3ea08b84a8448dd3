"""What other replicas of the router have in flight counts as load, and goes when they say so, or say nothing."""

import pytest
from replicas import Replica, exchange, passes, replicas
from routing_fleet import request

from kvfleet_router.core.dispatcher import Load, Ticket
from kvfleet_router.core.predict import backlog_s
from kvfleet_router.core.sharing import EXPIRY_S, WHOLE_S


def test_a_replica_avoids_what_another_has_loaded():
    one, other = replicas(2, workers=2)
    busy = one.sent(request(2000, prefix=1)).worker.name
    exchange(one, other)
    assert {other.sent(request(500, prefix=n)).worker.name for n in range(2, 5)} == {"pool-0", "pool-1"} - {busy}


def test_figures_are_the_sum_and_fall_back_to_the_own_ones():
    one, other = replicas(2, workers=1)
    mine, theirs = one.worker("pool-0"), other.worker("pool-0")
    one.sent(request(1000, prefix=1))
    theirs_first = other.sent(request(3000, prefix=2))
    other.dispatcher.first_token(theirs_first)
    alone = (mine.backlog_s, mine.kv_used_tokens, mine.step_now_s)
    theirs_alone = theirs.kv_used_tokens
    exchange(one, other)
    assert (mine.in_flight, mine.pending, mine.decoding) == (2, 1, 1)
    assert mine.kv_used_tokens == pytest.approx(alone[1] + theirs_alone)
    assert mine.step_now_s > alone[2]
    assert one.dispatcher.replicas.loads()["pool-0"].in_flight == 1
    other.answer(theirs_first)
    exchange(one, other)
    assert (mine.backlog_s, mine.kv_used_tokens, mine.step_now_s) == alone
    assert mine.in_flight == 1


def test_own_accounting_is_unmoved_by_what_others_tell():
    one, other = replicas(2, workers=1)
    ticket = one.sent(request(1000, prefix=1))
    elsewhere = other.sent(request(1000, prefix=2))
    exchange(one, other)
    one.answer(ticket)
    assert one.dispatcher.replicas.loads() == {}
    other.answer(elsewhere)
    exchange(one, other)
    one.assert_idle()
    other.assert_idle()


def test_the_limit_of_requests_in_flight_holds_across_replicas():
    one, other = replicas(2, workers=1, admission={"max_in_flight_per_worker": 1})
    ticket = one.sent(request(10))
    exchange(one, other)
    held = other.held(request(10))
    one.answer(ticket)
    exchange(one, other)
    assert [type(result) for result in other.called_back] == [Ticket]
    assert not held.waiting


def test_loads_of_unknown_workers_are_nobodys_until_the_worker_comes():
    one, other = replicas(2, workers=1)
    one.dispatcher.replicas.told({"gone": Load(in_flight=5, pending=5)})
    one.assert_idle()
    later = Replica(3, workers=2)
    later.sent(request(1000))
    later.sent(request(1000, prefix=7))
    exchange(one, other, later)
    assert one.elsewhere().in_flight == 1
    one.dispatcher.configure(later.dispatcher.config)
    one.sharing.apply()
    assert one.elsewhere("pool-1").in_flight == 1


def test_nothing_is_said_where_nothing_happened():
    one, other = replicas(2)
    exchange(one, other, rounds=2)
    assert one.sharing.flush() == []
    one.sent(request(10))
    assert len(one.sharing.flush()) == 1
    assert one.sharing.flush() == []


def test_a_silent_replica_counts_no_more_after_a_second():
    one, other = replicas(2, workers=1)
    other.sent(request(1000))
    exchange(one, other)
    passes(EXPIRY_S - 0.05, one)
    assert (one.sharing.peers, one.elsewhere().in_flight) == (1, 1)
    passes(0.1, one)
    assert (one.sharing.peers, one.elsewhere()) == (0, Load())


def test_a_quiet_replica_is_heard_on():
    one, other = replicas(2, workers=1)
    other.sent(request(1000))
    passes(5 * EXPIRY_S, one, other)
    assert (one.sharing.peers, one.elsewhere().in_flight) == (1, 1)


def test_one_that_leaves_takes_its_load_along_at_once():
    one, other = replicas(2, workers=1)
    other.sent(request(1000))
    exchange(one, other)
    one.hear(other.sharing.leave())
    assert (one.sharing.peers, one.elsewhere()) == (0, Load())


def test_one_that_joins_late_knows_all_loads_at_the_next_exchange():
    one, other = replicas(2, workers=2)
    one.sent(request(1000))
    one.sent(request(1000, prefix=1))
    other.sent(request(1000, prefix=2))
    passes(1.0, one, other)
    late = Replica(9, now=one.now, workers=2)
    exchange(late, one, other)  # it says hello
    exchange(late, one, other)  # and is told
    assert sum(late.elsewhere(f"pool-{n}").in_flight for n in range(2)) == 3


def test_what_was_lost_is_made_good_within_a_quarter_of_a_second():
    one, other = replicas(2, workers=1)
    exchange(one, other)
    ticket = other.sent(request(1000))
    lost = other.sharing.flush()
    other.answer(ticket, ttft=0.01, seconds=0.01)
    other.sent(request(2000, prefix=3))
    other.sent(request(2000, prefix=4))
    passes(WHOLE_S + 0.05, one, other)
    assert one.elsewhere().in_flight == 2
    assert one.sharing.missed == len(lost) > 0


def test_more_workers_than_fit_into_a_message():
    one, other = replicas(2, workers=500, strategy="round_robin")
    tickets = [other.sent(request(100, prefix=n)) for n in range(500)]
    exchange(one, other)
    assert sum(worker.elsewhere.in_flight for worker in one.dispatcher.workers()) == 500
    for ticket in tickets[::2]:
        other.answer(ticket, ttft=0.0, seconds=0.0)
    assert other.sharing.flush(), "lost"
    passes(WHOLE_S + 0.05, one, other)
    assert sum(worker.elsewhere.in_flight for worker in one.dispatcher.workers()) == 250


def test_a_worker_that_left_is_told_of_no_more():
    one, other = replicas(2, workers=2)
    exchange(one, other)
    for n in range(4):
        other.sent(request(1000, prefix=n))
    other.dispatcher.configure(Replica(5, workers=1).dispatcher.config)
    exchange(one, other)
    assert (one.elsewhere("pool-0").in_flight, one.elsewhere("pool-1").in_flight) == (2, 0)


def test_first_tokens_elsewhere_are_the_engines_progress():
    """What others prefill is time the worker cannot decode, and after their first token the engine goes on with ours."""
    one, other = replicas(2, workers=1, strategy="lmetric")
    exchange(one, other, rounds=2)
    theirs = other.sent(request(8000, prefix=1))
    exchange(one, other)
    mine = one.sent(request(8000, prefix=2))
    worker = one.worker("pool-0")
    both = backlog_s(worker, one.now)
    for replica in (one, other):
        replica.now += 0.3
    assert backlog_s(worker, one.now) == pytest.approx(both - 0.3, rel=0.1), "theirs makes progress"
    other.dispatcher.first_token(theirs)
    exchange(one, other)
    assert worker.prefill_share == other.worker("pool-0").prefill_share > 0
    assert worker.head_since == one.now
    assert backlog_s(worker, one.now) == pytest.approx(both / 2, rel=0.1)
    learned = one.dispatcher._fleet.pools["pool"].prefill_factor
    one.now += mine.prefill_s
    one.dispatcher.first_token(mine)
    assert one.dispatcher._fleet.pools["pool"].prefill_factor == pytest.approx(learned, rel=0.05), (
        "waiting is no prefill"
    )


def test_young_answers_elsewhere_are_known_until_they_end():
    one, other = replicas(2, workers=1, strategy="lmetric")
    exchange(one, other, rounds=2)
    worker = one.worker("pool-0")
    tickets = [other.sent(request(1000, prefix=n)) for n in range(3)]
    mine = one.sent(request(1000, prefix=9))
    exchange(one, other)
    for number, ticket in enumerate(tickets, 1):
        one.now = other.now = other.now + 0.05
        other.dispatcher.first_token(ticket)
        exchange(one, other)
        assert [since for since, _ in worker.decoding_since[-number:]] == pytest.approx(
            [one.now - 0.05 * back for back in range(number)][::-1]
        )
    one.dispatcher.first_token(mine)
    assert len(worker.decoding_since) == 4
    for left, ticket in zip((3, 2, 1), tickets, strict=True):
        other.dispatcher.finish(ticket, output_tokens=5)
        exchange(one, other)
        assert len(worker.decoding_since) == left
    assert worker.decoding_since == [(mine.decoding_since, mine.prefill_seconds_at_start)]
    one.dispatcher.finish(mine, output_tokens=5)
    assert worker.decoding_since == []


def test_what_a_replica_prefilled_before_it_was_heard_is_history():
    one, other = replicas(2, workers=1)
    for n in range(5):
        other.answer(other.sent(request(8000, prefix=n)))
    one.now = other.now
    exchange(one, other)
    assert one.worker("pool-0").prefill_share == 0.0
