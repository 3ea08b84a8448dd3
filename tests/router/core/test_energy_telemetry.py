"""Power telemetry: what is believed, what is not, and what is learned from it."""

import random
from dataclasses import replace
from math import inf, nan

import pytest
from routing_fleet import COST, Fleet, config, policy

from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_router.core.energyfit import NAMES, EnergyFit, Figures, Work
from kvfleet_router.core.telemetry import FROZEN_AFTER_S, MAX_DEVICE_WATTS, DeviceReading, Meter, State


def at(joules, watts=None, devices=1):
    return {f"GPU-{number}": DeviceReading(joules, watts) for number in range(devices)}


def measuring(**options):
    meter = Meter(0.0, **options)
    meter.observe(at(100.0), 0.0)
    meter.observe(at(400.0), 10.0)
    assert meter.state(10.0) is State.MEASURED
    return meter


def test_the_joules_between_two_readings_of_all_devices():
    meter = Meter(0.0)
    assert meter.observe(at(100.0, devices=2), 0.0) is None
    assert meter.state(0.0) is State.LEARNING
    interval = meter.observe(at(400.0, devices=2), 10.0)
    assert interval is not None
    assert (interval.joules, interval.seconds, interval.resets) == (600.0, 10.0, 0)


def test_a_counter_that_began_anew_counts_from_zero():
    meter = measuring()
    interval = meter.observe(at(50.0), 20.0)
    assert interval is not None
    assert (interval.joules, interval.resets) == (50.0, 1)
    assert meter.state(20.0) is State.MEASURED


@pytest.mark.parametrize("joules", [-5.0, nan, inf, 400.0 + MAX_DEVICE_WATTS * 20])
def test_what_cannot_be_true_is_not_used_and_not_soon_forgiven(joules):
    meter = measuring()
    assert meter.observe(at(joules), 20.0) is None
    assert meter.state(20.0) is State.ABSURD
    assert meter.problem
    base = 0.0 if joules < 0 or joules != joules or joules == inf else joules
    for number in range(1, 8):
        meter.observe(at((base or 400.0) + 300.0 * number), 20.0 + 10.0 * number)
    assert meter.state(90.0) is State.MEASURED
    assert meter.joules < 6000.0


def test_absurd_watts_are_as_bad_as_absurd_joules():
    meter = measuring()
    meter.observe(at(700.0, watts=-1.0), 20.0)
    assert meter.state(20.0) is State.ABSURD


def test_readings_that_stay_away_are_stale():
    meter = measuring(stale_s=30.0)
    assert meter.state(40.0) is State.MEASURED
    assert meter.state(40.1) is State.STALE


def test_a_counter_that_stands_still_is_frozen_and_its_time_counts_once_it_moves():
    meter = measuring()
    for now in range(20, 10 + int(FROZEN_AFTER_S) + 1, 10):
        meter.observe(at(400.0), float(now))
    assert meter.state(10.0 + FROZEN_AFTER_S) is State.FROZEN
    interval = meter.observe(at(400.0 + 8000.0), 90.0)
    assert interval is not None
    assert interval.seconds == 80.0
    assert meter.state(90.0) is State.MEASURED


# -- what is learned


def intervals(cost, count, seed=1, noise=0.02):
    """A day's mixture: idle, light and full intervals of ten seconds, and what a worker of this cost draws in them."""
    draw = random.Random(seed)
    truth = Figures.of(cost)
    for _ in range(count):
        busy = draw.choice((0.0, 0.3, 1.0, 1.0))
        sequences = draw.choice((1, 4, 16, 64))
        steps = busy * 10.0 / (0.007 + 0.0001 * sequences)
        tokens = steps * sequences
        work = Work(steps, tokens, tokens * 1500.0, draw.random() * 4000.0 * busy * sequences / 16, 10.0 * (1 - busy))
        yield work, truth.joules(work) * draw.gauss(1.0, noise)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_wrong_coefficients_converge(factor):
    wrong = replace(
        COST,
        step_joules=COST.step_joules * factor,
        token_joules=COST.token_joules * factor,
        prefill_token_joules=COST.prefill_token_joules * factor,
        idle_watts=COST.idle_watts * factor,
    )
    fit = EnergyFit(wrong)
    errors = []
    for work, joules in intervals(COST, 300):
        fit.observe(work, joules)
        errors.append(fit.error)
    assert errors[0] > 0.3
    assert errors[-1] < 0.05
    assert fit.confident
    learned = {estimate.name: estimate for estimate in fit.estimates()}
    truth = (COST.step_joules, COST.token_joules, COST.prefill_token_joules, COST.idle_watts)
    for name, value in zip(NAMES, truth, strict=True):
        # Prefill is a few percent of what was drawn, of the size of the noise.
        assert learned[name].value == pytest.approx(value, rel=0.3 if name == "PrefillTokenEnergy" else 0.1), name
        assert abs(learned[name].value - value) < 4 * learned[name].standard_error + 0.02 * value


