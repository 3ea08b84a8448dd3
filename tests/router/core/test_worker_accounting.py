"""A worker's figures: what each event adds and takes off, and how prediction follows from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from routing_fleet import COST, Fleet, config, cost, pool, request

from kvfleet_router.core.predict import backlog_s, ttft_parts


def one_worker(**fields):
    fleet = Fleet(config(pools=[pool(workers=1, **fields)], strategy="ttft_min") if fields else None, workers=1)
    return fleet, fleet.dispatcher.workers()[0]


@given(prompt=st.integers(0, 10**6), cached_share=st.floats(0, 1))
def test_the_pools_own_arithmetic_is_the_cost_models(prompt, cached_share):
    (mine,) = Fleet().dispatcher.pools()
    uncached = prompt * (1 - cached_share)
    assert mine.prefill_s(uncached, prompt) == COST.prefill_s(uncached, prompt)


def test_pending_prefill_is_backlog_until_its_first_token():
    fleet, worker = one_worker(cost=COST)
    fleet.sent(request(3000, prefix=1))
    ticket = fleet.sent(request(1000, prefix=2))
    expected = COST.prefill_s(3000, 3000) + COST.prefill_s(1000, 1000)
    assert worker.backlog_s == pytest.approx(expected)
    assert backlog_s(worker, fleet.now) == pytest.approx(worker.inflation * expected)
    fleet.dispatcher.abandon(ticket, "gone")
    assert worker.backlog_s == pytest.approx(COST.prefill_s(3000, 3000))


def test_backlog_shrinks_while_the_head_is_computed_but_not_beyond_it():
    fleet, worker = one_worker(cost=COST)
    fleet.sent(request(3000, prefix=1))
    fleet.sent(request(1000, prefix=2))
    head, second = COST.prefill_s(3000, 3000), COST.prefill_s(1000, 1000)
    begin = fleet.now
    assert backlog_s(worker, begin + head / 2) == pytest.approx(worker.inflation * (head / 2 + second))
    assert backlog_s(worker, begin + 100) == pytest.approx(worker.inflation * second)


def test_an_idle_spell_does_not_count_as_progress():
    fleet, worker = one_worker(cost=COST)
    fleet.answer(fleet.sent(request(3000, prefix=1)))
    fleet.now += 50
    fleet.sent(request(3000, prefix=2))
    assert backlog_s(worker, fleet.now) == pytest.approx(worker.inflation * worker.backlog_s)


def test_context_grows_with_the_steps_of_all_sequences():
    fleet, worker = one_worker(cost=COST)
    tickets = [fleet.sent(request(1000, prefix=n)) for n in range(4)]
    for ticket in tickets:
        fleet.dispatcher.first_token(ticket)
    start = worker.context_tokens
    assert start == pytest.approx(4000)
    step = worker.step_now_s
    fleet.now += 100 * step
    fleet.dispatcher.finish(tickets[0])
    assert worker.context_tokens == pytest.approx(3000 + 3 * 100, rel=0.05)


def test_shared_blocks_are_in_use_once():
    fleet, worker = one_worker(cost=COST)
    fleet.sent(request(3200, prefix=1, tail=1))
    alone = worker.kv_used_tokens
    assert alone == pytest.approx(3200)
    second = fleet.sent(request(3200, prefix=1, tail=2))
    assert worker.kv_used_tokens == pytest.approx(1.5 * alone)
    fleet.dispatcher.abandon(second, "gone")
    assert worker.kv_used_tokens == pytest.approx(alone)


def test_a_full_kv_cache_and_a_full_batch_cost_waiting_time():
    fleet, worker = one_worker(cost=cost(kv_tokens=10_000, max_sequences=2))
    first = fleet.sent(request(6000, prefix=1))
    parts = ttft_parts(first.arrival, worker, 0.0, fleet.now)
    assert parts[3] > 0
    fleet.dispatcher.abandon(first, "gone")
    assert ttft_parts(first.arrival, worker, 0.0, fleet.now)[3] == 0.0
    for n in range(2):
        fleet.sent(request(10, prefix=n))
    small = fleet.sent(request(10, prefix=9))
    assert ttft_parts(small.arrival, worker, 0.0, fleet.now)[3] > 0


def test_prediction_is_exact_on_an_idle_worker():
    fleet, worker = one_worker(cost=COST)
    ticket = fleet.sent(request(4000, prefix=3))
    expected = worker.step_s + COST.prefill_s(4000, 4000) * (1 + COST.step_s / (8192 * COST.prefill_s_per_token))
    assert ticket.predicted_ttft_s == pytest.approx(expected)


def test_prefill_share_rises_with_prefills_and_fades():
    fleet, worker = one_worker(cost=COST)
    for n in range(150):
        ticket = fleet.sent(request(5000, prefix=n))
        fleet.answer(ticket, ttft=ticket.predicted_ttft_s, seconds=ticket.predicted_ttft_s)
    assert worker.prefill_share == pytest.approx(0.5, abs=0.2)
    fleet.now += 200
    fleet.answer(fleet.sent(request(100, prefix=99)))
    assert worker.prefill_share < 0.01


def test_waiting_for_kv_room_does_not_look_like_slow_prefill():
    fleet, worker = one_worker(cost=cost(kv_tokens=5000))
    for n in range(3):
        fleet.sent(request(4000, prefix=n))
    ticket = fleet.sent(request(4000, prefix=9))
    fleet.now += 30
    fleet.dispatcher.first_token(ticket)
    assert worker.pool_state.calibration.prefill_samples == 0


def test_a_steady_stream_teaches_the_true_step():
    fleet, worker = one_worker(cost=COST)
    for n in range(200):
        fleet.answer(fleet.sent(request(100, prefix=n)), ttft=0.01, seconds=100 * 0.010, output_tokens=101)
    assert worker.step_s + worker.step_s_per_sequence == pytest.approx(0.010, rel=0.05)
