"""The kvfleet policy: each part of its cost against the formula, and what the parts do together."""

from math import exp

import pytest
from routing_fleet import COST, Fleet, config, cost, policy, pool, request

from kvfleet_router.core.columns import YOUNG
from kvfleet_router.core.dispatcher import Held, WorkerEndpoint
from kvfleet_router.policies.kvfleet import (
    GOODPUT,
    GUARD,
    GUARD_FADES,
    LATENCY,
    LEAST_BUSY,
    PRICE_FADES,
    UNLIKE,
    UNLIKE_LATENCY,
    KVFleet,
    KVFleetLatency,
)

PARTS = KVFleet.parts


def parts_of(fleet, parsed, *, cached=0.0, load=0.0):
    """The parts of the cost of a request on the (first) worker, and its arrival."""
    dispatcher = fleet.dispatcher
    lane = dispatcher._routes.find(parsed)
    arrival = dispatcher._arrival(parsed, "x", lane, fleet.now)
    arrival.load = load
    scored = lane.policy.score(arrival, dispatcher.workers()[0], cached, fleet.now)
    return dict(zip(PARTS, scored, strict=True)), arrival


def one_worker(strategy="kvfleet", model=COST, **fields):
    return Fleet(config(policy(strategy=strategy, **fields), pools=[pool(workers=1, cost=model)]))


def decoding(fleet, count, tokens=100):
    """So many sequences decoding, no prefill in the recent past."""
    for n in range(count):
        ticket = fleet.sent(request(tokens, prefix=("decoding", n)))
        fleet.now += 0.01
        fleet.dispatcher.first_token(ticket)
    fleet.now += 500
    return fleet.dispatcher.workers()[0]


def sigmoid(x):
    return 1 / (1 + exp(-x))


def test_an_idle_worker_costs_its_prefill_and_a_step():
    parts, _ = parts_of(one_worker(), request(2000))
    own = COST.prefill_s(2000, 2000) * (1 + COST.step_s / (8192 * COST.prefill_s_per_token))
    assert parts["prefill"] == pytest.approx(own)
    assert parts["prefill_weight"] == pytest.approx(GOODPUT.own_prefill * LEAST_BUSY * own)
    assert parts["step"] == COST.step_s
    assert parts["backlog"] == parts["kv_wait"] == parts["harm"] == parts["evict"] == parts["energy"] == 0.0
    assert 0 <= parts["slo"] < 1e-3


@pytest.mark.parametrize(("share", "busy"), [(0.0, LEAST_BUSY), (0.15, LEAST_BUSY + 0.5), (0.3, 1.0), (0.9, 1.0)])
def test_own_prefill_weighs_as_others_are_likely_to_come_meanwhile(share, busy):
    fleet = one_worker()
    worker = fleet.dispatcher.workers()[0]
    worker.prefill_share, worker.prefill_share_at = share, fleet.now
    parts, _ = parts_of(fleet, request(2000))
    assert parts["prefill_weight"] == pytest.approx(GOODPUT.own_prefill * busy * parts["prefill"])


def test_a_router_that_does_not_know_of_the_others_takes_every_worker_for_busy():
    fleet = one_worker()
    lane = fleet.dispatcher._routes.find(request(2000))
    arrival = fleet.dispatcher._arrival(request(2000), "x", lane, fleet.now)
    arrival.blind = True
    parts = dict(zip(PARTS, lane.policy.score(arrival, fleet.dispatcher.workers()[0], 0.0, fleet.now), strict=True))
    assert parts["prefill_weight"] == pytest.approx(GOODPUT.own_prefill * parts["prefill"])


def test_cached_tokens_save_their_prefill():
    fleet = one_worker()
    whole, _ = parts_of(fleet, request(4000))
    half, _ = parts_of(fleet, request(4000), cached=2000.0)
    assert half["prefill"] == pytest.approx(COST.prefill_s(2000, 4000) / COST.prefill_s(4000, 4000) * whole["prefill"])