def test_what_the_load_says_nothing_about_stays_uncertain():
    fit = EnergyFit(COST)
    for _ in range(500):
        fit.observe(Work(idle_s=10.0), 10.0 * 90.0)
    learned = {estimate.name: estimate for estimate in fit.estimates()}
    assert learned["IdlePower"].value == pytest.approx(90.0, rel=0.02)
    assert learned["StepEnergy"].value == pytest.approx(COST.step_joules)
    assert learned["StepEnergy"].standard_error > 0.5 * COST.step_joules


def test_joules_that_have_nothing_to_do_with_the_work_are_no_base_for_decisions():
    draw, fit = random.Random(3), EnergyFit(COST)
    for work, _ in intervals(COST, 100):
        fit.observe(work, draw.uniform(10.0, 8000.0))
    assert not fit.confident


# -- what it does to decisions


def metered_fleet(**telemetry):
    spec = TelemetrySpec.model_validate({"dcgmURLs": ["http://exporter/metrics"], "staleSeconds": 20, **telemetry})
    return Fleet(config(policy(energy_mode="Prefer"), workers=2).model_copy(update={"telemetry": spec}))


def truth(fleet):
    """What a counter shows that ran since the beginning."""
    return 115.0 * (fleet.now - 100.0)


def read(fleet, joules):
    for worker in fleet.dispatcher.workers():
        fleet.dispatcher.measured(worker, at(joules))
    fleet.dispatcher.energy_tick()


def energy_part(fleet):
    ticket = fleet.sent()
    record = fleet.dispatcher.decisions.get(ticket.id)
    fleet.answer(ticket)
    return max(candidate["parts"]["energy"] for candidate in record["tries"][0]["candidates"])


@pytest.mark.parametrize(
    ("then", "source"),
    [(None, "Stale"), (lambda n: 1150.0, "Frozen"), (lambda n: -1.0, "Absurd"), (lambda n: 1e9 * (n + 2), "Absurd")],
)
def test_bad_telemetry_switches_energy_off_in_time_and_good_telemetry_on_again(then, source):
    fleet = metered_fleet()
    for _ in range(3):
        fleet.now += 10.0
        read(fleet, truth(fleet))
    assert energy_part(fleet) > 0.0
    for number in range(7):
        fleet.now += 10.0
        if then is None:
            fleet.dispatcher.energy_tick()
        else:
            read(fleet, then(number))
    (state,) = fleet.dispatcher.energy_states()
    assert (state.source, state.trusted) == (source, False)
    assert source.lower() in state.message
    assert energy_part(fleet) == 0.0
    for _ in range(8):
        fleet.now += 10.0
        read(fleet, truth(fleet))
    (state,) = fleet.dispatcher.energy_states()
    assert state.trusted, state.message
    assert energy_part(fleet) > 0.0


def test_one_bad_exporter_of_several_does_not_switch_energy_off():
    fleet = metered_fleet()
    first, second = fleet.dispatcher.workers()
    for number in range(6):
        fleet.now += 10.0
        fleet.dispatcher.measured(first, at(1150.0 * number))
        fleet.dispatcher.energy_tick()
    assert fleet.dispatcher.energy_states()[0].trusted
    assert second.ledger is None


def test_what_was_learned_prices_requests():
    fleet = metered_fleet()
    joules = 0.0
    for _ in range(60):
        fleet.now += 10.0
        joules += 10.0 * 60.0  # half of the profile's idle power
        read(fleet, joules)
    worker = fleet.dispatcher.workers()[0]
    assert worker.pool_state.joules.idle_watts == pytest.approx(60.0, rel=0.05)
    assert worker.fixed_step_joules == pytest.approx(COST.step_joules - 60.0 * COST.step_s, rel=0.05)


def test_without_telemetry_the_profile_steers():
    fleet = Fleet(config(policy(energy_mode="Prefer"), workers=2))
    (state,) = fleet.dispatcher.energy_states()
    assert (state.source, state.trusted) == ("Profile", True)
    assert energy_part(fleet) > 0.0
