"""Requests kept for a cheaper time: each goes exactly once, never later than it must, never in a herd, never in others' way."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_fleet import Fleet, config, policy, request

from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_api.routingpolicy import DeferSpec
from kvfleet_router.core.deferral import DEFER_HEADER, PACE_SHARE
from kvfleet_router.core.dispatcher import Held, Refusal, Ticket

HOUR = 3600.0
DAY = TelemetrySpec.model_validate(
    {"carbonByHour": [{"hour": 0, "gramsPerKilowattHour": 400}, {"hour": 3, "gramsPerKilowattHour": 100}]}
)
"""Dear from midnight on, cheap from 03:00 on."""


def deferring(telemetry=DAY, workers=2, hour=0.0, **spec):
    fleet = Fleet(
        config(policy(defer=DeferSpec.model_validate(spec)), workers=workers).model_copy(
            update={"telemetry": telemetry}
        )
    )
    fleet.now = hour * HOUR
    fleet.dispatcher.tick()
    return fleet


def patient(seconds=6 * 3600, **fields):
    return request(200, headers={DEFER_HEADER: str(seconds).encode()}, **fields)


def run_until(fleet, hour, step_s=1.0):
    """Tick on; everything that is sent is answered at once. Moments of what was sent."""
    sent = []
    while fleet.now < hour * HOUR:
        fleet.now += step_s
        fleet.dispatcher.tick()
        for result in fleet.called_back:
            assert isinstance(result, Ticket), result
            sent.append(fleet.now)
            fleet.answer(result, ttft=0.0, seconds=0.0, output_tokens=5)
        fleet.called_back.clear()
    return sent


def test_a_request_waits_for_the_cheap_hour():
    fleet = deferring(maxSeconds=86400)
    held = fleet.held(patient())
    assert run_until(fleet, 2.99) == []
    assert fleet.dispatcher.deferral.kept == {"policy": 1}
    [at] = run_until(fleet, 3.1)
    assert at == pytest.approx(3 * HOUR, abs=1.5)
    assert not held.waiting
    assert fleet.dispatcher.deferral.ended == {("policy", "cheap"): 1}
    [record] = fleet.dispatcher.decisions.recent(1)
    assert record["deferred_until"] == "cheap"
    assert record["deferred_s"] == pytest.approx(3 * HOUR, abs=1.5)
    assert record["held_s"] == pytest.approx(0.0, abs=0.01)


def test_one_that_must_begin_before_the_cheap_hour_begins_at_once_where_no_hour_is_cheaper():
    fleet = deferring(maxSeconds=86400)
    fleet.held(patient(seconds=3600))
    fleet.now += 0.001
    fleet.dispatcher.tick()
    assert isinstance(fleet.called_back[0], Ticket)


def test_it_begins_when_it_must_though_the_fleet_is_busy():
    fleet = deferring(workers=1, maxSeconds=86400)
    for n in range(300):  # beyond the load that leaves room
        fleet.submit(request(100, prefix=n))
    fleet.called_back.clear()
    fleet.now += 1.0
    fleet.dispatcher.tick()
    held = fleet.held(patient(seconds=30))
    fleet.now += 29.0
    fleet.dispatcher.tick()
    assert held.deferred
    fleet.now += 1.0
    fleet.dispatcher.tick()
    assert not held.deferred
    assert fleet.dispatcher.deferral.ended["policy", "due"] == 1


@pytest.mark.parametrize("routers", [1, 4])
def test_a_cheap_hour_does_not_begin_with_a_herd(routers):
    fleet = deferring(maxSeconds=86400, maxRequests=1000)
    fleet.dispatcher.configure(fleet.dispatcher.config.model_copy(update={"routers": routers}))
    for _ in range(400):
        fleet.held(patient(prefix=fleet.count))
    sent = run_until(fleet, 3.5, step_s=0.25)
    assert len(sent) == 400
    capacity = sum(pool.capacity_rps for pool in fleet.dispatcher.pools())
    span = sent[-1] - sent[0]
    assert span > 0.5 * 400 * routers / (PACE_SHARE * capacity)


def test_without_a_schedule_it_fills_quiet_times():
    fleet = deferring(telemetry=None, workers=1, maxSeconds=86400)
    tickets = [fleet.submit(request(100, prefix=n)) for n in range(300)]
    fleet.now += 1.0
    fleet.dispatcher.tick()
    held = fleet.held(patient(prefix=9999))
    fleet.now += 10
    fleet.dispatcher.tick()
    assert held.deferred
    tickets = [each for each in (*tickets, *fleet.called_back) if isinstance(each, Ticket)]
    fleet.called_back.clear()
    for ticket in tickets:
        fleet.dispatcher.abandon(ticket, "test")
    fleet.now += 100
    fleet.dispatcher.tick()
    fleet.now += 0.5
    fleet.dispatcher.tick()
    assert not held.deferred


def test_priorities_defer_without_asking_and_the_header_overrules():
    fleet = deferring(maxSeconds=7 * 3600, minPriority=5)
    assert fleet.held(request(100, priority=5)).deferred
    fleet.sent(request(100, priority=4))
    fleet.sent(request(100, priority=9, headers={DEFER_HEADER: b"0"}))


def test_without_a_policy_that_allows_it_the_header_means_nothing():
    fleet = Fleet(config())
    fleet.sent(patient())


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b"soon", b"1" * 40, b"\xb2"])
def test_a_bad_header_is_refused_with_its_name(value):
    fleet = deferring()
    refusal = fleet.refused(request(100, headers={DEFER_HEADER: value}))
    assert (refusal.status, refusal.code, refusal.param) == (400, "invalid_header", "x-kvfleet-defer-seconds")
    assert "write one from 0 to 3600" in refusal.message


def test_who_finds_no_place_is_sent_at_once():
    fleet = deferring(maxSeconds=86400, maxRequests=2)
    for _ in range(2):
        fleet.held(patient())
    fleet.sent(patient())
    assert fleet.dispatcher.deferral.ended["policy", "full"] == 1


def test_a_client_that_leaves_frees_its_place():
    fleet = deferring(maxSeconds=86400, maxRequests=1)
    held = fleet.held(patient())
    fleet.dispatcher.cancel(held)
    fleet.dispatcher.cancel(held)
    assert fleet.dispatcher.deferral.kept == {}
    assert fleet.held(patient()).deferred
    assert len(run_until(fleet, 3.2)) == 1


def test_a_router_that_leaves_keeps_nobody():
    fleet = deferring(maxSeconds=86400)
    for _ in range(20):
        fleet.held(patient(prefix=fleet.count))
    fleet.dispatcher.drain()
    fleet.sent(patient())
    assert len(run_until(fleet, 0.05, step_s=0.25)) == 20
    assert fleet.dispatcher.deferral.kept == {}


def test_a_new_configuration_keeps_them_on_or_lets_them_go():
    fleet = deferring(maxSeconds=86400)
    first, second = fleet.held(patient()), fleet.held(patient(seconds=3 * 3600 + 1800))
    now = fleet.dispatcher.config
    fleet.dispatcher.configure(now.model_copy(update={"drain_s": 7.0}))
    assert first.deferred
    assert fleet.dispatcher.deferral.kept == {"policy": 2}
    fleet.dispatcher.configure(now.model_copy(update={"policies": [policy()]}))
    assert not first.waiting
    assert not second.waiting
    assert fleet.dispatcher.deferral.kept == {}


def test_pools_without_a_worker_are_not_asked_before_a_request_must_begin():
    fleet = deferring(workers=0, maxSeconds=86400)
    held = fleet.held(patient(seconds=4 * 3600))
    fleet.now = 3.5 * HOUR
    fleet.dispatcher.tick()
    assert held.deferred
    fleet.now = 4 * HOUR
    fleet.dispatcher.tick()
    assert isinstance(fleet.called_back[0], Refusal)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), places=st.integers(1, 40), flat=st.booleans())
def test_everybody_goes_once_in_time_and_bounds_hold(seed, places, flat):
    rng = random.Random(seed)
    fleet = deferring(telemetry=None if flat else DAY, hour=2.0, maxSeconds=86400, maxRequests=places)
    latest: dict[int, float] = {}
    waiting: list[Held] = []
    sent = 0
    for _ in range(80):
        wish = rng.choice([0, 60, 1800, 7200])
        result = fleet.submit(patient(seconds=wish, prefix=fleet.count))
        if isinstance(result, Held):
            latest[id(result)] = fleet.now + wish
            waiting.append(result)
        else:
            assert isinstance(result, Ticket)
            sent += 1
            fleet.answer(result, ttft=0.0, seconds=0.0, output_tokens=5)
        assert len(fleet.dispatcher.deferral) <= places
        if waiting and rng.random() < 0.1:
            leaver = waiting.pop(rng.randrange(len(waiting)))
            if leaver.waiting:
                fleet.dispatcher.cancel(leaver)
                sent += 1  # accounted for
        sent += len(run_until(fleet, (fleet.now + rng.choice([0.5, 60.0, 400.0])) / HOUR, step_s=5.0))
        for held in waiting:
            assert not held.deferred or fleet.now < latest[id(held)] + 5.0
    sent += len(run_until(fleet, (fleet.now + 8000.0) / HOUR, step_s=10.0))
    assert sent == 80
    assert not any(held.waiting for held in waiting)
    assert len(fleet.dispatcher.deferral) == 0
    assert fleet.dispatcher.deferral._kept == {}
    fleet.assert_idle()
