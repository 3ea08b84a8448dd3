"""Whatever happens in whatever order, no request is lost or answered twice and the accounting stays exact.

The model knows where every request is: live on a worker, held, or over. The dispatcher is driven with every event there is,
callbacks that call it again included, and compared after each.
"""

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from routing_fleet import Fleet, config, cost, policy, pool, request

from kvfleet_api.fleetconfig import WeightedPool
from kvfleet_router.core.dispatcher import Held, Load, Refusal, Ticket, WorkerEndpoint
from kvfleet_router.core.ticket import CLOSED, DECODING, PENDING

SMALL = cost(kv_tokens=20_000, max_sequences=8)
ADMISSIONS = [
    {},
    {"max_in_flight_per_worker": 1, "max_queue": 3, "queue_timeout_seconds": 2},
    {"max_in_flight_per_worker": 2, "max_queue": 0},
]
ENERGY = [{}, {"energy_mode": "Prefer"}, {"energy_mode": "Strict", "max_watts": 900.0}]
STRATEGIES = [
    "kvfleet",
    "kvfleet_latency",
    "least_request",
    "lmetric",
    "power_of_two",
    "random",
    "round_robin",
    "ttft_min",
]


def build(strategy, admission, energy, sleeping):
    pools = [
        pool("near", 0, cost=SMALL, scales_to_zero=sleeping),
        pool("far", 0, cost=SMALL, max_context_tokens=3000, adapters=["lora"]),
    ]
    refs = [WeightedPool(name="near", weight=30), WeightedPool(name="far", tier=1)]
    fields = {"pools": refs, "strategy": strategy, "admission": admission, **energy}
    short = policy("short", models=["m"], context_tokens={"max": 500}, pools=["near"], strategy="least_request")
    return config(short, policy("all", models=["m", "lora"], **fields), pools=pools)


CONFIGS = st.builds(
    build, st.sampled_from(STRATEGIES), st.sampled_from(ADMISSIONS), st.sampled_from(ENERGY), st.booleans()
)
STATES = st.sampled_from(["absent", "ready", "unready", "terminating"])


