"""Joules of a request, watts of a pool, how full a worker should be, and the power budget."""

from heapq import heappop, heappush

import pytest
from routing_fleet import COST, Fleet, config, cost, policy, pool, request

from kvfleet_router.core.dispatcher import Load, Ticket
from kvfleet_router.core.energy import marginal_joules, pack_target, watts


def test_joining_a_busy_worker_costs_a_fraction_of_waking_an_idle_one():
    fleet = Fleet(workers=1)
    idle = fleet.sent(request(100, prefix=1))
    fleet.dispatcher.first_token(idle)
    for n in range(2, 30):
        fleet.dispatcher.first_token(fleet.sent(request(100, prefix=n)))
    joined = fleet.sent(request(100, prefix=50))
    assert idle.joules > 8 * joined.joules


def test_marginal_joules_are_the_formula():
    fleet = Fleet(workers=1)
    ticket = fleet.sent(request(1000, prefix=1, max_output_tokens=100))
    fixed = (COST.step_joules - COST.idle_watts * COST.step_s) * 100
    tokens = 100 * (COST.token_joules + COST.context_token_joules * 1050)
    assert ticket.joules == pytest.approx(0.022 * 1000 + tokens + fixed)
    worker = ticket.worker
    assert marginal_joules(ticket.arrival, worker, 0.0) == pytest.approx(tokens + fixed / 2)


@pytest.mark.parametrize(
    ("changes", "itl_slo_s", "context_tokens", "expected"),
    [
        ({}, 10.0, 1.0, int(2 * 3.2 / 0.067)),  # energy: 2·E0/E1
        ({}, 0.010, 0.0, int(0.003 / 90e-6)),  # (SLO − W)/H
        ({}, 10.0, 10_000.0, 40),  # KV tokens
        ({"max_sequences": 16}, 10.0, 1.0, 16),
        ({}, 0.001, 1.0, 1),  # beyond reach: one at a time
        ({"token_joules": 0.0, "step_s_per_sequence": 0.0, "step_s_per_context_token": 0.0}, 0.05, 1.0, 256),
    ],
)
def test_the_pack_target_is_the_tightest_limit(changes, itl_slo_s, context_tokens, expected):
    model = cost(**changes)
    target = pack_target(
        model,
        step_s=model.step_s,
        step_s_per_sequence=model.step_s_per_sequence,
        itl_slo_s=itl_slo_s,
        context_tokens=context_tokens,
    )
    assert target == pytest.approx(expected, abs=1)


def test_the_dispatcher_tells_the_pack_target_of_a_pool():
    fleet = Fleet(workers=1, itl_slo_s=0.012)
    before = fleet.dispatcher.pack_target("pool")
    for n in range(200):
        fleet.answer(fleet.sent(request(100, prefix=n)), ttft=0.01, seconds=1.1, output_tokens=101, prompt_tokens=100)
    assert fleet.dispatcher.pack_target("pool") < before / 2  # steps of 11 ms leave little room below 12


def test_packed_sequences_count_the_work_and_not_how_it_is_spread():
    """Twelve answers on one worker and twelve on four: on four they are done sooner, so they are more work."""
    packed = []
    for workers in (1, 4):
        fleet = Fleet(workers=workers, strategy="least_request")
        for n in range(12):
            fleet.dispatcher.first_token(fleet.sent(request(100, prefix=n)))
        packed.append(fleet.dispatcher.packed_sequences("pool"))
    step_s = [COST.decode_step_s(n, n * 100.0) for n in (12, 3)]
    assert packed[1] / packed[0] == pytest.approx(step_s[0] / step_s[1], rel=0.05), "tokens per second"
    assert packed[0] > 12, "on a worker filled to the pack target steps are longer, and more are in flight"


def test_a_worker_beyond_the_pack_target_counts_as_full_as_it_is_and_an_idle_one_nothing():
    fleet = Fleet(workers=1, itl_slo_s=0.0075)
    assert fleet.dispatcher.packed_sequences("pool") == 0
    for n in range(40):
        fleet.dispatcher.first_token(fleet.sent(request(100, prefix=n)))
    assert fleet.dispatcher.pack_target("pool") < 40
    assert fleet.dispatcher.packed_sequences("pool") == 40


