"""What `Dispatcher.submit` answers: a Ticket (go), a Refusal (answer this), or Held (queued; the callback brings one of the two).

An Arrival is a request as routing sees it, the same object through holding and retries; a Ticket is one try of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvfleet_api.fleetconfig import PolicyConfig
    from kvfleet_router.core.calibration import OutputLengths
    from kvfleet_router.core.decisions import Decision
    from kvfleet_router.core.exact import Asked
    from kvfleet_router.core.kvevents.view import Expected
    from kvfleet_router.core.parse import ParsedRequest
    from kvfleet_router.core.routes import Lane
    from kvfleet_router.core.worker import Worker

PENDING: Final = 0
DECODING: Final = 1
CLOSED: Final = 2
"""A ticket's phases: sent but no first token yet; producing tokens; finished, abandoned or retried."""


class Arrival:
    """A request to be routed. Policies read it."""

    __slots__ = (
        "arrived_at",
        "asked",
        "attempt",
        "blind",
        "block_tokens",
        "blocks",
        "deadline",
        "decision",
        "excluded",
        "expected",
        "expected_at",
        "expected_output_tokens",
        "lane",
        "load",
        "outputs",
        "parsed",
        "prompt_tokens",
        "received_tokens",
        "request_id",
        "resumed",
        "unlike",
        "whole",
    )

    def __init__(
        self,
        parsed: ParsedRequest,
        request_id: str,
        lane: Lane,
        arrived_at: float,
        *,
        deadline: float,
        prompt_tokens: float,
        expected_output_tokens: float,
        block_tokens: float,
        outputs: OutputLengths,
        blocks: list[int],
        decision: Decision,
    ) -> None:
        self.parsed = parsed
        self.request_id = request_id
        self.lane = lane
        """The policy and pools that take it."""
        self.arrived_at = arrived_at
        self.deadline = deadline
        """When its first token is due by the policy's SLO."""
        self.prompt_tokens = prompt_tokens
        """Estimated, unless the request says."""
        self.expected_output_tokens = expected_output_tokens
        self.block_tokens = block_tokens
        """Tokens in a block of this prompt."""
        self.outputs = outputs
        """What is known of the model's answers."""
        self.blocks = blocks
        """Chained hashes of the prompt's blocks; empty when the policy does not look at prefixes."""
        self.decision = decision
        self.load = 0.0
        """How busy the lane's pools are: 0 idle, 1 at the SLO's edge."""
        self.unlike = 0.0
        """How unlike the candidates' accelerators are: 0 all alike, 1 where one computes a prompt twice as fast as another."""
        self.blind = False
        """Other routers choose among the same workers, and nothing is known of what they choose."""
        self.attempt = 0
        self.excluded: tuple[str, ...] = ()
        """Workers that failed this request before."""
        self.resumed = False
        """A worker died inside its answer, and another one gives the rest: what that one did is not the whole."""
        self.received_tokens = 0.0
        """Prompt tokens that a Prefill worker has computed for it and hands to whoever decodes."""
        self.asked: tuple[Asked, ...] = ()
        """The prompt as the views of workers' caches know it (exact.py); empty: cached tokens are guesses."""
        self.expected: list[Expected] = []
        """What each of them expects, as of `expected_at`."""
        self.expected_at = -1.0
        self.whole = False
        """Not to be divided between a Prefill and a Decode worker (any more)."""

    def expecting(self, output_tokens: float) -> Arrival:
        """The same, as it looks to a worker that is to produce so many tokens of it: to be scored, not to be sent."""
        other = Arrival(
            self.parsed,
            self.request_id,
            self.lane,
            self.arrived_at,
            deadline=self.deadline,
            prompt_tokens=self.prompt_tokens,
            expected_output_tokens=output_tokens,
            block_tokens=self.block_tokens,
            outputs=self.outputs,
            blocks=self.blocks,
            decision=self.decision,
        )
        other.load, other.attempt, other.excluded = self.load, self.attempt, self.excluded
        other.blind, other.unlike = self.blind, self.unlike
        other.received_tokens, other.whole = self.received_tokens, self.whole
        other.asked, other.expected, other.expected_at = self.asked, self.expected, self.expected_at
        return other


