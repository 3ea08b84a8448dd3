"""Prefill and decode apart: who is divided, exact accounting on both workers, and every way it can go wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_fleet import Fleet, config, policy, pool, request

from kvfleet_api.routingpolicy import AdmissionSpec, DisaggregationSpec
from kvfleet_router.core.dispatcher import Held, Refusal, Ticket

LONG, SHORT = 4000, 500


def divided(prefill=2, decode=2, strategy="kvfleet", **fields):
    pools = [
        pool("prefill", prefill, role="Prefill", max_context_tokens=fields.pop("longest_prefill", None)),
        pool("decode", decode, role="Decode"),
    ]
    return Fleet(config(policy(pools=("prefill", "decode"), strategy=strategy, **fields), pools=pools))


def prefilled(fleet, ticket, *, handed=True):
    fleet.now += 0.1
    return fleet.dispatcher.prefilled(ticket, fleet.called_back.append, handed=handed, prompt_tokens=LONG)


def of_kind(kind, parsed):
    parsed.kind = kind
    return parsed


def pool_of(ticket):
    return ticket.worker.pool


@pytest.mark.parametrize("strategy", ["kvfleet", "lmetric", "round_robin", "kubeai_prefix_hash", "llmd_default"])
def test_a_long_prompt_is_computed_in_one_pool_and_decoded_in_the_other(strategy):
    fleet = divided(strategy=strategy)
    first = fleet.sent(request(LONG))
    assert (pool_of(first), first.hands_on, first.parsed.max_output_tokens) == ("prefill", True, 1)
    second = prefilled(fleet, first)
    assert isinstance(second, Ticket)
    assert (pool_of(second), second.hands_on) == ("decode", False)
    assert second.id == first.id
    assert second.worker.pending_uncached_tokens == pytest.approx(1.0)
    assert second.worker.kv_used_tokens == pytest.approx(LONG, abs=64)
    assert first.worker.in_flight == 0
    fleet.answer(second, output_tokens=50, prompt_tokens=LONG, cached_tokens=LONG - 1)
    fleet.assert_idle()


def test_both_workers_have_the_prompt_cached_afterwards():
    fleet = divided(prefill=1, decode=1)
    second = prefilled(fleet, fleet.sent(request(LONG)))
    fleet.answer(second, prompt_tokens=LONG)
    again = fleet.sent(request(LONG))
    assert pool_of(again) == "decode"  # next to nothing is left to compute
    assert again.cached_tokens > LONG * 0.9
    assert len(fleet.worker("prefill-0").cache) == len(fleet.worker("decode-0").cache)


@pytest.mark.parametrize(
    "parsed",
    [
        request(SHORT),
        request(LONG, sequences=2),
        request(LONG, transfers=True),
        request(LONG, max_output_tokens=1),
        of_kind("other", request(LONG)),
    ],
    ids=["short", "several sequences", "the client transfers itself", "one token", "another endpoint"],
)
def test_what_is_not_divided(parsed):
    fleet = divided()
    ticket = fleet.sent(parsed)
    assert (pool_of(ticket), ticket.hands_on) == ("decode", False)


def test_the_threshold_is_the_policys():
    fleet = divided(disaggregation=DisaggregationSpec(min_uncached_tokens=400))
    assert fleet.sent(request(SHORT)).hands_on


def test_unified_workers_do_all_of_it():
    pools = [pool("prefill", 1, role="Prefill"), pool("unified", 1)]
    fleet = Fleet(config(policy(pools=("prefill", "unified")), pools=pools))
    assert not fleet.sent(request(LONG)).hands_on


def test_without_a_usable_prefill_worker_the_decode_worker_computes_the_prompt():
    fleet = divided(prefill=0)
    ticket = fleet.sent(request(LONG))
    assert (pool_of(ticket), ticket.hands_on) == ("decode", False)


def test_a_failed_prefill_goes_to_another_prefill_worker_then_to_the_decode_worker():
    fleet = divided(prefill=2)
    first = fleet.sent(request(LONG))
    second = fleet.retry(first)
    assert (pool_of(second), second.hands_on) == ("prefill", True)
    assert second.worker is not first.worker
    third = fleet.retry(second)
    assert (pool_of(third), third.hands_on) == ("decode", False)
    fleet.answer(third)
    fleet.assert_idle()


def test_a_failed_decode_begins_anew():
    fleet = divided()
    second = prefilled(fleet, fleet.sent(request(LONG)))
    third = fleet.retry(second)
    assert third.hands_on
    assert third.cached_tokens > LONG * 0.9  # the prefill worker has it still
    fourth = prefilled(fleet, third)
    assert pool_of(fourth) == "decode"
    assert fourth.worker is not second.worker
    fleet.answer(fourth)
    fleet.assert_idle()


def test_where_nothing_is_handed_on_the_decode_worker_computes_the_prompt():
    fleet = divided()
    second = prefilled(fleet, fleet.sent(request(LONG)), handed=False)
    assert (pool_of(second), second.hands_on) == ("decode", False)
    assert second.worker.pending_uncached_tokens == pytest.approx(LONG, rel=0.1)
    fleet.answer(second)
    fleet.assert_idle()
    made = fleet.dispatcher.decisions.get(second.id)
    assert made["tries"][0]["given_up"] == "no_kv_transfer"


def test_the_client_may_leave_at_any_time():
    fleet = divided()
    first = fleet.sent(request(LONG, tail=1))
    fleet.dispatcher.abandon(first, "client_gone")
    assert isinstance(fleet.dispatcher.prefilled(first, fleet.called_back.append, handed=True), Refusal)
    second = prefilled(fleet, fleet.sent(request(LONG, tail=2)))
    fleet.dispatcher.abandon(second, "client_gone")
    fleet.assert_idle()
    assert not fleet.called_back


def test_a_full_decode_pool_holds_what_is_computed_and_takes_it_when_there_is_room():
    fleet = divided(prefill=1, decode=1, admission=AdmissionSpec.model_validate({"maxInFlightPerWorker": 1}))
    busy = fleet.sent(request(SHORT, tail="busy"))
    held = fleet.submit(request(LONG, tail="other"))
    assert isinstance(held, Held)  # no decode worker has room: nothing begins
    fleet.answer(busy)
    first = fleet.called_back.pop()
    assert first.hands_on
    blocker = fleet.sent(request(SHORT, tail="blocker"))
    assert pool_of(blocker) == "decode"
    waiting = prefilled(fleet, first)
    assert isinstance(waiting, Held)
    fleet.answer(blocker)
    second = fleet.called_back.pop()
    assert (pool_of(second), second.hands_on) == ("decode", False)
    assert second.arrival.received_tokens == LONG - 1
    fleet.answer(second)
    fleet.assert_idle()


def test_the_record_tells_both_halves():
    fleet = divided()
    second = prefilled(fleet, fleet.sent(request(LONG)))
    fleet.answer(second)
    made = fleet.dispatcher.decisions.get(second.id)
    assert [one["phase"] for one in made["tries"]] == ["prefill", "decode"]
    assert [one["given_up"] for one in made["tries"]] == [None, None]
    assert made["retries"] == 0
    assert made["outcome"]["result"] == "ok"


def test_transfers_teach_nothing_about_prefill_or_answers():
    fleet = divided(prefill=1, decode=1)
    before = fleet.worker("decode-0").prefill_factor
    for number in range(20):
        second = prefilled(fleet, fleet.sent(request(LONG, prefix=number)))
        fleet.answer(second, ttft=2.0, output_tokens=300)
    assert fleet.worker("decode-0").prefill_factor == before
    assert fleet.dispatcher.pools()[1].stats.outputs.mean > 200


def test_prompts_too_long_for_prefill_workers_are_computed_where_they_decode():
    fleet = divided(longest_prefill=1000)
    assert pool_of(fleet.sent(request(LONG))) == "decode"


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_accounting_is_exact_whatever_happens(data):
    fleet = divided(admission=AdmissionSpec.model_validate({"maxInFlightPerWorker": 3, "maxQueue": 4}))
    tickets = []

    def take(result):
        if isinstance(result, Ticket):
            tickets.append(result)

    for _ in range(data.draw(st.integers(5, 40))):
        fleet.now += data.draw(st.floats(0.0, 0.2))
        kind = data.draw(st.sampled_from(["submit", "go_on", "fail", "leave", "empty_handed"]))
        if kind == "submit" or not tickets:
            take(fleet.submit(request(data.draw(st.sampled_from([SHORT, LONG, 9000])), prefix=fleet.count)))
        else:
            ticket = tickets.pop(data.draw(st.integers(0, len(tickets) - 1)))
            if kind == "fail":
                take(fleet.retry(ticket))
            elif kind == "leave":
                fleet.dispatcher.abandon(ticket, "client_gone")
            elif ticket.hands_on:
                take(fleet.dispatcher.prefilled(ticket, fleet.called_back.append, handed=kind == "go_on"))
            else:
                fleet.dispatcher.first_token(ticket)
                fleet.dispatcher.finish(ticket, output_tokens=20)
        tickets += [result for result in fleet.called_back if isinstance(result, Ticket)]
        fleet.called_back.clear()
    while tickets:
        fleet.dispatcher.abandon(tickets.pop(), "client_gone")
        tickets += [result for result in fleet.called_back if isinstance(result, Ticket)]
        fleet.called_back.clear()
    fleet.assert_idle()