def test_each_router_counts_its_own_part_of_a_workers_packed_sequences():
    fleet = Fleet(workers=1)
    for n in range(10):
        fleet.dispatcher.first_token(fleet.sent(request(100, prefix=n)))
    alone = fleet.dispatcher.packed_sequences("pool")
    fleet.dispatcher.replicas.told({"pool-0": Load(in_flight=30, decoding=30, context_tokens=3000.0)})
    shared = fleet.dispatcher.packed_sequences("pool")
    alone_s, shared_s = COST.decode_step_s(10, 1000.0), COST.decode_step_s(40, 4000.0)
    assert shared == pytest.approx(alone * alone_s / shared_s, rel=0.05), "a quarter of the tokens of longer steps"


def test_watts_rise_from_idle_with_the_batch():
    draws = [watts(COST, n, 100.0 * n, COST.decode_step_s(n, 100.0 * n)) for n in (0, 1, 16, 128)]
    assert draws[0] == COST.idle_watts
    assert draws == sorted(draws)
    assert 300 < draws[1] < 600


def test_strict_energy_keeps_the_power_budget_and_answers_when_there_is_room():
    """Two idle workers draw 230 W; one working draws over 400 more. 900 W is room for one of them."""
    fleet = Fleet(config(policy(energy_mode="Strict", max_watts=900.0), workers=2))
    first = fleet.sent(request(100, prefix=1))
    fleet.dispatcher.first_token(first)
    others = [fleet.sent(request(100, prefix=n)) for n in range(2, 6)]
    assert {ticket.worker for ticket in others} == {first.worker}
    assert sum(pool.watts() for pool in fleet.dispatcher.pools()) < 900
    tight = Fleet(config(policy(energy_mode="Strict", max_watts=250.0), workers=2))
    held = tight.held(request(100))
    tight.now += 61
    tight.dispatcher.tick()
    assert not held.waiting
    assert tight.called_back[0].status == 503


def test_preferring_energy_gathers_load_and_steps_back_when_busy():
    def spread(rate_per_s, **fields):
        """Workers used by requests of 100 tokens and a second each."""
        fleet = Fleet(config(policy(**fields), pools=[pool(workers=4)]))
        used, events = set(), []
        for n in range(150):
            arrival = fleet.now + 1 / rate_per_s
            while events and events[0][0] <= arrival:
                fleet.now, _, end, ticket = heappop(events)
                if end:
                    fleet.dispatcher.finish(ticket, output_tokens=100)
                else:
                    fleet.dispatcher.first_token(ticket)
                    heappush(events, (fleet.now + 1.0, n, True, ticket))
            fleet.now = arrival
            ticket = fleet.sent(request(200, prefix=n, max_output_tokens=100))
            heappush(events, (fleet.now + ticket.predicted_ttft_s, n, False, ticket))
            if n > 100:
                used.add(ticket.worker.name)
        return len(used)

    assert spread(3.0) == 4
    assert spread(3.0, energy_mode="Prefer") == 1
    assert spread(150.0, energy_mode="Prefer", itl_slo_s=0.009) == 4


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_joules_never_outbid_an_objective_however_many_a_model_takes(scale):
    """What gathers on one worker is what keeps the ITL objective there; the price of a joule times its joules does not matter."""
    dear = cost(step_joules=3.2 * scale, token_joules=0.067 * scale, idle_watts=115.0 * scale)
    fleet = Fleet(config(policy(energy_mode="Prefer", itl_slo_s=0.02), pools=[pool(workers=4, cost=dear)]))
    for _ in range(200):
        ticket = fleet.sent(request(100, prefix=fleet.count, max_output_tokens=400))
        fleet.now += ticket.predicted_ttft_s
        fleet.dispatcher.first_token(ticket)
    steps = sorted(worker.step_now_s for worker in fleet.dispatcher.workers())
    assert steps[-1] < 0.02
    assert steps[0] < steps[-1]  # they do gather


def test_a_request_whose_deadline_is_near_does_not_wait_for_a_cheaper_worker():
    dear = cost(step_joules=320.0, token_joules=6.7, idle_watts=11500.0)
    fleet = Fleet(config(policy(energy_mode="Prefer"), pools=[pool(workers=2, cost=dear)]))
    first = fleet.sent(request(60_000, prefix=1, max_output_tokens=1000))
    second = fleet.submit(request(60_000, prefix=2, max_output_tokens=1000))
    for _ in range(200):
        if not isinstance(second, Ticket):
            fleet.now += 0.05
            fleet.dispatcher.tick()
            second = fleet.called_back[0] if fleet.called_back else second
    assert isinstance(second, Ticket)
    assert second.worker != first.worker or fleet.now - 100.0 < 0.5