def test_harm_is_what_sequences_slow_each_other():
    fleet = one_worker()
    worker = decoding(fleet, 10)
    parts, arrival = parts_of(fleet, request(1000))
    h, c, e = COST.step_s_per_sequence, COST.step_s_per_context_token, arrival.expected_output_tokens
    n1 = worker.pending + worker.decoding
    expected = GOODPUT.decode_harm * e * ((h + c * (1000 + e / 2)) * n1 + h * n1 + c * worker.context_tokens)
    assert parts["harm"] == pytest.approx(expected)


def test_latency_constants_count_interrupted_sequences_and_no_slo():
    fleet = one_worker("kvfleet_latency")
    worker = decoding(fleet, 10)
    parts, _ = parts_of(fleet, request(1000))
    assert parts["slo"] == 0.0
    assert parts["prefill_weight"] == pytest.approx(LATENCY.own_prefill * LEAST_BUSY * parts["prefill"])
    goodput, _ = parts_of(one_worker(), request(1000))
    assert parts["harm"] - goodput["harm"] > LATENCY.prefill_harm * parts["prefill"] * worker.decoding


def test_a_full_cache_costs_what_is_evicted_and_less_the_older_it_is():
    fleet = one_worker()
    worker = fleet.dispatcher.workers()[0]
    fleet.now = 1000.0
    worker.cache.store([hash(("old", n)) for n in range(worker.cache.capacity_blocks * 2)], 990.0)
    worker.adopt_costs()
    parts, arrival = parts_of(fleet, request(4000))
    overflow = 4000 + arrival.expected_output_tokens - worker.kv_free_tokens
    expected = GOODPUT.eviction * overflow * COST.prefill_s_per_token * exp(-10 / 60)
    assert parts["evict"] == pytest.approx(expected)
    fleet.now = 1600.0
    assert parts_of(fleet, request(4000))[0]["evict"] < expected / 1000


def test_pushing_sequences_over_the_itl_slo_is_what_costs():
    """At 9 of 10 ms the next sequence costs much, at 5 or far beyond the SLO next to nothing."""
    for batch, expected in ((5, "little"), (30, "much"), (120, "little")):
        fleet = one_worker(itl_slo_s=0.010)
        decoding(fleet, batch)
        slo = parts_of(fleet, request(10))[0]["slo"]
        assert (slo > 0.4) == (expected == "much") or slo == pytest.approx(GOODPUT.itl_slo_s, rel=0.5), batch


def test_the_slo_part_is_the_formula():
    fleet = one_worker(itl_slo_s=0.012, ttft_slo_s=0.5)
    worker = decoding(fleet, 20)
    stalled_s = worker.prefill_seconds
    worker.decoding_since[-4:] = [
        (fleet.now - 9, stalled_s),
        (fleet.now - 1, stalled_s - 0.4),
        (fleet.now, stalled_s - 0.3),
        (fleet.now, stalled_s),
    ]
    parts, arrival = parts_of(fleet, request(3000))
    step, own = worker.step_now_s, parts["prefill"]
    h, c = COST.step_s_per_sequence, COST.step_s_per_context_token
    share = worker.prefill_share * exp((worker.prefill_share_at - fleet.now) / 20)

    def v(x):
        return sigmoid((x - 0.95 * 0.012) / (0.06 * 0.012))

    after = v((step + h + c * 3000) / (1 - share - own / 20))
    itl = step / (1 - share)
    ttft = parts["backlog"] + own + parts["step"] + parts["kv_wait"]
    slack = arrival.deadline - fleet.now
    expected = GOODPUT.itl_slo_s * (after + 20 * (after - v(itl)))
    share_up_to, more = arrival.outputs.share_up_to, own / (0.012 - step)
    ruined = []
    for since, prefilled in worker.decoding_since[-YOUNG:]:
        suffered = stalled_s - prefilled
        safe, age = 1 + suffered / (0.012 - step), 1 + max(fleet.now - since - suffered, 0) / step
        if age < safe + more:
            ruined.append((share_up_to(safe + more) - share_up_to(max(age, safe))) / (1 - share_up_to(age)))
    assert 1 < len(ruined) < YOUNG
    expected += GOODPUT.stall_s * sum(ruined)
    expected += GOODPUT.ttft_slo_s * sigmoid((ttft - 0.9 * slack) / (0.05 * slack))
    assert parts["slo"] == pytest.approx(expected)


