"""Simulated workers that start, leave and are off: nothing is lost, and every joule and second is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import pytest
from engine_workloads import cost_model
from fleet_helpers import BLOCK_TOKENS, MODEL, small_fleet, steady_load
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_router.core.dispatcher import WorkerEndpoint
from kvfleet_sim.elastic import Elastic, Parking, PoolView
from kvfleet_sim.engine import Engine
from kvfleet_sim.fleet import simulate
from kvfleet_sim.machines import Machine, Power
from kvfleet_sim.shifts import roster, scale, spare


class Scripted:
    """As many workers as the script says, one entry a period; the last one stays."""

    period_s = 1.0

    def __init__(self, *wanted: int) -> None:
        self.script = list(wanted)
        self.seen: list[PoolView] = []
        self.spared: dict[str, int] = {}

    def wanted(self, pools: Sequence[PoolView], now_s: float) -> Mapping[str, int]:
        self.seen += pools
        return {pools[0].name: self.script.pop(0) if len(self.script) > 1 else self.script[0]}

    def leaving(self) -> Mapping[str, int]:
        return self.spared


def run(controller: Scripted | Parking, workers: int, load: list, *, startup_s: float = 2.5, off_watts: float = 0.0):
    elastic = Elastic(controller, startup_s=startup_s, off_watts=off_watts)
    config = small_fleet(workers, strategy="kvfleet")
    return simulate(config, load, model=MODEL, block_tokens=BLOCK_TOKENS, elastic=elastic)


def test_no_request_is_lost_while_workers_come_and_go():
    result = run(Scripted(3, 1, 3, 2, 1, 3, 1), 3, steady_load(300, 0.03))
    assert result.completed.all()
    assert result.starts > 0
    assert 0 < result.worker_seconds < 3 * result.finish_s.max()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.floats(0.5, 5.0))
def test_whatever_the_controller_wants_every_request_ends(script: list[int], startup_s: float):
    result = run(Scripted(*[max(wanted, 1) for wanted in script]), 4, steady_load(80, 0.05), startup_s=startup_s)
    assert result.completed.all()


def test_a_constant_fleet_draws_what_a_fleet_without_a_controller_draws():
    load, config = steady_load(100), small_fleet(2, strategy="kvfleet")
    constant = run(Scripted(2), 2, load)
    assert constant.joules == pytest.approx(
        simulate(config, load, model=MODEL, block_tokens=BLOCK_TOKENS).joules, rel=1e-9
    )
    assert constant.worker_seconds == pytest.approx(2 * constant.finish_s.max())


def test_a_machines_joules_are_those_of_its_states():
    cost = replace(cost_model(), idle_watts=100.0)
    pool = small_fleet().pools[0].model_copy(update={"cost": cost})
    machine = Machine(
        WorkerEndpoint("w", "http://w"), pool, lambda start_s: Engine(cost, start_s=start_s), off_watts=3.0
    )
    assert machine.joules_at(10.0) == pytest.approx(1000.0)
    machine.leave(10.0)
    machine.stop(12.0)
    assert machine.joules_at(32.0) == pytest.approx(1200.0 + 60.0)
    assert machine.seconds_at(32.0) == 12.0
    machine.start(32.0, 5.0)
    machine.began(37.0)
    assert machine.joules_at(40.0) == pytest.approx(1260.0 + 800.0)
    assert machine.seconds_at(40.0) == 20.0


def test_starts_are_broken_off_before_anybody_leaves():
    pool = small_fleet().pools[0]
    machines = [
        Machine(WorkerEndpoint(f"w{n}", f"http://w{n}"), pool, lambda start_s: Engine(pool.cost, start_s=start_s))
        for n in range(3)
    ]
    scale(machines, 1, 0.0, 10.0)
    assert [machine.power for machine in machines].count(Power.OFF) == 2
    (started,) = scale(machines, 2, 5.0, 10.0)
    assert started.begins_s == 15.0
    scale(machines, 1, 6.0, 10.0)
    assert started.power is Power.OFF
    assert [machine.power for machine in machines].count(Power.ON) == 1


def test_parking_switches_off_what_idles_and_comes_back_under_load():
    quiet = steady_load(20, 8.0)
    busy = [replace(request, start_s=200.0 + number * 0.004) for number, request in enumerate(steady_load(600))]
    parked = run(Parking(idle_s=20.0, wake_load=0.4), 4, quiet + busy, startup_s=1.0)
    assert parked.completed.all()
    assert parked.starts >= 1
    assert parked.worker_seconds < 0.7 * 4 * parked.finish_s.max()


def test_parking_keeps_the_last_worker():
    parked = run(Parking(idle_s=1.0), 3, steady_load(5, 30.0))
    assert parked.completed.all()
    assert parked.starts == 0


def test_the_same_load_is_as_many_packed_sequences_on_few_workers_as_on_many():
    """Requests in flight are not: half-empty workers end them sooner."""
    steep = cost_model(
        step_s=5e-3, step_s_per_sequence=1e-3, kv_tokens=100_000, max_step_tokens=2048, max_sequences=256
    )
    means = []
    for workers in (2, 6):
        config = small_fleet(workers, strategy="kvfleet")
        config = config.model_copy(update={"pools": [config.pools[0].model_copy(update={"cost": steep})]})
        controller = Scripted(workers)
        load = steady_load(1500, 0.012)
        simulate(config, load, model=MODEL, block_tokens=BLOCK_TOKENS, elastic=Elastic(controller))
        seen = controller.seen[2:-2]
        means.append([fmean(view.in_flight for view in seen), fmean(view.packed for view in seen)])
    (few_in_flight, few_packed), (many_in_flight, many_packed) = means
    assert many_in_flight < 0.7 * few_in_flight
    assert many_packed == pytest.approx(few_packed, rel=0.1)


def test_who_is_to_go_soon_gets_nothing_new_and_is_the_one_that_goes():
    controller = Scripted(3, 3, 3, 3, 3, 2)
    controller.spared = {"a": 1}
    config, load = small_fleet(3, strategy="least_request"), steady_load(160, 0.05)
    result = simulate(config, load, model=MODEL, block_tokens=BLOCK_TOKENS, elastic=Elastic(controller))
    assert result.completed.all()
    counts = sorted(result.requests_by_worker.values())
    assert counts[0] < counts[1] / 3, "after the first second it got none"


def test_a_worker_that_is_spared_serves_again_when_it_is_called_off():
    machines = [
        Machine(WorkerEndpoint(f"w{n}", f"http://w{n}"), small_fleet().pools[0], lambda start_s: Engine(cost_model()))
        for n in range(3)
    ]
    assert spare(machines, 1, 1.0)
    (spared,) = [machine for machine in machines if machine.draining]
    assert [endpoint.draining for endpoint in roster(machines)].count(True) == 1
    assert not spare(machines, 1, 2.0), "the same one"
    scale(machines, 2, 3.0, 1.0)
    assert spared.power is Power.OFF
    assert spare(machines, 0, 4.0)
    assert not any(machine.draining for machine in machines)
