"""Places arrivals: decide, assign, hold, and decide again when there is room.

A request is held when no worker has room (limits, a pool at zero, the power budget), or when the best worker's backlog is
longer than the policy's θ: then waiting costs nothing and leaves the choice open. Held requests are decided again in their
order (holdqueue.py) whenever an event makes room, and from `Dispatcher.tick`. A newcomer never overtakes its lane's queue.

Callbacks go through an outbox that is emptied once the state is settled; a callback may call the dispatcher again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import ceil
from typing import Final, NamedTuple

from kvfleet_router.core.affinity import PATIENCE_S, Affinity, crowded
from kvfleet_router.core.choose import Choice, choose
from kvfleet_router.core.decisions import MAX_CANDIDATES, Outcome, Scores, Try
from kvfleet_router.core.disaggregation import divisible
from kvfleet_router.core.energy import marginal_joules
from kvfleet_router.core.exact import note
from kvfleet_router.core.holdqueue import HoldQueue
from kvfleet_router.core.parse import ParsedRequest
from kvfleet_router.core.pool import Fleet
from kvfleet_router.core.powerbudget import PowerBudget, affordable, named
from kvfleet_router.core.predict import backlog_s, ttft_parts
from kvfleet_router.core.routes import Candidates, Lane
from kvfleet_router.core.savings import Savings
from kvfleet_router.core.ticket import PENDING, Arrival, Held, Refusal, Ticket
from kvfleet_router.core.worker import Worker

OnAssigned = Callable[[Ticket | Refusal], None]

Placed = tuple[Worker, list[int], int]
"""(worker, a prompt's blocks, the first of them that is new to the worker)"""

TRIES_PER_PUMP: Final = 8
"""Held requests of a lane decided again at one event: bounds the work."""
LEAST_PRESUMABLE: Final = 32
RESCAN_S: Final = 0.002
"""Pause after deciding in vain: where each of them waits for a busy worker, not every event changes that."""
RETRY_AFTER_BOUNDS_S = (1, 60)


class Waits(NamedTuple):
    """Not decided: the request stays at the router."""

    own_s: float
    """Its own prefill time on the worker it would have got."""
    short: tuple[PowerBudget, ...] = ()
    """Power budgets that would be exceeded."""


NO_ROOM = Waits(0.0)
"""No worker may have it at all, for now."""


class Placement:
    """Where arrivals go, and who waits."""

    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self.queue = HoldQueue()
        self.placed: list[Placed] | None = None
        """Prompts that brought a worker new blocks, for the other replicas of the router; none: there are none."""
        self.near = 0.0
        """See `choose`."""
        self.power_share = 1.0
        """This router's part of power budgets, above what idle workers draw."""
        self.savings = Savings()
        self._affinity = Affinity()
        self._fleet = fleet
        self._rng = rng
        self._outbox: deque[tuple[Held, Ticket | Refusal]] = deque()
        self._delivering = False
        self._presumable: list[tuple[float, int, Ticket]] = []
        self._presumable_limit = LEAST_PRESUMABLE
        self._assigned = 0
        self._assigned_at = 0.0
        self._interval_s = 0.1

    # -- in ---------------------------------------------------------------------------------------------------------------

    def place(self, arrival: Arrival, on_assigned: OnAssigned, now: float) -> Ticket | Refusal | Held:
        """A worker now, a place in the queue, or neither."""
        lane = arrival.lane
        if not self.queue.waiting(lane):
            decided = self._decide(arrival, now)
            result = self._hold(arrival, on_assigned, decided.own_s, now) if isinstance(decided, Waits) else decided
        else:
            result = self._queue_up(arrival, on_assigned, now)
        if self._outbox:
            if isinstance(result, Held):
                return self._deliver_first(result)
            self.deliver()
        return result

    def again(self, arrival: Arrival, now: float) -> Ticket | None:
        """Another worker for a request that is under way already: at once, or not at all."""
        lane = arrival.lane
        if self.queue.waiting(lane) or lane.prefill_pools or lane.power_budgets:
            return None
        candidates = lane.candidates(arrival, self._rng)
        if candidates is None:
            return None
        choice = choose(arrival, candidates, self._fleet.index, self._fleet.table, self._rng, now)
        predicted_s = sum(ttft_parts(arrival, choice.worker, choice.cached_tokens, now))
        return self._assign(arrival, choice, predicted_s, now, hands_on=False)

    def _queue_up(self, arrival: Arrival, on_assigned: OnAssigned, now: float) -> Ticket | Refusal | Held:
        """Others of the lane wait already: behind them, then whoever can go goes."""
        held = self._hold(arrival, on_assigned, 0.0, now)
        answer: Ticket | Refusal | Held = held
        for other, result in self._decide_held(arrival.lane, now):
            if other is held:
                answer = result
            else:
                self._outbox.append((other, result))
        return answer

    def _deliver_first(self, held: Held) -> Ticket | Refusal | Held:
        """Call others back before the caller knows that this one is held: what that means for it is the caller's answer."""
        answers: list[Ticket | Refusal] = []
        on_assigned, held.on_assigned = held.on_assigned, answers.append
        try:
            self.deliver()
        finally:
            held.on_assigned = on_assigned
        return answers[0] if answers else held

    def reroute(self, find: Callable[[ParsedRequest], Lane | Refusal], now: float) -> None:
        """The configuration changed: those who wait move to the lane that takes them now."""
        for held in self.queue.drain():
            lane = find(held.arrival.parsed)
            if isinstance(lane, Refusal):
                self.dismiss(held, lane, now)
                continue
            held.arrival.lane = lane
            leaver = self.queue.add(held)
            if leaver is not None:
                self.dismiss(leaver, self._overloaded(leaver.arrival), now)

    def start(self, held: Held, now: float) -> None:
        """A request that was kept for a cheaper time goes as one that comes now; `deliver` calls back."""
        arrival = held.arrival
        lane = arrival.lane
        arrival.deadline += now - arrival.arrived_at
        arrival.arrived_at = now
        if not self.queue.waiting(lane):
            decided = self._decide(arrival, now)
            if not isinstance(decided, Waits):
                held.waiting = False
                self._outbox.append((held, decided))
                return
            held.own_s = decided.own_s
        held.held_since = now
        held.expires_at = now + lane.config.admission.queue_timeout_seconds
        leaver = self.queue.add(held)
        if leaver is not None:
            self.dismiss(leaver, self._overloaded(leaver.arrival), now)

    def dismiss(self, held: Held, refusal: Refusal, now: float) -> None:
        """Refuse a request that waited and is out of the queue."""
        held.waiting = False
        self.record_refusal(held.arrival, refusal, now)
        self._outbox.append((held, refusal))

    def expire(self, now: float) -> None:
        """Refuse whoever waited too long."""
        for held in self.queue.expired(now):
            self.queue.remove(held)
            message = f"No worker had room within {now - held.held_since:.0f} s"
            short = [budget for budget in held.arrival.lane.power_budgets if budget.claimed_since(now - 1.0)]
            if short:
                message = f"{message}: the power budget of {named(short)} was used up; raise maxWatts, or send less"
            self.dismiss(
                held, Refusal(503, "queue_timeout", message, self._retry_after_s(), "service_unavailable"), now
            )

    # -- again ------------------------------------------------------------------------------------------------------------

    def pump(self, worker: Worker | None, now: float) -> None:
        """Something made room, on this worker or anywhere: decide held requests again, then call back."""
        if self.queue:
            for lane in self.queue.lanes():
                # What ends anywhere may leave power to anybody.
                pool = None if worker is None or lane.power_budgets else worker.pool_state
                if pool is None or pool in lane.pools or pool in lane.prefill_pools:
                    for held, result in self._decide_held(lane, now):
                        self._outbox.append((held, result))
        self.deliver()

    def deliver(self) -> None:
        """Call back, once the state is settled. A callback may end up here again: this loop takes its results too."""
        if self._delivering or not self._outbox:
            return
        self._delivering = True
        try:
            while self._outbox:
                held, result = self._outbox.popleft()
                held.on_assigned(result)
        finally:
            self._delivering = False

    def presume(self, now: float) -> None:
        """Answers that do not stream: those whose first token is due have it."""
        while self._presumable and self._presumable[0][0] <= now:
            ticket = heappop(self._presumable)[2]
            if ticket.phase == PENDING:
                ticket.worker.first_token(ticket, now, presumed=True)

    def _presume_at(self, at: float, ticket: Ticket) -> None:
        """Those that ended before are thrown out now and then: each holds its prompt's blocks."""
        heappush(self._presumable, (at, self._assigned, ticket))
        if len(self._presumable) >= self._presumable_limit:
            self._presumable = [entry for entry in self._presumable if entry[2].phase == PENDING]
            heapify(self._presumable)
            self._presumable_limit = max(2 * len(self._presumable), LEAST_PRESUMABLE)

    def next_presumed(self) -> float | None:
        return self._presumable[0][0] if self._presumable else None

    def record_refusal(self, arrival: Arrival, refusal: Refusal, now: float) -> None:
        arrival.decision.outcome = Outcome(now, "refused", refusal.code)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _decide(self, arrival: Arrival, now: float) -> Ticket | Refusal | Waits:
        picked = self.pick(arrival, now)
        if isinstance(picked, Refusal):
            self.record_refusal(arrival, picked, now)
            return picked
        if isinstance(picked, Waits):
            for budget in picked.short:
                budget.claim(arrival.parsed.priority, now)
            return picked
        scored, choice, hands_on = picked
        backlog, own, step, kv_wait = ttft_parts(scored, choice.worker, choice.cached_tokens, now)
        if self.would_hold(arrival, backlog):
            return Waits(own)
        return self._assign(arrival, choice, backlog + own + step + kv_wait, now, hands_on=hands_on)

    @staticmethod
    def would_hold(arrival: Arrival, backlog_s: float) -> bool:
        """Whether it waits at the router while the worker chosen has this backlog."""
        limit = arrival.lane.policy.hold_above_s
        return limit is not None and backlog_s > limit and arrival.lane.config.admission.max_queue > 0

    def pick(self, arrival: Arrival, now: float) -> tuple[Arrival, Choice, bool] | Refusal | Waits:
        """The arrival as scored, the worker chosen, and whether it hands on what it computes. Changes nothing."""
        lane = arrival.lane
        candidates = lane.candidates(arrival, self._rng)
        if candidates is None:
            resort = lane.last_resort(arrival)
            if resort is None:
                return NO_ROOM
            if isinstance(resort, Refusal):
                return resort
            candidates = resort
        arrival.unlike = candidates.unlike
        if lane.prices_energy:
            arrival.load = lane.load()
        if lane.power_budgets:
            within = self._affordable(arrival, candidates, now)
            if isinstance(within, tuple):
                return Waits(0.0, within)
            candidates = within
        arrival.blind = self.near > 0.0
        choice = choose(arrival, candidates, self._fleet.index, self._fleet.table, self._rng, now, near=self.near)
        if arrival.parsed.session_id is not None or lane.adapter:
            choice = self._as_preferred(arrival, candidates, choice, now)
        if not lane.prices_energy and self.would_hold(arrival, backlog_s(choice.worker, now)):
            choice = self._rather_free(arrival, candidates, choice, now)
        if lane.prefill_pools and divisible(arrival, choice):
            return self._pick_prefill(arrival, now) or (arrival, choice, False)
        return arrival, choice, False

    def _rather_free(self, arrival: Arrival, candidates: Candidates, choice: Choice, now: float) -> Choice:
        """The choice among idle workers, where the first token comes earlier than from the worker to wait for.

        Costs weigh a prefill more than its time, for it delays others: with accelerators of several kinds that would leave a
        slow one idle for seconds.
        """
        free = [worker for worker in candidates.workers if not worker.in_flight]
        if not free or len(free) == len(candidates.workers):
            return choice
        other = choose(arrival, Candidates(free), self._fleet.index, self._fleet.table, self._rng, now)
        waiting, at_once = (sum(ttft_parts(arrival, one.worker, one.cached_tokens, now)) for one in (choice, other))
        return other.instead_of(choice) if at_once < waiting else choice

    def _as_preferred(self, arrival: Arrival, candidates: Candidates, choice: Choice, now: float) -> Choice:
        """The choice among the workers that the request would rather go to, unless that costs too much."""
        workers = candidates.workers
        preferred = self._affinity.preferred(arrival, workers, now)
        if not preferred or choice.worker in preferred:
            return choice
        policy = arrival.lane.policy
        if not policy.in_seconds:
            preferred = [worker for worker in preferred if not crowded(worker, workers)]
            if not preferred:
                return choice
        other = choose(arrival, Candidates(preferred), self._fleet.index, self._fleet.table, self._rng, now)
        if policy.in_seconds and other.cost > choice.cost + PATIENCE_S:
            return choice
        rows = other.scored.rows()
        rows += [row for row in choice.scored.rows() if row[0] not in other.scored.names]
        return other.instead_of(choice, Scores.of(rows[:MAX_CANDIDATES]))

    def _pick_prefill(self, arrival: Arrival, now: float) -> tuple[Arrival, Choice, bool] | None:
        """The Prefill worker for this prompt, and the arrival as it looks there; None: all are gone, full or failed."""
        candidates = arrival.lane.candidates(arrival, self._rng, prefill=True)
        if candidates is not None and arrival.lane.power_budgets:
            within = self._affordable(arrival, candidates, now)
            candidates = None if isinstance(within, tuple) else within
        if candidates is None:
            return None
        there = arrival.expecting(1.0)
        there.unlike = candidates.unlike
        return there, choose(there, candidates, self._fleet.index, self._fleet.table, self._rng, now), True

    def _affordable(self, arrival: Arrival, candidates: Candidates, now: float) -> Candidates | tuple[PowerBudget, ...]:
        budgets = arrival.lane.power_budgets
        return affordable(candidates, budgets, arrival.parsed.priority, self.power_share, now)

    def _assign(
        self, arrival: Arrival, choice: Choice, predicted_ttft_s: float, now: float, *, hands_on: bool
    ) -> Ticket:
        worker, cached = choice.worker, choice.cached_tokens
        parsed, prompt = arrival.parsed, arrival.prompt_tokens
        if hands_on:
            parsed = parsed.for_prefill()
        cache = worker.cache
        pinned = cache.pin(arrival.blocks, now) if arrival.blocks else []
        joules = marginal_joules(arrival, worker, prompt - cached)
        saved = None
        if choice.rival is not None and not arrival.decision.tries and worker.pool_state.joules_trusted:
            saved = self.savings.price(arrival, worker, prompt - cached, joules, choice.rival)
        ticket = Ticket(
            arrival,
            parsed,
            worker,
            now,
            predicted_ttft_s=predicted_ttft_s,
            cached_tokens=cached,
            prefill_s=worker.pool_state.prefill_s(prompt - cached, prompt),
            joules=joules,
            pinned=pinned,
            pin_epoch=cache.epoch,
            new_from_block=choice.cached_blocks,
            loose_tokens=max(prompt - len(pinned) * arrival.block_tokens, 0.0),
            hands_on=hands_on,
        )
        if arrival.asked and not arrival.received_tokens:
            note(ticket, arrival)
        worker.sent(ticket, now)
        if self.placed is not None and choice.cached_blocks < len(pinned):
            self.placed.append((worker, pinned, choice.cached_blocks))
        if not hands_on and (parsed.session_id is not None or arrival.lane.adapter):
            self._affinity.assigned(arrival, worker, now)
        self._assigned += 1
        if not parsed.stream:
            self._presume_at(now + predicted_ttft_s, ticket)
        self._interval_s += 0.05 * (now - self._assigned_at - self._interval_s)
        self._assigned_at = now
        phase = "prefill" if hands_on else "decode" if arrival.received_tokens else ""
        made = Try(
            now,
            worker.name,
            choice.scored,
            choice.candidate_count,
            predicted_ttft_s,
            joules,
            phase,
            ticket.precise,
            min(choice.cached_blocks * arrival.block_tokens, prompt),
            saved,
        )
        arrival.decision.tries += (made,)
        return ticket

    def _hold(self, arrival: Arrival, on_assigned: OnAssigned, own_s: float, now: float) -> Held | Refusal:
        timeout_s = arrival.lane.config.admission.queue_timeout_seconds
        held = Held(arrival, on_assigned, now, now + timeout_s, own_s)
        leaver = self.queue.add(held)
        if leaver is held:
            refusal = self._overloaded(arrival)
            held.waiting = False
            self.record_refusal(arrival, refusal, now)
            return refusal
        if leaver is not None:
            self.dismiss(leaver, self._overloaded(leaver.arrival), now)
        return held

    def _decide_held(self, lane: Lane, now: float) -> list[tuple[Held, Ticket | Refusal]]:
        """Decide the lane's most urgent requests again; those decided have left the queue."""
        if now < lane.rescan_at or not self._has_room(lane, now):
            return []
        for held in self.queue.first(lane, TRIES_PER_PUMP):
            if now + held.own_s > held.arrival.deadline:
                self.queue.give_up_hope(held)
        decided = []
        backlogged = False
        for held in self.queue.first(lane, TRIES_PER_PUMP):
            result = self._decide(held.arrival, now)
            if isinstance(result, Waits):
                held.own_s = result.own_s
                backlogged = backlogged or not (result is NO_ROOM or result.short)
                continue
            self.queue.had_its_turn(held)
            decided.append((held, result))
            if not self._has_room(lane, now):
                break
        if backlogged and not decided:
            lane.rescan_at = now + RESCAN_S
        return decided

    def _has_room(self, lane: Lane, now: float) -> bool:
        """Some worker could begin soon enough not to hold the request: saves deciding in vain."""
        limit = lane.policy.hold_above_s
        return limit is None or any(
            backlog_s(worker, now) <= limit for pool in lane.pools for worker in pool.workers.values()
        )

    def _overloaded(self, arrival: Arrival) -> Refusal:
        message = f"The queue of policy {arrival.lane.config.name!r} is full: slow down, or add workers"
        return Refusal(429, "queue_full", message, self._retry_after_s(), "rate_limit_exceeded")

    def _retry_after_s(self) -> int:
        """About how long the queue needs to drain at the present pace."""
        low, high = RETRY_AFTER_BOUNDS_S
        return min(max(ceil(len(self.queue) * self._interval_s), low), high)
