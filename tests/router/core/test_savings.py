"""Joules saved against least_request: what a decision is priced at, and how well the sum is known."""

import math

import pytest
from routing_fleet import COST, Fleet, config, cost, policy, pool, request

from kvfleet_router.core.energyfit import PRIOR_SD
from kvfleet_router.io.energy_metrics import EnergyMetrics


def saved_of(fleet, ticket):
    return fleet.dispatcher.decisions.get(ticket.id)["tries"][0]["saved_joules"]


def decoding(fleet, *prefixes, **fields):
    for prefix in prefixes:
        fleet.dispatcher.first_token(fleet.sent(request(100, prefix=prefix, max_output_tokens=100, **fields)))


def prefer(workers=2, **fields):
    return Fleet(config(policy(energy_mode="Prefer", **fields), workers=workers))


STEP = COST.step_joules - COST.idle_watts * COST.step_s
"""Joules that a decode step adds to idling."""


def test_joining_a_busy_worker_saves_the_steps_of_an_idle_one():
    fleet = prefer()
    decoding(fleet, 1)
    ticket = fleet.sent(request(100, prefix=2, max_output_tokens=100))
    assert ticket.worker.decoding == 1, "they gather"
    assert saved_of(fleet, ticket) == pytest.approx(100 * STEP * (1 - 1 / 2), rel=1e-6)


def test_least_request_saves_nothing_against_itself():
    fleet = Fleet(workers=3, strategy="least_request")
    tickets = [fleet.sent(request(100, prefix=n)) for n in range(9)]
    assert [saved_of(fleet, ticket) for ticket in tickets] == pytest.approx([0.0] * 9)


def test_among_equals_least_request_would_have_hit_the_cached_prompt_now_and_then():
    fleet = Fleet(workers=3, strategy="lmetric")
    first = fleet.sent(request(4000, prefix=1, tail=1))
    fleet.answer(first)
    again = fleet.sent(request(4000, prefix=1, tail=1))
    assert again.worker is first.worker
    assert again.cached_tokens > 3000
    assert saved_of(fleet, again) == pytest.approx(2 / 3 * COST.prefill_token_joules * again.cached_tokens, rel=1e-6)


def test_what_takes_more_than_least_request_is_counted_apart():
    """A latency policy spreads; where least_request would join, it goes to the idle worker of the hungrier pool."""
    pools = [pool("thrifty", 1), pool("hungry", 1, cost=cost(step_joules=32.0, prefill_s_per_token=1e-6))]
    fleet = Fleet(config(policy(pools=["thrifty", "hungry"], strategy="ttft_min"), pools=pools))
    ticket = fleet.sent(request(2000, prefix=1))
    assert ticket.worker.pool == "hungry"
    assert saved_of(fleet, ticket) < 0
    (told,) = fleet.dispatcher.savings()
    assert (told.pool, told.saved_joules) == ("hungry", 0.0)
    assert told.lost_joules == pytest.approx(-saved_of(fleet, ticket))


def test_a_retry_is_no_second_decision():
    fleet = prefer()
    decoding(fleet, 1)
    ticket = fleet.sent(request(100, prefix=2, max_output_tokens=100))
    before = fleet.dispatcher.savings()
    assert fleet.retry(ticket).worker is not ticket.worker
    assert fleet.dispatcher.savings() == before


def test_the_standard_error_is_that_of_the_coefficients_and_does_not_average_out():
    fleet = prefer()
    decoding(fleet, 1)
    shares = []
    for prefix in range(2, 12):
        fleet.dispatcher.first_token(fleet.sent(request(100, prefix=prefix, max_output_tokens=100)))
        (told,) = fleet.dispatcher.savings()
        shares.append(told.standard_error / told.saved_joules)
    step, idle = COST.step_joules * PRIOR_SD, COST.idle_watts * COST.step_s * PRIOR_SD
    assert shares == pytest.approx([math.hypot(step, idle) / STEP] * 10, rel=1e-3)


def test_pools_without_energy_are_not_priced_and_those_gone_are_forgotten():
    nothing = dict.fromkeys(("step_joules", "token_joules", "context_token_joules", "prefill_token_joules"), 0.0)
    fleet = Fleet(config(pools=[pool(cost=cost(**nothing))]))
    assert saved_of(fleet, fleet.sent()) is None
    assert fleet.dispatcher.savings() == []
    other = prefer()
    decoding(other, 1, 2)
    assert [told.pool for told in other.dispatcher.savings()] == ["pool"]
    other.dispatcher.configure(config(policy(pools=["b"]), pools=[pool("b")]))
    assert other.dispatcher.savings() == []


def test_many_workers_are_compared_as_few_are():
    few, many = prefer(3), prefer(60)
    for fleet in (few, many):
        decoding(fleet, 1)
    tickets = [(fleet, fleet.sent(request(100, prefix=2, max_output_tokens=100))) for fleet in (few, many)]
    assert saved_of(*tickets[0]) == pytest.approx(saved_of(*tickets[1]))


def test_metrics_tell_what_is_saved_though_no_books_are_kept():
    fleet = prefer()
    metrics = EnergyMetrics(fleet.dispatcher)
    assert list(metrics()) == []
    decoding(fleet, 1, 2, 3)
    (told,) = fleet.dispatcher.savings()
    samples = {sample.name: sample for metric in metrics() for sample in metric.samples}
    assert {name: sample.value for name, sample in samples.items()} == {
        "kvfleet_energy_saved_joules_total": told.saved_joules,
        "kvfleet_energy_lost_joules_total": told.lost_joules,
        "kvfleet_energy_saved_joules_stderr": told.standard_error,
    }
    assert {tuple(sample.labels.items()) for sample in samples.values()} == {(("pool", "pool"),)}
    assert told.saved_joules > 0
