"""What `Dispatcher.submit` answers: a Ticket (go), a Refusal (answer this), or Held (queued; the callback brings one of the two).

An Arrival is a request as routing sees it, the same object through holding and retries; a Ticket is one try of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfleet_api.fleetconfig import PolicyConfig
    from kvfleet_router.core.calibration import OutputLengths
    from kvfleet_router.core.decisions import Decision
    from kvfleet_router.core.parse import ParsedRequest
    from kvfleet_router.core.routes import Lane
    from kvfleet_router.core.worker import Worker

PENDING, DECODING, CLOSED = range(3)
"""A ticket's phases: sent but no first token yet; producing tokens; finished, abandoned or retried."""


@dataclass(slots=True, eq=False)
class Arrival:
    """A request to be routed. Policies read it."""

    parsed: ParsedRequest
    request_id: str
    lane: Lane
    """The policy and pools that take it."""
    arrived_at: float
    deadline: float
    """When its first token is due by the policy's SLO."""
    prompt_tokens: float
    """Estimated, unless the request says."""
    expected_output_tokens: float
    block_tokens: float
    """Tokens in a block of this prompt."""
    outputs: OutputLengths
    """What is known of the model's answers."""
    blocks: list[int]
    """Chained hashes of the prompt's blocks; empty when the policy does not look at prefixes."""
    decision: Decision
    received_tokens: float = 0.0
    """Prompt tokens that a Prefill worker has computed for it and hands to whoever decodes."""
    whole: bool = False
    """Not to be divided between a Prefill and a Decode worker (any more)."""
    load: float = 0.0
    """How busy the lane's pools are: 0 idle, 1 at the SLO's edge."""
    attempt: int = 0
    excluded: tuple[str, ...] = ()
    """Workers that failed this request before."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One try of one request on one worker. `chunks` is the caller's to increment; all else is the dispatcher's."""

    id: str
    """The decision's id: the same for all tries of a request."""
    request_id: str
    worker: Worker
    policy: PolicyConfig
    parsed: ParsedRequest
    arrival: Arrival
    sent_at: float
    predicted_ttft_s: float
    """From now on: the time the request was held is not in it."""
    attempt: int
    """0 for the first try."""
    prompt_tokens: float
    """Estimated, unless the request says."""
    cached_tokens: float
    """Of them, expected in the worker's prefix cache."""
    prefill_s: float
    """Predicted prefill time of the uncached tokens, uncalibrated, alone on the worker."""
    joules: float
    """Predicted marginal energy."""
    hands_on: bool = False
    """The worker computes the prompt only and hands its KV entries on: `Dispatcher.prefilled` comes next, not `finish`."""
    first_token_at: float | None = None
    chunks: int = 0
    """Body chunks received: engines send one for each token of a stream."""
    phase: int = PENDING
    presumed: bool = False
    """The decode phase began by prediction, not by an observed token."""
    pinned: list[int] = field(default_factory=list)
    """Blocks pinned in the worker's cache, in the cache's `pin_epoch`."""
    pin_epoch: int = 0
    new_from_block: int = 0
    """Blocks from this one on were in nobody's prompt on the worker before."""
    loose_tokens: float = 0.0
    """Prompt tokens outside the pinned blocks."""
    decoding_since: float = 0.0
    """When its decode phase began."""
    tokens_at_start: float = 0.0
    sequence_seconds_at_start: float = 0.0
    context_token_seconds_at_start: float = 0.0
    prefill_seconds_at_start: float = 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """No worker gets this request: answer with an OpenAI error body."""

    status: int
    code: str
    message: str
    retry_after_s: int | None = None
    type: str = "invalid_request_error"
    param: str | None = None


@dataclass(slots=True, eq=False)
class Held:
    """A request waiting in the router's queue. Opaque to callers, but for `Dispatcher.cancel`."""

    arrival: Arrival
    on_assigned: Callable[[Ticket | Refusal], None]
    held_since: float
    expires_at: float
    """When it is refused."""
    order: tuple[int, int, float, int] = (0, 0, 0.0, 0)
    """Its place in the queue: priority, hopeless, deadline or arrival, sequence number."""
    own_s: float = 0.0
    """Its own prefill time as of the last decision."""
    waiting: bool = True
    """False once called back or cancelled."""
