"""What goes into an engine and what comes out: requests, the result of steps, KV-cache events. Pure data."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    NEW = "new"
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. The caller fills the first group, the engine the second."""

    id: Hashable
    prompt_tokens: int
    output_tokens: int
    """Tokens it will generate: the engine ends it after so many."""
    block_keys: Sequence[int] = ()
    """Key i stands for the content of block i and of all before it; may run on into the output. Blocks beyond are not cached."""
    priority: int = 0
    """Lower goes first, under priority scheduling."""
    lora: str | None = None
    remote_tokens: int = 0
    """Leading prompt tokens whose KV entries another engine has sent: nobody computes them here."""
    payload: object = None
    """The caller's own; the engine never looks at it."""

    state: State = State.NEW
    order: int = -1
    """Number of the submission."""
    arrival_s: float = 0.0
    scheduled_s: float | None = None
    """When it first left the waiting queue."""
    first_token_s: float | None = None
    finish_s: float | None = None
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first scheduled."""
    received_tokens: int = 0
    """Prompt tokens, beyond the cached ones, that were taken from the other engine."""
    computed_tokens: int = 0
    """Tokens whose KV entries exist, while prefilling."""
    generated: int = 0
    """Output tokens so far; while decoding, as of `joined_step` (`Engine.generated` tells the present number)."""
    joined_step: int = 0
    preemptions: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Stored:
    """Blocks [first, first + count) of a request became findable under its `block_keys`."""

    request: Request
    first: int
    count: int

    @property
    def keys(self) -> Sequence[int]:
        return self.request.block_keys[self.first : self.first + self.count]

    @property
    def parent_key(self) -> int | None:
        return self.request.block_keys[self.first - 1] if self.first else None


@dataclass(slots=True)
class KvBatch:
    """What one step changed in the prefix cache, to be applied in this order: cleared, removed, stored."""

    time_s: float
    cleared: bool
    removed: list[int]
    stored: list[Stored]


@dataclass(slots=True)
class StepResult:
    """What one step did, or a run of pure decode steps (`steps` > 1); true at `end_s`.

    Every request decoding got one token a step; every one in `prefilled` got one as well.
    """

    start_s: float
    end_s: float
    steps: int
    decode_tokens: int
    prefill_tokens: int
    joules: float
    prefilled: list[Request]
    """Requests whose prompt was completed: first tokens, and the next token of requests resumed after a preemption."""
    finished: list[Request]
    preempted: list[Request]
    kv_batches: list[KvBatch]

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def tokens(self) -> int:
        """Tokens the steps processed (vLLM: iteration_tokens)."""
        return self.decode_tokens + self.prefill_tokens


@dataclass(slots=True)
class EngineStats:
    """Counters since the start. Prefix queries and hits count tokens, at a request's first scheduling."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of requests that got their first token."""
    prompt_tokens_cached: int = 0
    prompt_tokens_received: int = 0
    external_queries: int = 0
    """Tokens asked from other engines, as prefix queries."""
    external_hits: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
