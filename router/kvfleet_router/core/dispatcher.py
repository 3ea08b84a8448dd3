"""The one object the router's io and the simulator talk to: requests in, tickets out, and every event of their lives.

    submit ──► lane (routes.py) ──► place (placement.py) ──► Ticket ──► first_token ──► finish
                  └► Refusal           └► Held, and later      │             ├──► abandon: the client went away
                                                               │             └──► prefilled: go on at a Decode worker
                                          a Ticket or Refusal  └──► retry: the worker failed; choose another

Sans-io: the clock and the random numbers are passed in, nothing blocks, and a callback is only ever called from within a
method the caller called. Accounting is exact: what `submit` adds to a worker, exactly one of finish, abandon and retry
takes off again. Every held request is called back exactly once, unless cancelled.

An answer that does not stream shows no first token until its end. Its decode phase is presumed to begin when predicted, or
when a request sent later to the same worker has its first token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.core.checks import ConfigError, check
from kvfleet_router.core.circuits import Circuits
from kvfleet_router.core.decisions import Decision, DecisionLog, Outcome
from kvfleet_router.core.deferral import Deferral
from kvfleet_router.core.dryrun import DRY_RUN, keeps, told, try_dry, unrecorded
from kvfleet_router.core.energybook import EnergyBook, PoolEnergy
from kvfleet_router.core.exact import ask, counted_tokens, look_up, reason_to_guess
from kvfleet_router.core.hashing import MAX_BLOCKS, block_hashes, seed_of
from kvfleet_router.core.kvevents.view import ModelView
from kvfleet_router.core.learning import learn
from kvfleet_router.core.parse import ParsedRequest
from kvfleet_router.core.placement import OnAssigned, Placement
from kvfleet_router.core.policy import Policy
from kvfleet_router.core.pool import Fleet, Pool
from kvfleet_router.core.powerbudget import configure_budgets
from kvfleet_router.core.replicas import Replicas
from kvfleet_router.core.routes import Lane, Routes
from kvfleet_router.core.savings import Saved
from kvfleet_router.core.telemetry import DeviceReading
from kvfleet_router.core.ticket import CLOSED, PENDING, Arrival, Held, Refusal, Ticket
from kvfleet_router.core.worker import Load, Worker, WorkerEndpoint

__all__ = ["ConfigError", "Dispatcher", "Held", "Load", "Refusal", "Ticket", "Worker", "WorkerEndpoint"]

UNLOADED_FACTOR: Final = 3.0
"""A prompt so long that its prefill alone is near the TTFT SLO is due after this many times its unloaded TTFT."""
HELD_TICK_S: Final = 0.01
"""How often held requests are decided again without an event: backlogs also shrink by time passing."""


NOTHING_HANDED = "no_kv_transfer"
"""A Prefill worker answered without saying where its KV entries are: is its engine started with a KV connector?"""
_CLOSED_REFUSAL = Refusal(
    503, "request_closed", "The request has ended: it cannot be tried again", type="service_unavailable"
)


class Dispatcher:
    def __init__(
        self,
        config: FleetConfig,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        policies: Mapping[str, type[Policy]],
        epoch_s: float = 0.0,
        max_decisions: int = 4096,
    ) -> None:
        """`epoch_s`: what to add to `clock()` for Unix time in decision records."""
        self._clock = clock
        self._registry = policies
        self.decisions = DecisionLog(max_decisions, prefix=f"{rng.getrandbits(32):08x}", epoch_s=epoch_s)
        self._fleet = Fleet()
        self._placement = Placement(self._fleet, rng)
        self.energy = EnergyBook(self._fleet)
        self._circuits = Circuits(self._fleet, rng)
        self.deferral = Deferral(epoch_s)
        self.replicas = Replicas(self._fleet, self._placement, clock)
        self.configure(config)

    # -- configuration and membership -----------------------------------------------------------------------------------

    @property
    def probing(self) -> bool:
        """Ejected workers are asked whether they are well, by whoever sets this and takes `due_probes`."""
        return self._circuits.probing

    @probing.setter
    def probing(self, probing: bool) -> None:
        self._circuits.probing = probing

    def due_probes(self, most: int) -> list[Worker]:
        """Up to `most` ejected workers to be asked now; `probed` has to be called for each."""
        return self._circuits.due_probes(self._clock(), most)

    def probed(self, worker: Worker, healthy: bool | None, told: str) -> None:
        """An ejected worker is well, is not, or (None) cannot say; `told`: in words, for people."""
        now = self._clock()
        self._circuits.probed(worker, now, healthy, told)
        self._placement.pump(worker, now)

    def configure(self, config: FleetConfig) -> None:
        """Take a new configuration; workers keep their state, tickets their policy. Raises ConfigError with nothing changed."""
        check(config, self._registry)
        now = self._clock()
        itl_slos: dict[str, float] = {}
        for policy in config.policies:
            for ref in policy.pools:
                itl_slos[ref.name] = min(policy.itl_slo_s, itl_slos.get(ref.name, policy.itl_slo_s))
        self._block_bytes = min((policy.prefix.block_bytes for policy in config.policies), default=256)
        self._fleet.configure(config.pools, self._block_bytes, itl_slos, now)
        built = [(policy, self._registry[policy.strategy](policy)) for policy in config.policies]
        self._routes = Routes(built, self._fleet)
        self.power_budgets = configure_budgets(config, self._fleet, self._routes.lanes())
        self.energy.configure(config.telemetry)
        self.deferral.configure(config.telemetry, config.routers)
        self._placement.savings.keep(self._fleet.pools.values())
        self._circuits.forget_removed()
        self.config = config
        self.replicas.configure(config.routers)
        self._placement.reroute(self._routes.find, now)
        self.deferral.reroute(self._routes.find, self._placement, now)
        self._placement.pump(None, now)

    def set_endpoints(self, pool: str, endpoints: Sequence[WorkerEndpoint]) -> None:
        """The pool's workers from now on; ValueError with nothing changed where a URL is none. Pools with static `endpoints`
        get them from the configuration itself."""
        now = self._clock()
        self._circuits.forget(self._fleet.set_endpoints(pool, endpoints, now))
        self._placement.pump(None, now)

    # -- what may be asked ----------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Served model and adapter names, pools at zero included; without `*`."""
        return list(self._routes.models)

    def workers(self, pool: str | None = None) -> list[Worker]:
        """The workers now known."""
        if pool is None:
            return self._fleet.workers()
        return list(self._fleet.pools[pool].workers.values()) if pool in self._fleet.pools else []

    def pools(self) -> list[Pool]:
        """The pools now served."""
        return list(self._fleet.pools.values())

    def queue_depths(self) -> dict[tuple[str, str], int]:
        """Held requests by (policy, model), for every model that a policy sends somewhere."""
        queue = self._placement.queue
        return {(lane.config.name, lane.model): queue.waiting(lane) for lane in self._routes.lanes()}

    def pools_to_wake(self) -> list[str]:
        """Pools at zero that requests wait for: where no pool of a lane has a worker, the first that is asleep."""
        found: dict[str, None] = {}
        for lane in self._placement.queue.lanes():
            workers = [worker for pool in lane.pools for worker in pool.workers.values()]
            if not any(worker.assignable for worker in workers):
                found |= dict.fromkeys([pool.name for pool in lane.pools if pool.asleep][:1])
        return list(found)

    def predicted_ttft_s(self, pool: str, cached_share: float) -> float:
        """TTFT of a mean prompt of which this share is cached, if it came to the pool now."""
        return self._fleet.pools[pool].predicted_ttft_s(cached_share, self._clock())

    def pack_target(self, pool: str) -> int:
        """Sequences a worker of the pool should be filled to before another one is used (b*)."""
        return self._fleet.pools[pool].pack_target()

    def packed_sequences(self, pool: str) -> float:
        """What this router has at the pool, in sequences of workers filled to the pack target."""
        return self._fleet.pools[pool].packed_sequences(self._clock())

    def energy_tick(self) -> None:
        """Keep the books of joules; call a few times a second."""
        self.energy.tick(self._clock())

    def measured(self, worker: Worker, devices: Mapping[str, DeviceReading]) -> None:
        """What the worker's devices show now."""
        self.energy.reading(worker, devices, self._clock())

    def energy_states(self) -> list[PoolEnergy]:
        """By pool: where joules come from, whether they steer, and what was learned."""
        now = self._clock()
        return [self.energy.of(pool, now) for pool in self._fleet.pools.values()]

    def savings(self) -> list[Saved]:
        """Joules saved against least_request, by pool."""
        return list(self._placement.savings.of(self.energy.deviation))

    def joules_so_far(self, ticket: Ticket, output_tokens: int | None = None) -> float | None:
        """What the request took until now, `output_tokens` being all it has; None where no books are kept."""
        ledger = ticket.worker.ledger
        if ledger is None or ticket.phase == CLOSED:
            return None
        ticket.worker.catch_up(self._clock())
        joules = ledger.so_far(ticket, output_tokens)
        return None if joules is None else joules + ticket.arrival.decision.joules

    @property
    def indexed_blocks(self) -> int:
        """Distinct blocks in the prefix index."""
        return len(self._fleet.index)

    @property
    def fleet_version(self) -> int:
        """Another number after every change of who the workers are."""
        return self._fleet.version

    def worker(self, name: str) -> Worker | None:
        return self._fleet.by_name().get(name)

    # -- the engine's own word on its cache -----------------------------------------------------------------------------

    def cache_stored(self, worker: Worker, blocks: Sequence[int]) -> None:
        """The engine holds these blocks (first to last of a prompt)."""
        if not worker.removed:
            worker.cache.store(blocks[:MAX_BLOCKS], self._clock())

    def cache_removed(self, worker: Worker, blocks: Sequence[int]) -> None:
        """The engine dropped these blocks."""
        if not worker.removed:
            worker.cache.remove(blocks)

    def cache_cleared(self, worker: Worker) -> None:
        """The engine holds nothing any more, or what it holds is unknown."""
        if not worker.removed:
            worker.cache.clear()

    def use_view(self, pool: str, view: ModelView | None, why: str = "NoTokenizer") -> None:
        """How the caches of the pool's workers are known from now on; none: they are guessed, and `why`."""
        if pool in self._fleet.pools:
            self._fleet.use_view(self._fleet.pools[pool], view, why)

    # -- a request's life -----------------------------------------------------------------------------------------------

    def submit(self, parsed: ParsedRequest, *, request_id: str, on_assigned: OnAssigned) -> Ticket | Refusal | Held:
        """Route a request. Held: `on_assigned` is called once this call has returned, exactly once (unless cancelled). It never
        is for the others."""
        now = self._clock()
        self._catch_up(now)
        lane = self._routes.find(parsed)
        if isinstance(lane, Refusal):
            return lane
        lane.budget.request(now)
        spec = lane.config.defer
        wish_s = self.deferral.wish_s(spec, parsed)
        if isinstance(wish_s, Refusal):
            return wish_s
        body_bytes = len(parsed.body)
        arrival = self._arrival(parsed, request_id, lane, now)
        if spec is not None and wish_s:
            held = Held(arrival, on_assigned, now, now + wish_s, 0.0)
            if self.deferral.keep(held, spec, body_bytes):
                return held
        return self._placement.place(arrival, on_assigned, now)

    def dry_run(self, parsed: ParsedRequest) -> dict[str, Any]:
        """What would be done with the request now, as a decision's record with `would` and `why`. Nothing changes."""
        now = self._clock()
        self._catch_up(now)
        decision = unrecorded(now)
        lane = self._routes.find(parsed)
        if isinstance(lane, Refusal):
            decision.model, verdict = parsed.model, ("refuse", lane.message)
        else:
            body_bytes, wish_s = len(parsed.body), self.deferral.wish_s(lane.config.defer, parsed)
            verdict = try_dry(self._placement, self._arrival(parsed, DRY_RUN, lane, now, decision), now)
            if isinstance(wish_s, Refusal):
                verdict = ("refuse", wish_s.message)
            elif self.deferral.would_keep(lane, wish_s, body_bytes, now, self._placement.queue):
                verdict = keeps(wish_s)
        return told(self.decisions.render(decision), verdict)

    def cancel(self, held: Held) -> None:
        """The client went away while queued. `on_assigned` will not be called."""
        if held.waiting:
            if held.deferred:
                self.deferral.remove(held, "cancelled")
                held.waiting = False
            else:
                self._placement.queue.remove(held)
            held.arrival.decision.outcome = Outcome(self._clock(), "abandoned", "while queued")

    def first_token(self, ticket: Ticket) -> None:
        """The first body byte of the answer came."""
        now = self._clock()
        if ticket.phase == CLOSED:
            return
        if ticket.first_token_at is None:
            ticket.first_token_at = now
        if ticket.phase == PENDING:
            worker = ticket.worker
            for earlier in worker.earlier_presumable(ticket):
                worker.first_token(earlier, now, presumed=True)
            worker.first_token(ticket, now, presumed=not ticket.parsed.stream)
            self._circuits.answered(worker, whole=False)
            self._placement.pump(worker, now)

    def finish(
        self,
        ticket: Ticket,
        *,
        output_tokens: int | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        ok: bool = True,
    ) -> None:
        """The answer ended. Idempotent. ok=False: the worker failed (counts for its circuit breaker)."""
        if ticket.phase == CLOSED:
            return
        now = self._clock()
        if output_tokens is not None and ticket.worker.ledger is not None:
            ticket.worker.catch_up(now)
            ticket.worker.ledger.so_far(ticket, output_tokens)
        self._release(ticket, now)
        if ok:
            learn(ticket, output_tokens, prompt_tokens, cached_tokens, now)
            self._circuits.answered(ticket.worker)
        else:
            self._circuits.failed(ticket.worker, now, ticket.policy.resilience)
        ticket.arrival.decision.outcome = Outcome(
            now, "ok" if ok else "failed", "", ticket.first_token_at, prompt_tokens, cached_tokens, output_tokens
        )
        self._placement.pump(ticket.worker, now)

    def abandon(self, ticket: Ticket, cause: str) -> None:
        """The client went away. Idempotent; not the worker's fault."""
        if ticket.phase != CLOSED:
            now = self._clock()
            self._release(ticket, now)
            ticket.arrival.decision.outcome = Outcome(now, "abandoned", cause, ticket.first_token_at)
            self._placement.pump(ticket.worker, now)

    def may_retry(self, ticket: Ticket) -> bool:
        """Whether the policy's retry budget allows another try of the request."""
        return ticket.arrival.lane.budget.allows(self._clock())

    def retry(self, ticket: Ticket, cause: str, on_assigned: OnAssigned) -> Ticket | Refusal | Held:
        """The worker failed: release the ticket, count the failure, choose another worker (for the rest, where the answer had
        begun)."""
        if ticket.phase == CLOSED:
            return _CLOSED_REFUSAL
        now = self._clock()
        self._catch_up(now)
        arrival = ticket.arrival
        self._release(ticket, now)
        self._circuits.failed(ticket.worker, now, ticket.policy.resilience)
        arrival.decision.causes += (cause,)
        arrival.attempt += 1
        arrival.received_tokens = 0.0  # whether it can be fetched once more, nobody knows
        arrival.excluded = (*arrival.excluded, ticket.worker.name)
        arrival.resumed = arrival.resumed or (ticket.parsed.stream and ticket.first_token_at is not None)
        arrival.lane.budget.retry()
        lane = self._routes.find(arrival.parsed)
        if arrival.attempt > ticket.policy.resilience.retries:
            message = f"The request failed on {arrival.attempt} workers, at last with: {cause}"
            lane = Refusal(503, "worker_failed", message, retry_after_s=1, type="service_unavailable")
        self._placement.pump(ticket.worker, now)
        if isinstance(lane, Refusal):
            arrival.decision.outcome = Outcome(now, "refused", lane.code)
            return lane
        arrival.lane = lane
        return self._placement.place(arrival, on_assigned, now)

    def prefilled(
        self,
        ticket: Ticket,
        on_assigned: OnAssigned,
        *,
        handed: bool,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
    ) -> Ticket | Refusal | Held:
        """A worker that `hands_on` has answered: choose who decodes. Not `handed`: whoever does computes the prompt again."""
        if ticket.phase == CLOSED:
            return _CLOSED_REFUSAL
        now = self._clock()
        self._catch_up(now)
        arrival, worker = ticket.arrival, ticket.worker
        ticket.first_token_at = now
        worker.first_token(ticket, now, presumed=False)
        self._release(ticket, now)
        learn(ticket, None, prompt_tokens, cached_tokens, now)
        self._circuits.answered(worker)
        arrival.decision.causes += ("" if handed else NOTHING_HANDED,)
        arrival.received_tokens = arrival.prompt_tokens - 1.0 if handed else 0.0
        arrival.whole = not handed
        lane = self._routes.find(arrival.parsed)
        self._placement.pump(worker, now)
        if isinstance(lane, Refusal):
            self._placement.record_refusal(arrival, lane, now)
            return lane
        arrival.lane = lane
        return self._placement.place(arrival, on_assigned, now)

    def hedge(self, ticket: Ticket) -> Ticket | None:
        """A second try of a request that waits for its first byte, on another worker; None: there is none to be had now. One of
        the two is given up by `outrun` as soon as the other answers."""
        now = self._clock()
        arrival = ticket.arrival
        if ticket.phase == CLOSED or not arrival.lane.budget.allows(now):
            return None
        self._catch_up(now)
        excluded = arrival.excluded
        arrival.excluded = (*excluded, ticket.worker.name)
        second = self._placement.again(arrival, now)
        arrival.excluded = excluded
        if second is not None:
            arrival.lane.budget.retry()
        return second

    def outrun(self, ticket: Ticket, cause: str, *, failed: bool = False) -> None:
        """Of two tries of a request this one is given up and the other goes on. Idempotent. `failed`: by the worker's fault."""
        if ticket.phase == CLOSED:
            return
        now = self._clock()
        decision, worker = ticket.arrival.decision, ticket.worker
        self._release(ticket, now)
        if failed:
            self._circuits.failed(worker, now, ticket.policy.resilience)
        given_up = len(decision.causes)  # tries that are given up stand before the one that counts, as their causes do
        tries = list(decision.tries)
        at = next(i for i in range(given_up, len(tries)) if tries[i].worker == worker.name)
        tries.insert(given_up, tries.pop(at))
        decision.tries = tuple(tries)
        decision.causes += (cause,)
        self._placement.pump(worker, now)

    def tick(self) -> float | None:
        """Queue timeouts, circuit breakers, held requests again. Returns seconds until it wants to be called again, or None."""
        now = self._clock()
        self._catch_up(now)
        placement = self._placement
        placement.expire(now)
        for held in self.deferral.ready(now, placement.queue):
            placement.start(held, now)
        placement.pump(None, now)
        wanted = self._circuits.trials()
        wanted += [
            placement.next_presumed(),
            placement.queue.next_expiry(),
            self.deferral.next_look(now),
            now + HELD_TICK_S if placement.queue else None,
        ]
        times = [time for time in wanted if time is not None]
        return max(min(times) - now, 0.0) if times else None

    def drain(self) -> None:
        """The router leaves: nobody is kept for a cheaper time any more."""
        self.deferral.draining = True
        self.tick()

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _arrival(
        self, parsed: ParsedRequest, request_id: str, lane: Lane, now: float, decision: Decision | None = None
    ) -> Arrival:
        policy, config = lane.policy, lane.config
        tokens = Routes.prompt_tokens(parsed, lane)
        blocks: list[int] = []
        if lane.uses_prefix:
            if parsed.block_hashes is None:
                seed = seed_of(parsed.model, parsed.cache_salt, self._block_bytes)
                parsed.block_hashes = block_hashes(parsed.prompt, seed=seed, block_bytes=self._block_bytes)
            blocks = parsed.block_hashes[:MAX_BLOCKS]
        asked = ask(lane, parsed) if self._fleet.views and lane.asks_views else ()
        why_guessed = "" if asked else reason_to_guess(lane)
        parsed.prompt = parsed.body = b""
        decision = decision or self.decisions.open(request_id, now)
        decision.model = lane.model if lane.model == parsed.model else parsed.model  # one text for all its requests
        decision.policy, decision.strategy = config.name, config.strategy
        decision.tenant = parsed.tenant
        decision.parts, decision.prompt_tokens = policy.parts, tokens
        decision.why_guessed = why_guessed
        outputs = lane.pools[0].stats.outputs
        decision.expected_output_tokens = outputs.expect(parsed.tenant, parsed.max_output_tokens)
        arrival = Arrival(
            parsed,
            request_id,
            lane,
            now,
            deadline=now + max(lane.ttft_slo_s, UNLOADED_FACTOR * lane.unloaded_ttft_s(tokens)),
            prompt_tokens=tokens,
            expected_output_tokens=decision.expected_output_tokens,
            block_tokens=self._block_bytes * tokens / parsed.prompt_bytes if parsed.prompt_bytes else 0.0,
            outputs=outputs,
            blocks=blocks,
            decision=decision,
        )
        if asked:
            arrival.asked = asked
            look_up(arrival, now)
            arrival.prompt_tokens = decision.prompt_tokens = counted_tokens(arrival)
        return arrival

    def _release(self, ticket: Ticket, now: float) -> None:
        """Take off what `submit` added. A prompt without a first token was not computed: its blocks are not cached."""
        never_computed = ticket.phase == PENDING
        worker = ticket.worker
        worker.cache.unpin(
            ticket.pinned, ticket.pin_epoch, forget_from=ticket.new_from_block if never_computed else None
        )
        worker.left(ticket, now)

    def _catch_up(self, now: float) -> None:
        """What happened by time alone: presumed first tokens, loads, probations."""
        self._placement.presume(now)
        self._fleet.refresh_loads(now)
        self._circuits.catch_up(now)
