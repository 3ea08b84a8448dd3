"""What `Dispatcher.submit` answers: a Ticket (go), a Refusal (answer this), or Held (queued; the callback brings one of the two)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfleet_api.fleetconfig import PolicyConfig
    from kvfleet_router.core.decisions import Decision
    from kvfleet_router.core.parse import ParsedRequest
    from kvfleet_router.core.worker import Worker

PENDING, DECODING, CLOSED = range(3)
"""A ticket's phases: sent but no first token yet; producing tokens; finished, abandoned or retried."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One try of one request on one worker. `chunks` is the caller's to increment; all else is the dispatcher's."""

    id: str
    """The decision's id: the same for all tries of a request."""
    request_id: str
    worker: Worker
    policy: PolicyConfig
    parsed: ParsedRequest
    sent_at: float
    predicted_ttft_s: float
    attempt: int
    """0 for the first try."""
    decision: Decision
    prompt_tokens: float
    """Estimated, unless the request says."""
    cached_tokens: float
    """Of them, expected in the worker's prefix cache."""
    expected_output_tokens: float
    prefill_s: float
    """Predicted prefill time of the uncached tokens, uncalibrated, alone on the worker."""
    joules: float
    """Predicted marginal energy."""
    hashes: list[int]
    first_token_at: float | None = None
    chunks: int = 0
    phase: int = PENDING
    presumed: bool = False
    """The decode phase began by prediction, not by an observed token."""
    tokens_at_start: float = 0.0
    sequence_seconds_at_start: float = 0.0
    prefill_seconds_at_start: float = 0.0
    predicted_prefill_s: float = 0.0
    decode_overhead_s: float = 0.0
    new_from_block: int = 0
    """Blocks from this one on were added to the index by this ticket."""
    excluded: tuple[str, ...] = ()
    """Workers that failed this request before."""


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
    """A request waiting in the router's queue. Opaque to callers, but for `cancel`."""

    parsed: ParsedRequest
    request_id: str
    policy: PolicyConfig
    on_assigned: Callable[[Ticket | Refusal], None]
    arrived_at: float
    held_since: float
    deadline: float
    """When its first token is due."""
    expires_at: float
    """When it is refused."""
    decision: Decision
    own_s: float = 0.0
    """Last estimate of its own prefill time."""
    attempt: int = 0
    excluded: tuple[str, ...] = ()
    waiting: bool = True
    """False once called back or cancelled."""