class DispatcherMachine(RuleBasedStateMachine):
    @initialize(first=CONFIGS)
    def begin(self, first):
        self.fleet = Fleet(first)
        self.live, self.held, self.over = {}, {}, Counter()
        self.hedges = {}
        """Second tries that race with the live ticket of the same request."""
        self.submitted = 0
        self.all_workers = {}
        self.endpoints = {"near": ["ready"] * 2, "far": ["ready"]}
        for name in self.endpoints:
            self.set_endpoints(name)

    # -- what the dispatcher answers, at once or later --------------------------------------------------------------------

    def take(self, request_id, result, on_arrival):
        if isinstance(result, Held):
            assert request_id not in self.held
            self.held[request_id] = result
        elif isinstance(result, Refusal):
            assert result.status in (400, 404, 429, 503)
            assert result.code
            assert result.message
            assert result.retry_after_s is None or result.retry_after_s >= 1
            self.over[request_id] += 1
        else:
            assert isinstance(result, Ticket)
            assert result.request_id == request_id
            assert request_id not in self.live
            self.live[request_id] = result
            self.all_workers[id(result.worker)] = result.worker
            if on_arrival == "fails":
                self.end(result, ok=False)
            elif on_arrival == "leaves":
                self.abandon(result)

    def callback(self, request_id, on_arrival):
        def assigned(result):
            assert request_id in self.held, "called back without waiting, or twice"
            assert not isinstance(result, Held)
            assert not self.held.pop(request_id).waiting
            self.take(request_id, result, on_arrival)

        return assigned

    def end(self, ticket, **report):
        self.settle(ticket)
        del self.live[ticket.request_id]
        self.over[ticket.request_id] += 1
        self.fleet.dispatcher.finish(ticket, **report)

    def abandon(self, ticket):
        self.settle(ticket)
        del self.live[ticket.request_id]
        self.over[ticket.request_id] += 1
        self.fleet.dispatcher.abandon(ticket, "client gone")

    def settle(self, ticket):
        """Whoever ends a request gives up the hedge first."""
        hedge = self.hedges.pop(ticket.request_id, None)
        if hedge is not None:
            self.fleet.dispatcher.outrun(hedge, "outrun")
            self.fleet.dispatcher.outrun(hedge, "again", failed=True)

    # -- events -----------------------------------------------------------------------------------------------------------

    @rule(
        tokens=st.sampled_from([1, 100, 1000, 6000, 25_000]),
        prefix=st.integers(0, 3),
        model=st.sampled_from(["m", "m", "lora", "none"]),
        stream=st.booleans(),
        sequences=st.integers(1, 3),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from(["a", "b"]),
        on_arrival=st.sampled_from(["stays", "stays", "stays", "fails", "leaves"]),
    )
    def submit(self, tokens, prefix, model, stream, sequences, priority, tenant, on_arrival):
        self.submitted += 1
        request_id = f"r{self.submitted}"
        parsed = request(
            tokens, model=model, prefix=prefix, stream=stream, sequences=sequences, priority=priority, tenant=tenant
        )
        callback = self.callback(request_id, on_arrival)
        self.take(
            request_id, self.fleet.dispatcher.submit(parsed, request_id=request_id, on_assigned=callback), on_arrival
        )

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.05, 0.4, 3.0, 70.0]), tick=st.booleans())
    def time_passes(self, seconds, tick):
        self.fleet.now += seconds
        if tick:
            wanted = self.fleet.dispatcher.tick()
            assert wanted is None or wanted >= 0.0
            if self.held:
                assert wanted is not None
                assert wanted < 0.011

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def first_token(self, data):
        ticket = self.pick(data)
        self.fleet.dispatcher.first_token(ticket)
        if ticket.request_id in self.live:  # a callback may have ended it
            assert ticket.phase != PENDING

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ok=st.booleans(), tokens=st.none() | st.integers(0, 500), cached=st.none() | st.just(0))
    def finish(self, data, ok, tokens, cached):
        ticket = self.pick(data)
        ticket.chunks = 40
        self.end(ticket, ok=ok, output_tokens=tokens, prompt_tokens=tokens, cached_tokens=cached)
        self.fleet.dispatcher.finish(ticket, ok=not ok)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def client_leaves(self, data):
        ticket = self.pick(data)
        self.abandon(ticket)
        self.fleet.dispatcher.abandon(ticket, "again")

    @precondition(lambda self: any(ticket.first_token_at is None for ticket in self.live.values()))
    @rule(data=st.data())
    def worker_fails_before_the_first_byte(self, data):
        ticket = self.pick(data, [t for t in self.live.values() if t.first_token_at is None])
        self.settle(ticket)
        del self.live[ticket.request_id]
        request_id = ticket.request_id
        self.take(request_id, self.fleet.dispatcher.retry(ticket, "reset", self.callback(request_id, "stays")), "stays")

    @precondition(lambda self: self.live.keys() - self.hedges.keys())
    @rule(data=st.data())
    def a_second_try_begins(self, data):
        ticket = self.pick(data, [t for name, t in self.live.items() if name not in self.hedges])
        hedge = self.fleet.dispatcher.hedge(ticket)
        if hedge is not None:
            assert hedge.worker is not ticket.worker
            assert hedge.id == ticket.id
            self.hedges[ticket.request_id] = hedge
            self.all_workers[id(hedge.worker)] = hedge.worker

    @precondition(lambda self: self.hedges)
    @rule(data=st.data(), hedge_wins=st.booleans(), failed=st.booleans())
    def one_of_two_tries_is_outrun(self, data, hedge_wins, failed):
        request_id = data.draw(st.sampled_from(sorted(self.hedges)))
        first, hedge = self.live[request_id], self.hedges.pop(request_id)
        winner, loser = (hedge, first) if hedge_wins else (first, hedge)
        self.live[request_id] = winner
        self.fleet.dispatcher.outrun(loser, "outrun", failed=failed)
        decision = self.fleet.dispatcher.decisions.get(winner.id)
        made = decision["tries"]
        assert made[-1]["worker"] == winner.worker.name
        assert [one["given_up"] is None for one in made] == [False] * (len(made) - 1) + [True]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def held_client_leaves(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.held)))
        held = self.held.pop(request_id)
        self.over[request_id] += 1
        self.fleet.dispatcher.cancel(held)
        self.fleet.dispatcher.cancel(held)

    @rule(name=st.sampled_from(["near", "far"]), states=st.lists(STATES, min_size=2, max_size=3))
    def endpoints_change(self, name, states):
        self.endpoints[name] = states
        self.set_endpoints(name)

    def set_endpoints(self, name):
        listed = [
            WorkerEndpoint(f"{name}-{n}", f"http://127.0.0.1:{9000 + n}", state == "ready", state == "terminating")
            for n, state in enumerate(self.endpoints[name])
            if state != "absent"
        ]
        self.fleet.dispatcher.set_endpoints(name, listed)

    @rule(number=st.integers(0, 1), in_flight=st.integers(0, 3))
    def another_replica_tells(self, number, in_flight):
        load = Load(in_flight, in_flight, 0, 0.05 * in_flight, 1000.0 * in_flight, 0.0, 1000.0 * in_flight)
        self.fleet.dispatcher.replicas.told({f"near-{number}": load})

    def others_have_nothing(self):
        self.fleet.dispatcher.replicas.told({worker.name: Load() for worker in self.fleet.dispatcher.workers()})

    @rule(new=CONFIGS)
    def configuration_changes(self, new):
        self.fleet.dispatcher.configure(new)

    def pick(self, data, tickets=None):
        names = sorted(t.request_id for t in (tickets or self.live.values()))
        return self.live[data.draw(st.sampled_from(names))]

    # -- what must hold after each ----------------------------------------------------------------------------------------

    @invariant()
    def every_request_is_in_one_place(self):
        over = set(self.over)
        assert len(self.live) + len(self.held) + len(over) == self.submitted
        assert not over & (self.live.keys() | self.held.keys())
        assert all(count == 1 for count in self.over.values())

    @invariant()
    def workers_count_exactly_what_is_live(self):
        known = {id(worker): worker for worker in self.fleet.dispatcher.workers()} | self.all_workers
        for worker in known.values():
            live = [*self.live.values(), *self.hedges.values()]
            tickets = [ticket for ticket in live if ticket.worker is worker]
            by_phase = Counter()
            for ticket in tickets:
                assert ticket.phase != CLOSED
                by_phase[ticket.phase] += ticket.parsed.sequences
            own, elsewhere = worker.own, worker.elsewhere
            assert own.in_flight == len(tickets)
            assert (own.pending, own.decoding) == (by_phase[PENDING], by_phase[DECODING])
            assert (own.prefill_s > 0) == (by_phase[PENDING] > 0)
            assert own.context_tokens >= 0
            assert own.kv_tokens >= 0
            if not tickets:
                assert own == Load(prefilled_s=own.prefilled_s)  # a counter
            assert worker.in_flight == own.in_flight + elsewhere.in_flight
            assert (worker.backlog_s > 0) == (own.prefill_s + elsewhere.prefill_s > 0)

    @invariant()
    def queue_and_memory_are_bounded(self):
        dispatcher = self.fleet.dispatcher
        depths = dispatcher.queue_depths()
        assert sum(depths.values()) == len(self.held)
        for served in dispatcher.config.policies:
            held = sum(depth for (policy, _), depth in depths.items() if policy == served.name)
            assert held <= served.admission.max_queue
        caches = [worker.cache for worker in dispatcher.workers()]
        assert all(len(cache) <= cache.capacity_blocks for cache in caches)
        assert dispatcher.indexed_blocks <= sum(len(cache) for cache in caches)

    def teardown(self):
        if not hasattr(self, "fleet"):
            return
        self.others_have_nothing()
        while self.live or self.held:
            for ticket in list(self.live.values()):
                if ticket.request_id in self.live:
                    self.end(ticket)
            self.fleet.now += 100.0
            self.fleet.dispatcher.tick()
        self.every_request_is_in_one_place()
        self.workers_count_exactly_what_is_live()
        self.others_have_nothing()
        self.fleet.assert_idle()


DispatcherMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestDispatcherMachine = DispatcherMachine.TestCase