def test_short_answers_about_to_begin_keep_long_prefills_away():
    fleet = one_worker()
    for n in range(100):
        fleet.answer(fleet.sent(request(10, prefix=("label", n))), output_tokens=3)
    fleet.now += 500
    before = parts_of(fleet, request(2000))[0]["slo"]
    for n in range(5):
        fleet.sent(request(10, prefix=("pending", n)))
    assert parts_of(fleet, request(2000))[0]["slo"] > before + 2.0
    assert parts_of(fleet, request(4))[0]["slo"] < 0.5


def test_an_answer_of_one_token_cannot_be_stalled():
    """Where most answers are one token, a cached prompt costs next to nothing on a worker with a full batch."""
    fleet = one_worker()
    for n in range(100):
        fleet.answer(fleet.sent(request(10, prefix=("label", n))), output_tokens=1)
    fleet.now += 500
    decoding(fleet, 20)
    assert parts_of(fleet, request(4))[0]["slo"] < 0.05


def test_a_deadline_out_of_reach_costs_no_more():
    fleet = one_worker(ttft_slo_s=0.05)
    on_time, _ = parts_of(fleet, request(100))
    late, arrival = parts_of(fleet, request(1000, prefix=2))
    assert late["slo"] - on_time["slo"] < 0.01  # due after three times its unloaded TTFT
    fleet.now = arrival.deadline + 1
    score = dict(zip(PARTS, arrival.lane.policy.score(arrival, fleet.worker("pool-0"), 0.0, fleet.now), strict=True))
    assert score["slo"] < GOODPUT.ttft_slo_s / 10


@pytest.mark.parametrize(
    ("load", "price", "weights"),
    [
        (0.0, 1.0, GUARD),
        (GUARD_FADES[0], 1.0, GUARD),
        (sum(GUARD_FADES) / 2, 1.0, None),
        (sum(PRICE_FADES) / 2, 0.5, GOODPUT),
        (PRICE_FADES[1], 0.0, GOODPUT),
        (1.0, 0.0, GOODPUT),
    ],
)
def test_energy_steps_back_as_load_rises(load, price, weights):
    _, arrival = parts_of(one_worker(), request(1000), load=load)
    chosen, paid = KVFleet(policy(energy_mode="Prefer", energy_s_per_joule=0.0005))._weights(arrival)
    assert paid == pytest.approx(price * 0.0005)
    if weights:
        assert chosen == weights
    else:
        assert GOODPUT.itl_slo_s < chosen.itl_slo_s < GUARD.itl_slo_s
        assert GUARD.itl_margin < chosen.itl_margin < GOODPUT.itl_margin


@pytest.mark.parametrize(("slowest", "unlike"), [(1.0, 0.0), (1.25, 0.25), (3.0, 1.0)])
def test_the_slo_weighs_more_as_far_as_accelerators_differ(slowest, unlike):
    slow = cost(prefill_s_per_token=slowest * COST.prefill_s_per_token)
    fleet = Fleet(config(policy(pools=("fast", "slow")), pools=[pool("fast", 1), pool("slow", 1, cost=slow)]))
    arrival = fleet.sent(request(1000)).arrival
    assert arrival.unlike == pytest.approx(unlike)
    weights, price = KVFleet(policy())._weights(arrival)
    assert price == 0.0
    assert weights.itl_slo_s == pytest.approx((1 - unlike) * GOODPUT.itl_slo_s + unlike * UNLIKE.itl_slo_s)
    if not unlike:
        assert weights == GOODPUT
    latency, _ = KVFleetLatency(policy())._weights(arrival)
    assert latency.stall_s == pytest.approx(unlike * UNLIKE_LATENCY.stall_s)
    if not unlike:
        assert latency == LATENCY


def test_a_joule_costs_twice_as_much_where_accelerators_differ_wholly():
    _, arrival = parts_of(one_worker(), request(1000))
    prices = KVFleet(policy(energy_mode="Prefer", energy_s_per_joule=0.0005))
    assert prices._weights(arrival)[1] == pytest.approx(0.0005)
    arrival.unlike = 1.0
    assert prices._weights(arrival)[1] == pytest.approx(0.001)


