"""Which requests run in a step, and on which KV blocks: scheduling as vLLM (v1) does it. Pure; knows no time.

1. Every decoding request gets one token. Where one needs a new block and none is free, the request admitted last (under
   priority scheduling: the least important one) is preempted: its blocks are freed, it goes back to the queue and will
   recompute what is no longer cached.
2. What is left of the token budget goes to the prompt in progress, then to waiting requests in order (first come, or
   priority), as long as sequences, blocks for the *whole* prompt, and LoRA slots allow. A prompt that exceeds the budget is
   cut into chunks, so at most one is in progress at the end of a step.
3. Full blocks become findable at once. A prompt's last token is always computed, so a fully cached prompt of k blocks hits
   k - 1 of them.

One difference to vLLM: a request that did not fit is tried again only after something was freed or submitted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvfleet_sim.batch import DecodeBatch, WaitingQueue
from kvfleet_sim.kv_cache import KvCache
from kvfleet_sim.request import KvBatch, Request, State, Stored


@dataclass(slots=True)
class Schedule:
    """What a step does besides one token for every decoding request."""

    admitted: list[Request] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """(tokens, position of the last one) of each prefill chunk."""
    prefilled: list[Request] = field(default_factory=list)
    """Requests whose last chunk is among them."""
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    def __init__(
        self,
        cache: KvCache,
        *,
        max_step_tokens: int,
        max_sequences: int,
        by_priority: bool,
        max_loras: int | None,
        record_events: bool,
    ) -> None:
        self.cache = cache
        self.waiting = WaitingQueue(by_priority=by_priority)
        self.running: dict[Request, None] = {}  # in order of admission
        self.decoding = DecodeBatch(cache.block_tokens)
        self.loras: Counter[str] = Counter()  # adapters of the running requests
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._by_priority = by_priority
        self._max_loras = max_loras
        self._record_events = record_events
        self._prefilling: Request | None = None  # the running request whose prompt is cut across steps
        self._admissible = False  # whether trying to admit could succeed
        self._stored: list[Stored] = []
        self._cleared = False

    @property
    def decodes_only(self) -> bool:
        """Whether the next step, blocks permitting, gives decoding requests one token and does nothing else."""
        return self.decoding.count > 0 and self._prefilling is None and not (self.waiting and self._admissible)

    @property
    def num_deferred(self) -> int:
        """Waiting requests that lack a LoRA slot."""
        return sum(1 for request in self.waiting if self._lora_slot_missing(request))

    def enqueue(self, request: Request) -> None:
        self.waiting.push(request)
        self._admissible = True

    def drop(self, request: Request) -> bool:
        """Take a request out wherever it is. False if it is not here."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
            self._admissible = True
        elif request.state in (State.PREFILL, State.DECODE):
            self.leave(request)
        else:
            return False
        return True

    def schedule(self) -> Schedule:
        """Decide on one step and allocate its blocks."""
        plan = Schedule()
        if not self.grow_decoding():
            self._grow_preempting(plan)
        budget = self._continue_prefill(self._max_step_tokens - self.decoding.count, plan)
        if self._admissible and not plan.preempted:
            self._admit(budget, plan)
        self.store_decoded(self.decoding.steps)
        return plan

    def grow_decoding(self, ahead: int = 0) -> bool:
        """A block for each request whose token, `ahead` steps from now, starts one. False: not enough, none given."""
        due = self.decoding.starting_block(self.decoding.steps + ahead)
        if not due:
            return True
        if len(due) > self.cache.free:
            return False
        for request, block in zip(due, self.cache.allocate(len(due)), strict=True):
            request.blocks.append(block)
        return True

    def store_decoded(self, step: int) -> None:
        """Make findable the blocks that step number `step` fills."""
        for request in self.decoding.filling_block(step):
            self._store(request, len(request.blocks) - 1, len(request.blocks))

    def leave(self, request: Request) -> None:
        """Take a running request out: its place and its blocks."""
        del self.running[request]
        if request is self._prefilling:
            self._prefilling = None
        elif request.state is State.DECODE:
            self.decoding.leave(request)
        self.cache.release(request.blocks)
        request.blocks = []
        request.computed_tokens = 0
        if request.lora is not None:
            self.loras[request.lora] -= 1
            if not self.loras[request.lora]:
                del self.loras[request.lora]
        self._admissible = True

    def preempt(self, request: Request) -> None:
        self.leave(request)
        request.preemptions += 1
        self.enqueue(request)

    def clear_cache(self) -> bool:
        if not self.cache.clear():
            return False
        self._cleared = self._record_events
        return True

    @property
    def has_events(self) -> bool:
        """Whether the prefix cache changed since `take_events`. A clearing alone waits for the next change, as in vLLM."""
        return bool(self._stored or self.cache.removed)

    def take_events(self, time_s: float) -> KvBatch:
        batch = KvBatch(time_s, self._cleared, self.cache.removed, self._stored)
        self.cache.removed, self._stored, self._cleared = [], [], False
        return batch

    def _grow_preempting(self, plan: Schedule) -> None:
        for request in list(self.decoding.starting_block(self.decoding.steps)):
            if request.state is State.DECODE and self._make_room(request, 1, plan):
                request.blocks += self.cache.allocate(1)

    def _continue_prefill(self, budget: int, plan: Schedule) -> int:
        """The next chunk of the prompt in progress. Returns the budget left."""
        request = self._prefilling
        if request is None or not self._make_room(request, self._blocks_missing(request, budget), plan):
            return budget
        return budget - self._chunk(request, budget, plan)

    def _admit(self, budget: int, plan: Schedule) -> None:
        """Start waiting requests, in order, until something they need runs out."""
        deferred: list[Request] = []
        while budget > 0 and self.waiting:
            if len(self.running) >= self._max_sequences:
                self._admissible = False
                break
            request = self.waiting.first
            if self._lora_slot_missing(request):
                deferred.append(self.waiting.pop())
                continue
            hits = self._fitting_hits(request)
            if hits is None:
                self._admissible = False
                break
            self.waiting.pop()
            self._start(request, hits)
            plan.admitted.append(request)
            budget -= self._chunk(request, budget, plan)
        if deferred:
            self._admissible = self._admissible and bool(self.waiting)
            for request in deferred:
                self.waiting.push(request)

    def _fitting_hits(self, request: Request) -> list[int] | None:
        """The request's cached blocks, if the rest of its tokens finds room beside them."""
        block_tokens = self.cache.block_tokens
        tokens = request.prompt_tokens + request.generated
        hits = self.cache.lookup(request.block_keys, (tokens - 1) // block_tokens)
        missing = -(-tokens // block_tokens) - len(hits)
        return hits if missing + self.cache.idle_among(hits) <= self.cache.free else None

    def _start(self, request: Request, hits: list[int]) -> None:
        self.cache.hold(hits)
        request.blocks = hits
        request.computed_tokens = len(hits) * self.cache.block_tokens
        if not request.preemptions:
            request.cached_tokens = request.computed_tokens
            request.received_tokens = self._chunk_start(request) - request.computed_tokens
        request.state = State.PREFILL
        self.running[request] = None
        if request.lora is not None:
            self.loras[request.lora] += 1

    def _chunk(self, request: Request, budget: int, plan: Schedule) -> int:
        """Compute the prompt's next tokens, for which blocks are free. Returns how many."""
        start = self._chunk_start(request)
        total = request.prompt_tokens + request.generated
        end = min(total, start + budget)
        request.blocks += self.cache.allocate(self._blocks_missing(request, budget))
        self._store(request, request.computed_tokens // self.cache.block_tokens, end // self.cache.block_tokens)
        request.computed_tokens = end
        plan.chunks.append((end - start, end))
        if end == total:
            self._prefilling = None
            plan.prefilled.append(request)
        else:
            self._prefilling = request
        return end - start

    def _chunk_start(self, request: Request) -> int:
        """The first token to compute. What another engine sent is there, but lost with a preemption."""
        received = 0 if request.preemptions else min(request.remote_tokens, request.prompt_tokens - 1)
        return max(request.computed_tokens, received)

    def _blocks_missing(self, request: Request, budget: int) -> int:
        end = min(request.prompt_tokens + request.generated, self._chunk_start(request) + budget)
        return -(-end // self.cache.block_tokens) - len(request.blocks)

    def _store(self, request: Request, first: int, end: int) -> None:
        """Make blocks [first, end) of a request findable, as far as it has keys for them."""
        end = min(end, len(request.block_keys))
        if first >= end or not self.cache.prefix_caching:
            return
        self.cache.store(request.blocks[first:end], request.block_keys[first:end])
        if self._record_events:
            self._stored.append(Stored(request, first, end - first))

    def _lora_slot_missing(self, request: Request) -> bool:
        return (
            self._max_loras is not None
            and request.lora is not None
            and request.lora not in self.loras
            and len(self.loras) >= self._max_loras
        )

    def _make_room(self, request: Request, blocks: int, plan: Schedule) -> bool:
        """Preempt until `blocks` blocks are free. False if `request` itself had to go."""
        while self.cache.free < blocks:
            victim = self._victim()
            self.preempt(victim)
            plan.preempted.append(victim)
            if victim is request:
                return False
        return True

    def _victim(self) -> Request:
        if self._by_priority:
            return max(self.running, key=lambda request: (request.priority, request.order))
        return next(reversed(self.running))
