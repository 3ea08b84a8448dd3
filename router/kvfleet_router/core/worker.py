"""One worker as the router knows it: exact accounting of what this router sent there, and what follows from it.

The dispatcher's events are the only writers (`sent`, `first_token`, `left`); policies only read. Each event brings the
worker up to date and recomputes the figures that depend on the worker alone, so that scoring a request against a worker
is a few multiplications (see predict.py). Nothing here comes from the engine's own metrics, which are late and lie.

Decoding sequences all grow by one token a step, so their generated tokens are one counter per worker: V, the tokens a
sequence has produced since the counter began. A sequence that started at V0 has V − V0 tokens; the sum over n sequences
is n·V − ΣV0. When the worker falls idle every sum is set to zero, so rounding cannot add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from kvfleet_router.core.breaker import Breaker
from kvfleet_router.core.calibration import PREFILL_ALIKE_PRIOR_S, STEP_ALIKE_PRIOR_S, Deviation
from kvfleet_router.core.columns import YOUNG
from kvfleet_router.core.ticket import CLOSED, DECODING, PENDING, Ticket

if TYPE_CHECKING:
    from kvfleet_router.core.columns import Table
    from kvfleet_router.core.index import WorkerCache
    from kvfleet_router.core.kvevents.view import WorkerView
    from kvfleet_router.core.ledger import Ledger
    from kvfleet_router.core.pool import Pool

PREFILL_SHARE_WINDOW_S: Final = 20.0
MIN_CALIBRATION_TOKENS: Final = 8
MAX_CALIBRATION_PREFILL_SHARE: Final = 0.5
"""Streams interrupted more than this say too little about decode steps."""
LONG_AGO_S: Final = 1e12
MIN_STEP_S: Final = 1e-5
"""Keeps divisors positive where a profile says nothing takes time."""


DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class WorkerEndpoint:
    """Where a worker is, and whether it may get requests."""

    name: str
    url: str
    """`http://host:port` or `https://host:port`, no path."""
    ready: bool = True
    terminating: bool = False
    draining: bool = False
    """The autoscaler is about to take it away: it gets nothing new while another worker can have it."""
    kv_events_url: str | None = None
    """`tcp://host:port` where the engine publishes its KV events."""
    kv_replay_url: str | None = None

    @property
    def address(self) -> tuple[str, int]:
        """(host, port). Raises ValueError where the URL is none."""
        try:
            parts = urlsplit(self.url)
            if parts.scheme in DEFAULT_PORTS and parts.hostname:
                return parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme]
        except ValueError:
            pass
        raise ValueError(
            f"endpoint {self.name}: {self.url!r} is no URL of the form http://host:port or https://host:port"
        )


@dataclass(slots=True)
class Load:
    """What one router has on one worker: additive, so that replicas can tell each other."""

    in_flight: int = 0
    """Requests sent and not finished."""
    pending: int = 0
    """Sequences without a first token yet."""
    decoding: int = 0
    """Sequences producing tokens."""
    prefill_s: float = 0.0
    """Predicted prefill time of those pending, uncalibrated."""
    uncached_tokens: float = 0.0
    """Prompt tokens of those pending that are not cached."""
    context_tokens: float = 0.0
    """Tokens held by those decoding."""
    kv_tokens: float = 0.0
    """KV tokens in use."""
    unindexed_tokens: float = 0.0
    """Of them, those that no prefix index knows: answers, and ends of prompts that fill no block."""
    prefilled_s: float = 0.0
    """Prefill time ever spent on its requests, calibrated: what others see of its first tokens."""


IDLE = Load()
"""Nothing; never written to."""


class Worker:
    """Identity, health, accounting. What policies read is derived: `_refresh` writes it after each event."""

    __slots__ = (
        "_at",
        "_boundary_exact",
        "_decode_prompt_tokens",
        "_generated_offset",
        "_last_first_token",
        "_loose_tokens",
        "_pending",
        "_stale",
        "_theirs",
        "_tokens_per_sequence",
        "_untold",
        "backlog_s",
        "breaker",
        "cache",
        "context_token_joules",
        "context_token_seconds",
        "context_tokens",
        "contradictions",
        "decoding",
        "decoding_since",
        "elsewhere",
        "endpoint",
        "fixed_step_joules",
        "head_prefill_s",
        "head_since",
        "held",
        "host",
        "idle_seconds",
        "in_flight",
        "inflation",
        "kv_free_tokens",
        "kv_tokens",
        "kv_used_tokens",
        "ledger",
        "max_sequences",
        "name",
        "own",
        "pending",
        "pending_uncached_tokens",
        "pool",
        "pool_state",
        "port",
        "prefill_deviation",
        "prefill_factor",
        "prefill_s_per_token",
        "prefill_s_per_token_pair",
        "prefill_seconds",
        "prefill_share",
        "prefill_share_at",
        "prefill_token_joules",
        "removed",
        "sent_requests",
        "sequence_seconds",
        "step_deviation",
        "step_now_s",
        "step_s",
        "step_s_per_context_token",
        "step_s_per_sequence",
        "step_tokens_s",
        "tail_used_at",
        "token_joules",
        "url",
        "work_shares",
        "work_steps",
    )

    def __init__(self, endpoint: WorkerEndpoint, pool: Pool, cache: WorkerCache, table: Table, now: float) -> None:
        self.endpoint = endpoint
        self.name = endpoint.name
        self.url = endpoint.url
        self.host, self.port = endpoint.address
        self.pool = pool.name
        self.pool_state = pool
        self.cache = cache
        self._stale = table.stale
        self._untold = table.untold
        self.start_learning()
        self.breaker = Breaker()
        self.removed = False
        self.held: WorkerView | None = None
        """What it holds by its own word; none: it is guessed."""
        self.ledger: Ledger | None = None
        """Who is told of its requests, to book their joules; then its work is counted in the three figures below."""
        self.work_steps = self.work_shares = self.idle_seconds = 0.0
        """Decode steps; Σ 1/sequences over them; seconds without a request."""
        self.contradictions = 0
        """Reports in a row that an expected prefix was not cached."""

        self.own = Load()
        """What this router has sent here."""
        self.elsewhere = IDLE
        """What other replicas of the router have sent here, as far as they told."""
        self.sent_requests = 0
        """Requests ever sent: round robin goes by it."""
        self.sequence_seconds = 0.0
        """Integral of `decoding` over time."""
        self.context_token_seconds = 0.0
        """Integral of `context_tokens` over time."""
        self.prefill_seconds = 0.0
        """Prefill time ever spent, calibrated."""
        self.prefill_share = 0.0
        """Share of time spent in prefill over the last PREFILL_SHARE_WINDOW_S, as of `prefill_share_at`."""
        self.prefill_share_at = now
        self.head_since = now
        """When the prefill now running began."""
        self.decoding_since: list[tuple[float, float]] = []
        self._theirs: list[tuple[float, float]] = []  # of these, the answers of other replicas
        """Of the requests now decoding, the latest last: when they began to, and `prefill_seconds` then."""
        self._pending: dict[int, Ticket] = {}
        self._loose_tokens = 0.0  # prompt tokens in flight outside pinned blocks
        self._decode_prompt_tokens = 0.0
        self._generated_offset = 0.0
        self._tokens_per_sequence = 0.0
        self._last_first_token = now
        self._boundary_exact = True
        self._at = now
        self.adopt_costs()

    def hold(self, held: WorkerView | None) -> None:
        """Its cache is known this way from now on."""
        if self.held is not None:
            self.held.forget()
        self.held = held

    # -- health ---------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ready | not_ready | terminating | ejected (circuit open)."""
        if self.endpoint.terminating or self.removed:
            return "terminating"
        if not self.endpoint.ready:
            return "not_ready"
        return "ready" if self.breaker.open_until is None else "ejected"

    @property
    def assignable(self) -> bool:
        """May get new requests, its circuit breaker aside."""
        return self.endpoint.ready and not self.endpoint.terminating and not self.removed

    # -- events ---------------------------------------------------------------------------------------------------------

    def sent(self, ticket: Ticket, now: float) -> None:
        """A request was dispatched here. Its blocks are pinned and loose tokens counted until `left`."""
        self._advance(now)
        own = self.own
        if not self._pending and not self.elsewhere.pending:
            self.head_since = now
        self._pending[id(ticket)] = ticket
        own.prefill_s += ticket.prefill_s
        own.pending += ticket.parsed.sequences
        own.uncached_tokens += ticket.prompt_tokens - ticket.cached_tokens
        self._loose_tokens += ticket.loose_tokens
        own.in_flight += 1
        self.sent_requests += 1
        self._untold.add(self)
        self._refresh()

    def first_token(self, ticket: Ticket, now: float, *, presumed: bool) -> None:
        """The ticket's prefill ended: observed, or presumed for an answer that does not stream."""
        self._advance(now)
        if not presumed:
            self._calibrate_prefill(ticket, now)
        self._end_prefill(ticket)
        prefill_s = ticket.prefill_s * self.prefill_factor
        self.own.prefilled_s += prefill_s
        self._prefilled(prefill_s, now, exact=not presumed)
        ticket.phase = DECODING
        ticket.presumed = presumed
        ticket.decoding_since = now
        self.decoding_since.append((now, self.prefill_seconds))
        ticket.tokens_at_start = self._tokens_per_sequence
        ticket.sequence_seconds_at_start = self.sequence_seconds
        ticket.context_token_seconds_at_start = self.context_token_seconds
        ticket.prefill_seconds_at_start = self.prefill_seconds  # the next prefill begins now
        sequences = ticket.parsed.sequences
        self.own.decoding += sequences
        self._decode_prompt_tokens += ticket.prompt_tokens
        self._generated_offset += sequences * self._tokens_per_sequence
        self._untold.add(self)
        if self.ledger is not None:
            self.ledger.first_token(ticket)
        self._refresh()

    def told(self, elsewhere: Load, prefilled_s: float, now: float) -> None:
        """Other replicas have this much here, all together, and first tokens of theirs ended so much prefill just now."""
        self._advance(now)
        if prefilled_s:
            self._prefilled(prefilled_s, now, exact=True)
            begun = [(now, self.prefill_seconds)] * max(elsewhere.decoding - self.elsewhere.decoding, 1)
            self._theirs += begun
            self.decoding_since += begun
        elif elsewhere.pending and not self.elsewhere.pending and not self._pending:
            self.head_since = now
        self.elsewhere = elsewhere
        if len(self._theirs) > elsewhere.decoding:  # the oldest are most likely those that have ended
            for ended in self._theirs[: -elsewhere.decoding or None]:
                self.decoding_since.remove(ended)
            self._theirs = self._theirs[-elsewhere.decoding :] if elsewhere.decoding else []
        self._refresh()

    def left(self, ticket: Ticket, now: float) -> None:
        """The ticket finished, failed, or its client went away."""
        self._advance(now)
        own = self.own
        if ticket.phase == PENDING:
            was_head = next(iter(self._pending)) == id(ticket)
            self._end_prefill(ticket)
            if was_head:
                self.head_since = now
        elif ticket.phase == DECODING:
            if self.ledger is not None:
                ticket.arrival.decision.joules += self.ledger.ended(ticket)
            sequences = ticket.parsed.sequences
            own.decoding -= sequences
            self.decoding_since.remove((ticket.decoding_since, ticket.prefill_seconds_at_start))
            self._decode_prompt_tokens -= ticket.prompt_tokens
            self._generated_offset -= sequences * ticket.tokens_at_start
        ticket.phase = CLOSED
        self._loose_tokens -= ticket.loose_tokens
        own.in_flight -= 1
        if not own.in_flight:
            self._loose_tokens = self._tokens_per_sequence = 0.0
        if not own.decoding:
            self._decode_prompt_tokens = self._generated_offset = 0.0
        self._untold.add(self)
        self._refresh()

    def remove(self) -> None:
        """It is out of the fleet. What it still answers goes on being counted, for nobody."""
        self.removed = True
        for seen in (self._stale, self._untold):
            seen.discard(self)
        self._stale, self._untold = set(), set()

    def earlier_presumable(self, ticket: Ticket) -> list[Ticket]:
        """Answers that do not stream and were sent before `ticket`: engines prefill in order, so theirs are done too."""
        earlier = []
        for other in self._pending.values():
            if other is ticket:
                break
            if not other.parsed.stream:
                earlier.append(other)
        return earlier

    def calibrate_decode(self, ticket: Ticket, tokens: int, now: float) -> None:
        """Learn W and H from a finished stream: its mean step, prefill interruptions and context time taken off."""
        if ticket.presumed or ticket.first_token_at is None or tokens < MIN_CALIBRATION_TOKENS:
            return
        duration = now - ticket.first_token_at
        if duration <= 0:
            return
        running = min((now - self.head_since) / self.inflation, self.head_prefill_s) if self._pending else 0.0
        in_prefill = (self.prefill_seconds + running - ticket.prefill_seconds_at_start) / duration
        if in_prefill > MAX_CALIBRATION_PREFILL_SHARE:
            return
        sequences = (self.sequence_seconds - ticket.sequence_seconds_at_start) / duration
        context = (self.context_token_seconds - ticket.context_token_seconds_at_start) / duration
        step = duration / (tokens - 1) * (1.0 - in_prefill) - self.step_s_per_context_token * context
        if step > 0:
            self.step_deviation.observe(self.pool_state.step_s + self.pool_state.step_s_per_sequence * sequences, step)
            self.pool_state.calibration.observe_steps(sequences, step)
            self.pool_state.publish()
            self.adopt_costs()

    def start_learning(self) -> None:
        """Take it to be like its pool."""
        self.prefill_deviation = Deviation(PREFILL_ALIKE_PRIOR_S)
        self.step_deviation = Deviation(STEP_ALIKE_PRIOR_S)

    def adopt_costs(self) -> None:
        """Take the pool's cost model, what the pool has learned, and this worker's deviation into the figures policies read."""
        pool, cost = self.pool_state, self.pool_state.cost
        self.step_s = pool.step_s * self.step_deviation.factor
        self.step_s_per_sequence = pool.step_s_per_sequence * self.step_deviation.factor
        self.step_s_per_context_token = cost.step_s_per_context_token
        self.prefill_factor = pool.prefill_factor * self.prefill_deviation.factor
        self.prefill_s_per_token = self.prefill_factor * cost.prefill_s_per_token
        self.prefill_s_per_token_pair = self.prefill_factor * cost.prefill_s_per_token_pair
        self.step_tokens_s = max(cost.max_step_tokens * self.prefill_s_per_token, MIN_STEP_S)
        self.kv_tokens = float(cost.kv_tokens)
        self.max_sequences = cost.max_sequences
        joules = pool.joules
        self.prefill_token_joules = joules.prefill_token_joules
        self.token_joules = joules.token_joules
        self.context_token_joules = joules.context_token_joules
        self.fixed_step_joules = max(joules.step_joules - joules.idle_watts * self.step_s, 0.0)
        self._refresh()

    def youngest(self) -> list[float]:
        """`decoding_since` of the YOUNG requests that began last, the latest first: all times, then all prefill seconds.

        Where there are fewer: that of requests that began ages ago.
        """
        latest = self.decoding_since[: -YOUNG - 1 : -1]
        missing = YOUNG - len(latest)
        times, prefilled = [time for time, _ in latest], [seconds for _, seconds in latest]
        return times + [-LONG_AGO_S] * missing + prefilled + [self.prefill_seconds] * missing

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Let the decoding sequences grow until now."""
        passed = now - self._at
        if passed <= 0:
            return
        self._at = now
        if self.ledger is not None:
            self._meter(passed)
        if self.decoding:  # theirs share the steps as well
            self.sequence_seconds += self.decoding * passed
            self.context_token_seconds += self.context_tokens * passed
            self._tokens_per_sequence += passed * (1.0 - min(self.prefill_share, 0.9)) / self.step_now_s

    def _prefilled(self, prefill_s: float, now: float, *, exact: bool) -> None:
        """A prefill has ended, whoever sent it; the engine begins with the next."""
        self._last_first_token = self.head_since = now
        self._boundary_exact = exact
        self.prefill_seconds += prefill_s
        decayed = self.prefill_share * exp((self.prefill_share_at - now) / PREFILL_SHARE_WINDOW_S)
        self.prefill_share = decayed + prefill_s / PREFILL_SHARE_WINDOW_S
        self.prefill_share_at = now

    def _meter(self, passed: float) -> None:
        if self.decoding:
            steps = passed * (1.0 - min(self.prefill_share, 0.9)) / self.step_now_s
            self.work_steps += steps
            self.work_shares += steps / self.decoding
        elif not self.in_flight:
            self.idle_seconds += passed

    def catch_up(self, now: float) -> None:
        """Bring the counters up to date."""
        self._advance(now)

    def _end_prefill(self, ticket: Ticket) -> None:
        own = self.own
        del self._pending[id(ticket)]
        own.prefill_s -= ticket.prefill_s
        own.pending -= ticket.parsed.sequences
        own.uncached_tokens -= ticket.prompt_tokens - ticket.cached_tokens
        if not self._pending:
            own.prefill_s = own.uncached_tokens = 0.0

    def _calibrate_prefill(self, ticket: Ticket, now: float) -> None:
        """Observed: the time since the engine could begin with it, less the decode steps in between."""
        if ticket.arrival.received_tokens or (not self._boundary_exact and self._last_first_token > ticket.sent_at):
            return
        if self.kv_used_tokens > self.kv_tokens or self.decoding + self.pending > self.max_sequences:
            return  # it waited for room, not for compute
        raw_step_tokens_s = self.step_tokens_s / self.prefill_factor
        steps = 1.0 + ticket.prefill_s / raw_step_tokens_s
        observed = now - max(ticket.sent_at, self._last_first_token) - steps * self.step_now_s
        observed = min(observed, 0.1 + 8.0 * self.prefill_factor * ticket.prefill_s)
        self.prefill_deviation.observe(self.pool_state.prefill_factor * ticket.prefill_s, observed)
        self.pool_state.calibration.observe_prefill(ticket.prefill_s, observed)
        self.pool_state.publish()
        self.adopt_costs()

    def _refresh(self) -> None:
        """Recompute what depends on the worker alone."""
        own, elsewhere = self.own, self.elsewhere
        generated = max(own.decoding * self._tokens_per_sequence - self._generated_offset, 0.0)
        block_tokens = self.pool_state.block_tokens
        unindexed = self._loose_tokens + generated
        own.context_tokens = self._decode_prompt_tokens + generated
        own.unindexed_tokens = unindexed
        own.kv_tokens = unindexed + self.cache.pinned_blocks * block_tokens

        self.in_flight = own.in_flight + elsewhere.in_flight
        self.pending = own.pending + elsewhere.pending
        self.decoding = own.decoding + elsewhere.decoding
        self.pending_uncached_tokens = own.uncached_tokens + elsewhere.uncached_tokens
        self.context_tokens = own.context_tokens + elsewhere.context_tokens
        in_step = self.step_s_per_sequence * self.decoding + self.step_s_per_context_token * self.context_tokens
        self.step_now_s = max(self.step_s + in_step, MIN_STEP_S)
        self.inflation = 1.0 + self.step_now_s / self.step_tokens_s
        factor = self.prefill_factor
        self.backlog_s = factor * (own.prefill_s + elsewhere.prefill_s)
        head_s = 0.0
        if self._pending:
            head_s = next(iter(self._pending.values())).prefill_s
        elif elsewhere.pending:  # one of theirs is the head: as long as theirs are in the mean
            head_s = elsewhere.prefill_s / elsewhere.pending
        self.head_prefill_s = factor * head_s
        self.kv_used_tokens = own.kv_tokens + elsewhere.kv_tokens
        self.kv_free_tokens = self.cache.free_blocks * block_tokens - unindexed - elsewhere.unindexed_tokens
        self.tail_used_at = self.cache.tail_used_at
        self._stale.add(self)
