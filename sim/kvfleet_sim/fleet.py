"""A fleet in virtual time: one engine a worker, and in front of them the router's own core. Deterministic by seed.

What decides here is what decides in production: the same Dispatcher with its policies, prefix index, predictor and held
requests. Simulated are the engines, the clients and the clock; the network takes no time.

One heap of events moves the clock: requests due, ticks that a router with held requests wants, and for every engine the
next time something of it can become visible. An engine is run up to that time and no further, steps that only decode are
taken together, and nothing is done per token. So a decision sees exactly what has happened by then, and nothing later.

A prompt computed apart (Prefill and Decode pools) travels to its Decode worker in as long as its KV entries take.

At equal times engines report first, then requests arrive, then routers tick, then they tell each other, then workers come
and go (elastic.py).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heapify, heappop, heappush
from statistics import fmean
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfleet_api.fleetconfig import FleetConfig, PoolConfig
from kvfleet_router.core.deferral import DEFER_HEADER
from kvfleet_router.core.dispatcher import HELD_TICK_S, Dispatcher, Held, Refusal, Ticket, WorkerEndpoint
from kvfleet_router.core.parse import ParsedRequest
from kvfleet_router.core.sharing import Sharing
from kvfleet_router.policies import REGISTRY
from kvfleet_sim.elastic import Elastic
from kvfleet_sim.engine import Engine
from kvfleet_sim.machines import Machine, Power
from kvfleet_sim.request import Request, StepResult
from kvfleet_sim.shifts import Shifts
from kvfleet_sim.traces import BYTES_PER_TOKEN
from kvfleet_sim.variants import as_believed, uses_events
from kvfleet_sim.workload import LoadRequest

ENGINE, ARRIVAL, TICK, SHARE, TRANSFERRED, BEGAN, SCALE, TOLD, HOUR = range(9)
HOUR_S: Final = 3600.0
PROGRESS_EVERY: Final = 64
"""Requests between two reports of progress."""
TRANSFER_S_PER_TOKEN: Final = 5e-6
"""KV entries from one worker to another: 128 KB a token (8B models) at 25 GB/s."""
TOO_LONG: Final = "too_long"
"""The engine's answer (400) to a request that its context or KV cache cannot hold."""

NO_HEADERS: Mapping[bytes, bytes] = MappingProxyType({})

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Options:
    """How the simulated fleet differs from the one configured."""

    replicas: int = 1
    """Routers in front of the workers; each knows what it sent itself."""
    share_s: float | None = None
    """How often routers tell each other what changed at them; none: never."""
    kv_events: bool | None = None
    """Whether engines tell the routers what they cache; none: as the configuration says."""
    event_delay_s: float = 0.0
    """How long what engines tell is on its way."""
    calibration_error: float = 1.0
    """Factor by which routers believe prefill to be slower, and decoding to be faster, than it is."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of every request, by its number in the load. Times in seconds; NaN where it failed."""

    sent_s: Array
    """When it came."""
    ttft_s: Array
    """From then on; from when it was no longer kept for a cheaper time."""
    itl_s: Array
    """Mean time between its tokens; 0 for a single one."""
    prompt_tokens: Array
    cached_tokens: Array
    output_tokens: Array
    finish_s: Array
    joules: float
    """Of all workers, from the start to the last answer, idling included."""
    failures: Counter[str]
    requests_by_worker: Counter[str]
    worker_seconds: float = 0.0
    """Of all workers together, while they were on, starting or leaving."""
    worker_share: float = 1.0
    """`worker_seconds` by what they would be if all were on."""
    starts: int = 0
    """Workers started while the fleet ran."""
    expected_tokens: Array = field(default_factory=lambda: np.empty(0))
    """Prompt tokens that the router expected to be cached."""
    deferred_s: Array = field(default_factory=lambda: np.empty(0))
    """How long it was kept for a cheaper time."""
    joules_by_hour: Array = field(default_factory=lambda: np.empty(0))
    """`joules`, by hour from the start."""

    @property
    def completed(self) -> npt.NDArray[np.bool_]:
        return ~np.isnan(self.finish_s)


@dataclass(slots=True, eq=False)
class _Flight:
    """A request on its way."""

    number: int
    router: int
    load: LoadRequest
    sent_s: float
    ticket: Ticket | None = None
    first_token_s: float | None = None
    deferred_s: float = 0.0
    """How long the router kept it for a cheaper time."""
    cached_tokens: int | None = None
    """Prompt tokens that the Prefill worker found cached."""


