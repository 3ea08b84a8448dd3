"""The books of joules: their sum is the counters', however workers, requests and counters come and go."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_fleet import config, request

from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_router.core.dispatcher import Dispatcher, Ticket, WorkerEndpoint
from kvfleet_router.core.ledger import KINDS, MAX_ACCOUNTS, OTHER_TENANTS
from kvfleet_router.core.telemetry import DeviceReading
from kvfleet_router.policies import REGISTRY


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Metered:
    """A dispatcher whose workers have counters that a test turns."""

    def __init__(self, workers=2, **telemetry):
        self.clock = Clock()
        spec = TelemetrySpec.model_validate({"dcgmURLs": ["http://exporter/metrics"], **telemetry})
        fleet = config(workers=workers).model_copy(update={"telemetry": spec})
        self.dispatcher = Dispatcher(fleet, clock=self.clock, rng=random.Random(1), policies=REGISTRY)
        self.counters = {worker.name: 1000.0 for worker in self.dispatcher.workers()}
        self.drawn = 0.0
        self.read()

    def read(self):
        for worker in self.dispatcher.workers():
            self.dispatcher.measured(worker, {"GPU-0": DeviceReading(self.counters.setdefault(worker.name, 0.0))})
        self.dispatcher.energy_tick()

    def draw(self, name, joules):
        if name in self.counters:
            self.counters[name] += joules

    @property
    def booked(self):
        assert self.dispatcher.energy.ledger is not None
        return sum(row[-1] for row in self.dispatcher.energy.ledger.rows())

    def submit(self, tenant="", tokens=200, *, stream=True):
        asked = request(tokens, stream=stream, tenant=tenant)
        ticket = self.dispatcher.submit(asked, request_id="r", on_assigned=lambda answer: None)
        assert isinstance(ticket, Ticket)
        return ticket


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("submit", "first", "finish", "abandon", "draw", "read", "reset", "restart")),
        st.integers(0, 9),
        st.floats(0.1, 20.0),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=120)
@given(ACTIONS)
def test_the_sum_of_the_books_is_the_sum_of_the_counters(actions):
    fleet = Metered()
    tickets = []
    drawn = 0.0  # what counters showed between two readings of the same worker
    pending = dict.fromkeys(fleet.counters, 0.0)

    def read():
        nonlocal drawn
        fleet.read()
        drawn += sum(pending.values())
        pending.update(dict.fromkeys(pending, 0.0))

    for action, number, amount in actions:
        fleet.clock.now += amount
        names = list(fleet.counters)
        name = names[number % len(names)]
        if action == "submit":
            tickets.append(fleet.submit(f"t{number % 3}"))
        elif action == "draw":
            fleet.draw(name, amount * 10)
            pending[name] += amount * 10
        elif action == "read":
            read()
        elif action == "reset":  # its host reboots: nothing that the counter showed since the last reading can be known
            fleet.counters[name] = 0.0
            pending[name] = 0.0
        elif tickets:
            ticket = tickets[number % len(tickets)]
            if action == "first":
                fleet.dispatcher.first_token(ticket)
            elif action == "finish":
                fleet.dispatcher.first_token(ticket)
                fleet.dispatcher.finish(ticket, output_tokens=20 + number)
            elif action == "abandon":
                fleet.dispatcher.abandon(ticket, "left")
    fleet.clock.now += 5.0
    for name in fleet.counters:  # a counter that stands still leaves its interval open
        fleet.draw(name, 1.0)
        pending[name] += 1.0
    read()
    assert fleet.booked == pytest.approx(drawn, rel=1e-3)
    assert fleet.dispatcher.energy.ledger is not None
    assert fleet.dispatcher.energy.ledger.total == pytest.approx(fleet.booked)


def test_a_request_pays_for_its_prefill_and_its_tokens_and_idling_is_nobodys():
    fleet = Metered(workers=1)
    fleet.clock.now += 10.0
    ticket = fleet.submit("acme", 1000)
    fleet.clock.now += 0.2
    fleet.dispatcher.first_token(ticket)
    worker = ticket.worker
    fleet.clock.now += 100 * worker.step_now_s
    fleet.dispatcher.finish(ticket, output_tokens=100)
    fleet.draw(worker.name, 2000.0)
    fleet.read()
    ledger = fleet.dispatcher.energy.ledger
    assert ledger is not None
    rows = {(tenant, kind): joules for _, tenant, _, kind, joules in ledger.rows()}
    assert {kind for _, kind in rows} == set(KINDS)
    assert all(joules > 0 for joules in rows.values())
    assert ("acme", "idle") not in rows
    assert sum(rows.values()) == pytest.approx(2000.0)
    cost = worker.pool_state.cost
    assert rows["acme", "decode"] / rows["acme", "prefill"] == pytest.approx(
        (cost.token_joules * 100 + cost.context_token_joules * 100 * 1050) / (cost.prefill_token_joules * 1000),
        rel=0.05,
    )


def test_two_sequences_share_the_fixed_energy_of_their_steps():
    fleet = Metered(workers=1)
    first, second = fleet.submit("a"), fleet.submit("b")
    for ticket in (first, second):
        fleet.dispatcher.first_token(ticket)
    fleet.clock.now += 1.0
    for ticket in (first, second):
        fleet.dispatcher.finish(ticket)
    fleet.draw(first.worker.name, 500.0)
    fleet.read()
    ledger = fleet.dispatcher.energy.ledger
    assert ledger is not None
    step = {tenant: joules for _, tenant, _, kind, joules in ledger.rows() if kind == "step"}
    assert step["a"] == pytest.approx(step["b"])


def test_a_decision_says_what_the_request_took():
    fleet = Metered(workers=1)
    ticket = fleet.submit("a", stream=False)
    fleet.clock.now += 1.0
    fleet.dispatcher.first_token(ticket)
    told = fleet.dispatcher.joules_so_far(ticket, 50)
    fleet.dispatcher.finish(ticket, output_tokens=50)
    record = fleet.dispatcher.decisions.get(ticket.id)
    assert record is not None and told is not None and told > 0
    assert record["outcome"]["joules"] == pytest.approx(told)


def test_tenants_beyond_the_bound_share_an_account():
    fleet = Metered(workers=1)
    for number in range(MAX_ACCOUNTS + 20):
        ticket = fleet.submit(f"tenant-{number}", 10)
        fleet.dispatcher.first_token(ticket)
        fleet.dispatcher.finish(ticket, output_tokens=2)
    fleet.clock.now += 1.0
    fleet.draw(ticket.worker.name, 100.0)
    fleet.read()
    ledger = fleet.dispatcher.energy.ledger
    assert ledger is not None
    tenants = {tenant for _, tenant, *_ in ledger.rows()}
    assert OTHER_TENANTS in tenants
    assert len(tenants) <= MAX_ACCOUNTS + 2


def test_without_counters_the_books_go_by_the_model():
    clock = Clock()
    fleet = config(workers=1).model_copy(update={"telemetry": TelemetrySpec()})
    dispatcher = Dispatcher(fleet, clock=clock, rng=random.Random(1), policies=REGISTRY)
    dispatcher.energy_tick()
    clock.now += 60.0
    dispatcher.energy_tick()
    ledger = dispatcher.energy.ledger
    assert ledger is not None
    (worker,) = dispatcher.workers()
    assert list(ledger.rows()) == [(worker.pool, "", "", "idle", pytest.approx(60 * worker.pool_state.cost.idle_watts))]


def test_a_removed_worker_leaves_the_books():
    fleet = Metered(workers=2)
    pool = fleet.dispatcher.pools()[0].name
    fleet.dispatcher.set_endpoints(pool, [WorkerEndpoint("w-new", "http://w-new:80")])
    fleet.clock.now += 2.0
    fleet.dispatcher.energy_tick()
    ledger = fleet.dispatcher.energy.ledger
    assert ledger is not None
    assert [worker.name for worker in ledger.workers()] == []
    fleet.read()
    assert [worker.name for worker in ledger.workers()] == ["w-new"]