def test_only_workers_that_may_be_chosen_tell_how_accelerators_differ():
    slow = cost(prefill_s_per_token=3 * COST.prefill_s_per_token)
    pools = [pool("fast", 2), pool("slow", 1, cost=slow)]
    fleet = Fleet(config(policy(pools=("fast", "slow")), pools=pools))
    fleet.dispatcher.set_endpoints("slow", [])
    assert fleet.sent(request(1000)).arrival.unlike == 0.0


def test_a_long_prompt_leaves_the_fast_accelerator_to_answers_that_it_would_ruin():
    """There it would come sooner, but answers have just begun; the slow one has time."""
    slow = cost(prefill_s_per_token=2.5 * COST.prefill_s_per_token)
    fleet = Fleet(config(policy(pools=("fast", "slow")), pools=[pool("fast", 1), pool("slow", 1, cost=slow)]))
    fleet.dispatcher.set_endpoints("slow", [])
    for n in range(5):
        ticket = fleet.sent(request(100, prefix=n))
        fleet.now += 0.01
        fleet.dispatcher.first_token(ticket)
    fleet.dispatcher.set_endpoints("slow", [WorkerEndpoint("slow-0", "http://127.0.0.1:9000")])
    _, arrival = parts_of(fleet, request(12_000, prefix="long"))

    def least(unlike):
        arrival.unlike = unlike
        costs = {
            worker.name: sum(arrival.lane.policy.score(arrival, worker, 0.0, fleet.now))
            for worker in fleet.dispatcher.workers()
        }
        return min(costs, key=costs.__getitem__)

    assert (least(0.0), least(1.0)) == ("fast-0", "slow-0")


def test_energy_is_priced_by_marginal_joules():
    fleet = one_worker(energy_mode="Prefer", energy_s_per_joule=0.0002)
    ticket = fleet.sent(request(1000, prefix="first"))
    record = fleet.dispatcher.decisions.get(ticket.id)["tries"][0]
    assert record["candidates"][0]["parts"]["energy"] == pytest.approx(0.0002 * ticket.joules)
    assert parts_of(fleet, request(1000), load=1.0)[0]["energy"] == 0.0


def test_with_energy_the_frugal_accelerator_wins_where_both_meet_the_slo():
    frugal = cost(prefill_s_per_token=5e-5, step_joules=1.0, token_joules=0.03)
    pools = [pool("fast", 1), pool("frugal", 1, cost=frugal)]

    def pool_of(tokens, **fields):
        fleet = Fleet(config(policy(pools=["fast", "frugal"], **fields), pools=pools))
        return fleet.sent(request(tokens)).worker.pool

    assert pool_of(1000) == "fast"
    assert pool_of(1000, energy_mode="Prefer") == "frugal"


def test_the_request_waits_at_the_router_while_the_best_backlog_is_long():
    fleet = one_worker()
    limit = GOODPUT.hold_above_s
    first = fleet.sent(request(round(limit / 40e-6) - 400, prefix=1))
    assert not isinstance(fleet.submit(request(400, prefix=2)), Held)
    assert isinstance(fleet.submit(request(400, prefix=3)), Held)
    fleet.now += first.predicted_ttft_s
    fleet.dispatcher.first_token(first)
    assert len(fleet.called_back) == 1


def test_without_a_queue_nothing_waits():
    fleet = one_worker(admission={"max_queue": 0})
    for n in range(5):
        fleet.sent(request(20_000, prefix=n))


def test_answers_that_have_lasted_are_safe_from_a_stall():
    """A prompt that stalls what has just begun costs more than one that stalls what has been going on for long."""
    fleet = one_worker()
    for n in range(100):
        fleet.answer(fleet.sent(request(10, prefix=("label", n))), output_tokens=2 + n)
    fleet.now += 500
    worker = decoding(fleet, 6)
    costs = []
    for age_s in (0.0, 0.2, 5.0):
        worker.decoding_since[:] = [(fleet.now - age_s, worker.prefill_seconds)] * 6
        costs.append(parts_of(fleet, request(4000))[0]["slo"])
    assert costs[0] > costs[1] > costs[2]