def simulate(
    config: FleetConfig,
    load: Sequence[LoadRequest],
    *,
    model: str,
    block_tokens: int,
    seed: int = 0,
    options: Options = Options(),
    elastic: Elastic | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Run:
    """Send `load` to the fleet (its pools' `endpoints`) and run it to the last answer.

    `block_tokens`: what a block key of the load stands for; engines and prefix index count in these blocks. `elastic`: how
    workers come and go; none: all are on all the time.
    """
    return _Simulation(config, load, model, block_tokens, seed, options, elastic, on_progress).run()


class _Simulation:
    def __init__(
        self,
        config: FleetConfig,
        load: Sequence[LoadRequest],
        model: str,
        block_tokens: int,
        seed: int,
        options: Options,
        elastic: Elastic | None,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._load = load
        self._model = model
        self._on_progress = on_progress
        self._now_s = 0.0
        self._kv_events = uses_events(config) if options.kv_events is None else options.kv_events
        self._elastic = elastic
        self._workers = [
            Machine(
                WorkerEndpoint(endpoint.name, endpoint.url),
                pool,
                partial(self._engine, pool, block_tokens),
                elastic.off_watts if elastic is not None else 0.0,
            )
            for pool in config.pools
            for endpoint in pool.endpoints
        ]
        self._by_name = {worker.name: worker for worker in self._workers}
        self._numbers = {worker.name: number for number, worker in enumerate(self._workers)}
        believed = as_believed(config, block_tokens, options.calibration_error, options.replicas)
        self._routers = [
            Dispatcher(
                believed,
                clock=lambda: self._now_s,
                rng=random.Random(f"{seed}/{replica}"),
                policies=REGISTRY,
                max_decisions=1,
            )
            for replica in range(options.replicas)
        ]
        self._shifts = Shifts(self._workers, self._routers)
        self._sharing = [
            Sharing(router, clock=lambda: self._now_s, identity=number)
            for number, router in enumerate(self._routers, 1)
            if options.share_s is not None and options.replicas > 1
        ]
        self._ticking = [False] * options.replicas
        draw = random.Random(f"{seed}/clients")
        self._router_of = [draw.randrange(options.replicas) for _ in load]
        self._outgoing: list[tuple[Machine, _Flight]] = []
        self._event_delay_s = options.event_delay_s
        self._untold: dict[int, tuple[Machine, StepResult]] = {}
        self._reports = 0
        self._travelling: dict[int, tuple[Machine, _Flight]] = {}
        self._events = [
            (request.start_s, ARRIVAL, number) for number, request in enumerate(load) if request.start_s is not None
        ]
        self._share_s = options.share_s
        if self._sharing:
            self._events.append((0.0, SHARE, 0))
        if elastic is not None:
            self._events.append((elastic.controller.period_s, SCALE, 0))
        self._events.append((HOUR_S, HOUR, 0))
        self._joules_at_hours = [0.0]
        heapify(self._events)
        self._results = np.full((8, len(load)), np.nan)
        self._failures: Counter[str] = Counter()
        self._served: Counter[str] = Counter()
        self._ended = 0

    def _engine(self, pool: PoolConfig, block_tokens: int, start_s: float) -> Engine:
        return Engine(pool.cost, block_tokens=block_tokens, record_events=self._kv_events, start_s=start_s)

    def run(self) -> Run:
        events = self._events
        while events:
            time_s, kind, number = heappop(events)
            if kind == ENGINE:
                worker = self._workers[number]
                if worker.due_s != time_s:
                    continue  # it was rescheduled
                self._now_s = time_s
                self._advance(worker)
                self._schedule(worker)
            elif kind == ARRIVAL:
                self._now_s = time_s
                self._arrive(number)
            elif kind == TICK:
                self._now_s = time_s
                self._tick(number)
            elif kind == TOLD:
                self._now_s = time_s
                self._tell_cache(*self._untold.pop(number))
            elif kind == TRANSFERRED:
                self._now_s = time_s
                self._outgoing.append(self._travelling.pop(number))
            elif self._ended < len(self._load):
                self._now_s = time_s
                if kind == SHARE:
                    self._share()
                elif kind == HOUR:
                    self._joules_at_hours.append(self._joules())
                    heappush(events, (time_s + HOUR_S, HOUR, 0))
                elif kind == SCALE:
                    self._scale()
                else:
                    self._shifts.began(self._workers[number], time_s)
            while self._outgoing:
                self._deliver(*self._outgoing.pop())
        if self._ended != len(self._load):
            raise RuntimeError(f"{len(self._load) - self._ended} requests neither completed nor failed")
        sent_s, ttft_s, itl_s, cached, output, finish_s, expected, deferred_s = self._results
        joules = self._joules()
        return Run(
            sent_s=sent_s,
            ttft_s=ttft_s,
            deferred_s=deferred_s,
            itl_s=itl_s,
            prompt_tokens=np.array([request.prompt_tokens for request in self._load], dtype=np.float64),
            cached_tokens=cached,
            expected_tokens=expected,
            output_tokens=output,
            finish_s=finish_s,
            joules=joules,
            joules_by_hour=np.diff([*self._joules_at_hours, joules]),
            worker_seconds=sum(worker.seconds_at(self._now_s) for worker in self._workers),
            worker_share=fmean(worker.seconds_at(self._now_s) for worker in self._workers) / (self._now_s or 1.0),
            starts=sum(worker.starts for worker in self._workers),
            failures=self._failures,
            requests_by_worker=self._served,
        )

    def _joules(self) -> float:
        """Of all workers until now."""
        return sum(worker.joules_at(self._now_s) for worker in self._workers)

    # -- events ---------------------------------------------------------------------------------------------------------

    def _arrive(self, number: int) -> None:
        request, router = self._load[number], self._router_of[number]
        flight = _Flight(number, router, request, self._now_s)
        self._results[0, number] = self._now_s
        parsed = ParsedRequest(
            "completions",
            self._model,
            stream=True,
            prompt_bytes=request.prompt_tokens * BYTES_PER_TOKEN,
            prompt_tokens=request.prompt_tokens,
            block_hashes=list(request.block_keys),
            headers={DEFER_HEADER: b"%d" % request.defer_s} if request.defer_s else NO_HEADERS,
        )
        assigned = partial(self._assigned, flight)
        answer = self._routers[router].submit(parsed, request_id=str(number), on_assigned=assigned)
        if not isinstance(answer, Held):
            assigned(answer)
        else:
            self._want_tick(router)

    def _assigned(self, flight: _Flight, answer: Ticket | Refusal) -> None:
        if isinstance(answer, Refusal):
            self._failed(flight, answer.code)
            return
        worker = self._by_name[answer.worker.name]
        flight.ticket = answer
        flight.deferred_s = answer.arrival.decision.deferred_s
        self._shifts.sent(answer)
        if flight.load.prompt_tokens + flight.load.output_tokens > worker.longest_tokens:
            self._routers[flight.router].abandon(answer, TOO_LONG)
            self._failed(flight, TOO_LONG)
        elif answer.arrival.received_tokens:
            self._travelling[flight.number] = (worker, flight)
            arrives_s = self._now_s + TRANSFER_S_PER_TOKEN * flight.load.prompt_tokens
            heappush(self._events, (arrives_s, TRANSFERRED, flight.number))
        else:
            self._outgoing.append((worker, flight))

    def _want_tick(self, router: int) -> None:
        """The router holds requests."""
        if not self._ticking[router]:
            self._ticking[router] = True
            heappush(self._events, (self._now_s + HELD_TICK_S, TICK, router))

    def _tick(self, router: int) -> None:
        wanted_s = self._routers[router].tick()
        self._ticking[router] = wanted_s is not None
        if wanted_s is not None:
            heappush(self._events, (self._now_s + max(wanted_s, 0.001), TICK, router))

    def _share(self) -> None:
        """Every router tells all others what changed at it, in the messages it would send."""
        told = [message for sharing in self._sharing for message in sharing.flush()]
        if told:
            for router, sharing in zip(self._routers, self._sharing, strict=True):
                for message in told:
                    sharing.hear(message)
                sharing.apply()
                router.replicas.heard = sharing.peers
        assert self._share_s is not None
        heappush(self._events, (self._now_s + self._share_s, SHARE, 0))

    def _deliver(self, worker: Machine, flight: _Flight) -> None:
        """The request reaches its engine, which is first brought to this moment."""
        self._advance(worker)
        load, ticket = flight.load, flight.ticket
        assert ticket is not None
        request = Request(
            flight.number,
            load.prompt_tokens,
            1 if ticket.hands_on else load.output_tokens,
            load.block_keys,
            remote_tokens=load.prompt_tokens if ticket.arrival.received_tokens else 0,
            payload=flight,
        )
        worker.engine.submit(request, self._now_s)
        self._served[worker.name] += 1
        self._schedule(worker)

    # -- engines --------------------------------------------------------------------------------------------------------

    def _schedule(self, worker: Machine) -> None:
        due_s = worker.engine.next_event_s()
        if due_s != worker.due_s:
            worker.due_s = due_s
            if due_s < math.inf:
                heappush(self._events, (due_s, ENGINE, self._numbers[worker.name]))

    def _advance(self, worker: Machine) -> None:
        """Run the engine up to now, and tell the routers what became visible."""
        for result in worker.engine.advance(self._now_s):
            if result.kv_batches:
                self._report_cache(worker, result)
            for request in result.prefilled:
                self._first_token(request, result.end_s)
            for request in result.finished:
                self._finished(request, result.end_s)
        worker.due_s = math.nan  # whatever was scheduled is done
        if worker.power is Power.LEAVING and not worker.engine.has_work:
            self._shifts.ended(worker, self._now_s)

    def _first_token(self, request: Request, now_s: float) -> None:
        flight = request.payload
        assert isinstance(flight, _Flight) and flight.ticket is not None
        if flight.ticket.hands_on:
            return  # nothing that the client sees
        if flight.first_token_s is None:  # else it was preempted and resumed
            flight.first_token_s = now_s
            self._routers[flight.router].first_token(flight.ticket)

    def _finished(self, request: Request, now_s: float) -> None:
        flight = request.payload
        assert isinstance(flight, _Flight) and flight.ticket is not None
        if flight.ticket.hands_on:
            self._prefilled(flight, flight.ticket, request)
            return
        assert flight.first_token_s is not None
        self._routers[flight.router].finish(
            flight.ticket,
            output_tokens=request.output_tokens,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=request.cached_tokens + request.received_tokens,
        )
        gaps = max(request.output_tokens - 1, 1)
        self._results[1:, flight.number] = (
            flight.first_token_s - flight.sent_s - flight.deferred_s,
            (now_s - flight.first_token_s) / gaps,
            request.cached_tokens if flight.cached_tokens is None else flight.cached_tokens,
            request.output_tokens,
            now_s,
            flight.ticket.cached_tokens,
            flight.deferred_s,
        )
        self._end(flight)

    def _prefilled(self, flight: _Flight, ticket: Ticket, request: Request) -> None:
        """The prompt is computed: the router says who decodes."""
        flight.cached_tokens = request.cached_tokens
        assigned = partial(self._assigned, flight)
        answer = self._routers[flight.router].prefilled(
            ticket,
            assigned,
            handed=True,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=request.cached_tokens,
        )
        if not isinstance(answer, Held):
            assigned(answer)
        else:
            self._want_tick(flight.router)

    def _report_cache(self, worker: Machine, result: StepResult) -> None:
        if not self._event_delay_s:
            self._tell_cache(worker, result)
            return
        self._reports += 1
        self._untold[self._reports] = (worker, result)
        heappush(self._events, (result.end_s + self._event_delay_s, TOLD, self._reports))

    def _tell_cache(self, worker: Machine, result: StepResult) -> None:
        for router, known in zip(self._routers, self._shifts.known, strict=True):
            told = known[worker.name]
            for batch in result.kv_batches:
                router.cache_removed(told, batch.removed)
                for stored in batch.stored:
                    router.cache_stored(told, stored.keys)

    # -- workers that come and go --------------------------------------------------------------------------------------------

    def _scale(self) -> None:
        """Ask the controller, and do as it says."""
        elastic = self._elastic
        assert elastic is not None
        for machine in self._shifts.step(elastic, self._served, self._now_s):
            heappush(self._events, (machine.begins_s, BEGAN, self._numbers[machine.name]))
        heappush(self._events, (self._now_s + elastic.controller.period_s, SCALE, 0))

    # -- ends -----------------------------------------------------------------------------------------------------------

    def _failed(self, flight: _Flight, code: str) -> None:
        self._failures[code] += 1
        self._end(flight)

    def _end(self, flight: _Flight) -> None:
        """Completed or failed: the client goes on to its next turn."""
        self._ended += 1
        following = flight.load.next_turn
        if following is not None:
            heappush(self._events, (self._now_s + self._load[following].think_s, ARRIVAL, following))
        if self._on_progress is not None and self._ended % PROGRESS_EVERY == 0:
            self._on_progress(PROGRESS_EVERY)