class Ticket:
    """One try of one request on one worker. `chunks` is the caller's to increment; all else is the dispatcher's."""

    __slots__ = (
        "arrival",
        "attempt",
        "cached_tokens",
        "certain_tokens",
        "chunks",
        "context_token_seconds_at_start",
        "decoding_since",
        "first_token_at",
        "generated_tokens",
        "hands_on",
        "id",
        "joules",
        "loose_tokens",
        "new_from_block",
        "parsed",
        "phase",
        "pin_epoch",
        "pinned",
        "policy",
        "precise",
        "predicted_ttft_s",
        "prefill_s",
        "prefill_seconds_at_start",
        "presumed",
        "prompt_tokens",
        "request_id",
        "sent_at",
        "sequence_seconds_at_start",
        "tokens_at_start",
        "worker",
    )

    def __init__(
        self,
        arrival: Arrival,
        parsed: ParsedRequest,
        worker: Worker,
        sent_at: float,
        *,
        predicted_ttft_s: float,
        cached_tokens: float,
        prefill_s: float,
        joules: float,
        pinned: list[int],
        pin_epoch: int,
        new_from_block: int,
        loose_tokens: float,
        hands_on: bool,
    ) -> None:
        self.id = arrival.decision.id
        """The decision's id: the same for all tries of a request."""
        self.request_id = arrival.request_id
        self.worker = worker
        self.policy: PolicyConfig = arrival.lane.config
        self.parsed = parsed
        self.arrival = arrival
        self.sent_at = sent_at
        self.predicted_ttft_s = predicted_ttft_s
        """From now on: the time the request was held is not in it."""
        self.attempt = arrival.attempt
        """0 for the first try."""
        self.prompt_tokens = arrival.prompt_tokens
        """Estimated, unless the request says."""
        self.cached_tokens = cached_tokens
        """Of them, expected in the worker's prefix cache."""
        self.prefill_s = prefill_s
        """Predicted prefill time of the uncached tokens, uncalibrated, alone on the worker."""
        self.joules = joules
        """Predicted marginal energy."""
        self.first_token_at: float | None = None
        self.chunks = 0
        """Body chunks received: engines send one for each token of a stream."""
        self.phase = PENDING
        self.presumed = False
        """The decode phase began by prediction, not by an observed token."""
        self.pinned = pinned
        """Blocks pinned in the worker's cache, in the cache's `pin_epoch`."""
        self.pin_epoch = pin_epoch
        self.new_from_block = new_from_block
        """Blocks from this one on were in nobody's prompt on the worker before."""
        self.precise = False
        """The worker itself told what it has cached; else `cached_tokens` is a guess."""
        self.certain_tokens = 0.0
        """Of the cached tokens, those before the first one that was generated."""
        self.generated_tokens = 0.0
        """Those behind: the engine may spell them otherwise."""
        self.loose_tokens = loose_tokens
        """Prompt tokens outside the pinned blocks."""
        self.hands_on = hands_on
        """The worker computes the prompt only and hands its KV entries on: `Dispatcher.prefilled` comes next, not `finish`."""
        self.decoding_since = 0.0
        """When its decode phase began."""
        self.tokens_at_start = 0.0
        self.sequence_seconds_at_start = 0.0
        self.context_token_seconds_at_start = 0.0
        self.prefill_seconds_at_start = 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """No worker gets this request: answer with an OpenAI error body."""

    status: int
    code: str
    message: str
    retry_after_s: int | None = None
    type: str = "invalid_request_error"
    param: str | None = None


class Held:
    """A request waiting in the router's queue. Opaque to callers, but for `Dispatcher.cancel`."""

    __slots__ = (
        "arrival",
        "deferred",
        "expires_at",
        "held_since",
        "kept_bytes",
        "on_assigned",
        "order",
        "own_s",
        "waiting",
    )

    def __init__(
        self,
        arrival: Arrival,
        on_assigned: Callable[[Ticket | Refusal], None],
        held_since: float,
        expires_at: float,
        own_s: float,
    ) -> None:
        self.arrival = arrival
        self.on_assigned = on_assigned
        self.held_since = held_since
        self.expires_at = expires_at
        """When it is refused; when it must begin, while it is deferred."""
        self.deferred = False
        """It is kept for a cheaper time (deferral.py), not waiting for a worker."""
        self.kept_bytes = 0
        """Of its body, while it is deferred."""
        self.order: tuple[int, int, float, int] = (0, 0, 0.0, 0)
        """Its place in the queue: priority, hopeless, deadline or arrival, sequence number."""
        self.own_s = own_s
        """Its own prefill time as of the last decision."""
        self.waiting = True
        """False once called back or cancelled."""
