"""One vLLM-like engine in virtual time: the scheduler's steps, and what each takes in seconds and joules. Pure.

Two ways to drive it, not to be mixed:

- `step(now_s)` runs one step and tells its duration; the caller lets that time pass. For servers in real time.
- `advance(until_s)` runs all steps up to a virtual time and reports what became visible by then. Steps that only decode are
  taken together: the work per step is a look at the requests that reach a block boundary in it. The outcome is the same, to
  the bit, as that of single steps.

The clock is where the last work began plus the seconds of all work since (`WorkMeter`); it moves on by `step`, `advance` and
idling only, never by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from kvfleet_api.cost import CostModel
from kvfleet_sim.energy import WorkMeter
from kvfleet_sim.kv_cache import KvCache
from kvfleet_sim.request import EngineStats, KvBatch, Request, State, StepResult
from kvfleet_sim.scheduler import Scheduler


class Engine:
    """One worker's engine. `blocks` defaults to what the cost model's `kv_tokens` hold.

    `record_events` makes it report prefix-cache changes; `max_loras` limits the adapters in one step.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        block_tokens: int = 16,
        blocks: int | None = None,
        prefix_caching: bool = True,
        priority_scheduling: bool = False,
        max_loras: int | None = None,
        record_events: bool = False,
        start_s: float = 0.0,
    ) -> None:
        if cost.max_sequences < 1:
            raise ValueError(f"max_sequences must be at least 1, got {cost.max_sequences}")
        if cost.max_step_tokens < cost.max_sequences:
            raise ValueError(
                f"max_step_tokens ({cost.max_step_tokens}) must be at least max_sequences ({cost.max_sequences}): "
                "raise --max-num-batched-tokens or lower --max-num-seqs"
            )
        self.cost = cost
        self.cache = KvCache(
            cost.kv_tokens // block_tokens if blocks is None else blocks,
            block_tokens,
            prefix_caching=prefix_caching,
            record=record_events,
        )
        self.meter = WorkMeter(cost)
        self.stats = EngineStats()
        self._scheduler = Scheduler(
            self.cache,
            max_step_tokens=cost.max_step_tokens,
            max_sequences=cost.max_sequences,
            by_priority=priority_scheduling,
            max_loras=max_loras,
            record_events=record_events,
        )
        self._decoding = self._scheduler.decoding
        self._submitted = 0
        self._anchor_s, self._anchor_busy_s = start_s, 0.0
        self._step_start_s, self._step_joules = start_s, 0.0
        self._pending: StepResult | None = None  # `advance` only: a step in progress

    @property
    def clock_s(self) -> float:
        """End of the last step: when the next one may start."""
        return self._anchor_s + (self.meter.busy_s() - self._anchor_busy_s)

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    @property
    def running(self) -> Collection[Request]:
        """The requests in the batch, in order of admission."""
        return self._scheduler.running

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def num_deferred(self) -> int:
        """Waiting requests that lack a LoRA slot."""
        return self._scheduler.num_deferred

    @property
    def num_decoding(self) -> int:
        return self._decoding.count

    @property
    def context_tokens(self) -> int:
        """Prompt and output tokens of the requests decoding."""
        return self._decoding.context_tokens

    @property
    def capacity_tokens(self) -> int:
        """Longest prompt plus output a request can have (the last token of an output is never in the KV cache)."""
        return self.cache.capacity * self.cache.block_tokens + 1

    @property
    def running_loras(self) -> list[str]:
        return sorted(self._scheduler.loras)

    @property
    def waiting_loras(self) -> list[str]:
        return sorted({request.lora for request in self._scheduler.waiting if request.lora is not None})

    def generated(self, request: Request) -> int:
        """Output tokens of a request by the end of the last step."""
        return self._decoding.generated(request) if request.state is State.DECODE else request.generated

    def joules_at(self, now_s: float) -> float:
        """Energy used by `now_s`, a step in progress counted as far as it has come."""
        clock_s = self.clock_s
        if now_s >= clock_s:
            return self.meter.joules() + self.cost.idle_watts * (now_s - clock_s)
        share_left = min(1.0, (clock_s - now_s) / (clock_s - self._step_start_s))
        return self.meter.joules() - self._step_joules * share_left

    def idle_s_at(self, now_s: float) -> float:
        """Seconds that nothing ran, by `now_s`."""
        return self.meter.idle_s + max(0.0, now_s - self.clock_s)

    def next_event_s(self) -> float:
        """Nothing becomes visible before this time unless something is submitted; infinite when there is no work."""
        if self._pending is not None:
            return self._pending.end_s
        if not self.has_work:
            return math.inf
        if self._scheduler.decodes_only:
            return self._time_after(self._decoding.steps_to_finish())
        return math.nextafter(self.clock_s, math.inf)

    def check(self, request: Request) -> None:
        """Raises ValueError where a request can never be served."""
        if request.state is not State.NEW:
            raise ValueError(f"request {request.id!r} was submitted before")
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(f"request {request.id!r} needs at least one prompt token and one output token")
        if request.prompt_tokens + request.output_tokens > self.capacity_tokens:
            raise ValueError(
                f"request {request.id!r} has {request.prompt_tokens} prompt and {request.output_tokens} output tokens, "
                f"the KV cache holds {self.capacity_tokens}: shorten it or give the engine more KV tokens"
            )

    def submit(self, request: Request, now_s: float) -> None:
        """Put a request into the waiting queue. Raises ValueError where it can never be served."""
        self.check(request)
        if not self.has_work and self._pending is None:
            self._wake(now_s)
        request.arrival_s = now_s
        request.order = self._submitted
        self._submitted += 1
        self._scheduler.enqueue(request)

    def abort(self, request: Request) -> bool:
        """Drop a request and free what it holds. False if it was finished or unknown already."""
        pending = self._pending
        if not self._scheduler.drop(request) and (pending is None or request not in pending.finished):
            return False
        if pending is not None:  # what the step in progress did for it will not be reported
            pending.finished = [other for other in pending.finished if other is not request]
            pending.prefilled = [other for other in pending.prefilled if other is not request]
        request.state = State.ABORTED
        self.stats.aborted += 1
        return True

    def clear_prefix_cache(self, *, preempt: bool = False) -> bool:
        """Forget all cached blocks; refused while requests run, unless they may be preempted."""
        if preempt:
            for request in reversed(list(self._scheduler.running)):
                self._scheduler.preempt(request)
                self.stats.preemptions += 1
        return self._scheduler.clear_cache()

    def step(self, now_s: float) -> StepResult | None:
        """Run one step, starting at `now_s` or at the end of the last step if that is later. None without work."""
        if not self.has_work:
            return None
        self._wake(now_s)
        return self._step()

    def advance(self, until_s: float) -> list[StepResult]:
        """Run every step that starts before `until_s`; what became visible up to `until_s`, in order of time."""
        results: list[StepResult] = []
        while True:
            if self._pending is not None:
                if self._pending.end_s > until_s:
                    return results
                results.append(self._pending)
                self._pending = None
            if not self.has_work or self.clock_s >= until_s:
                return results
            run = self._decode_run(until_s) if self._scheduler.decodes_only else None
            if run is not None:
                results.append(run)
            else:
                self._pending = self._step()

    def _wake(self, now_s: float) -> None:
        """Idle until `now_s`."""
        clock_s = self.clock_s
        if now_s > clock_s:
            self.meter.idle_s += now_s - clock_s
            self._anchor_s, self._anchor_busy_s = now_s, self.meter.busy_s()

    def _time_after(self, steps: int) -> float:
        """End of the next `steps` steps if they only decode."""
        busy_s = self.meter.busy_s_after(steps, self._decoding.count, self._decoding.context_tokens)
        return self._anchor_s + (busy_s - self._anchor_busy_s)

    def _step(self) -> StepResult:
        start_s, joules = self.clock_s, self.meter.busy_joules()
        plan = self._scheduler.schedule()
        for request in plan.admitted:
            self._count_admission(request, start_s)
        decoding = self._decoding.count
        prefill_tokens = self._meter(decoding, plan.chunks)
        self._decoding.tick(1)
        end_s = self.clock_s
        self._step_start_s, self._step_joules = start_s, self.meter.busy_joules() - joules
        self.stats.generation_tokens += decoding + len(plan.prefilled)
        self.stats.preemptions += len(plan.preempted)
        return StepResult(
            start_s=start_s,
            end_s=end_s,
            steps=1,
            decode_tokens=decoding,
            prefill_tokens=prefill_tokens,
            joules=self._step_joules,
            prefilled=plan.prefilled,
            finished=self._take_finished(end_s) + self._take_prefilled(plan.prefilled, end_s),
            preempted=plan.preempted,
            kv_batches=[self._scheduler.take_events(end_s)] if self._scheduler.has_events else [],
        )

    def _meter(self, decoding: int, chunks: list[tuple[int, int]]) -> int:
        """Count the work of one step. Returns its prefill tokens."""
        for tokens, end in chunks:
            self.meter.prefill(tokens, end)
        if decoding:
            self.meter.decode(1, decoding, self._decoding.context_tokens)
        elif chunks:
            self.meter.prefill_only_step(chunks)
        return sum(tokens for tokens, _ in chunks)

    def _count_admission(self, request: Request, now_s: float) -> None:
        if request.scheduled_s is None:
            request.scheduled_s = now_s
            self.stats.prefix_queries += request.prompt_tokens
            self.stats.prefix_hits += request.cached_tokens
            if request.remote_tokens:
                self.stats.external_queries += request.prompt_tokens - request.cached_tokens
                self.stats.external_hits += request.received_tokens

    def _take_prefilled(self, prefilled: list[Request], end_s: float) -> list[Request]:
        """Give these their token; those that needed but this one are finished, the others decode from now on."""
        finished = []
        for request in prefilled:
            request.generated += 1
            if request.first_token_s is None:
                request.first_token_s = end_s
                self.stats.prompt_tokens += request.prompt_tokens
                self.stats.prompt_tokens_cached += request.cached_tokens
                self.stats.prompt_tokens_received += request.received_tokens
            if request.generated == request.output_tokens:
                self._finish(request, end_s)
                finished.append(request)
            else:
                self._decoding.join(request)
        return finished

    def _take_finished(self, end_s: float) -> list[Request]:
        finished = self._decoding.take_finished()
        for request in finished:
            self._finish(request, end_s)
        return finished

    def _finish(self, request: Request, end_s: float) -> None:
        self._scheduler.leave(request)
        request.state = State.FINISHED
        request.finish_s = end_s
        self.stats.finished += 1

    def _decode_run(self, until_s: float) -> StepResult | None:
        """All decode steps that end by `until_s`, up to the first finish or lack of blocks. None if there is none."""
        start_s, joules, first = self.clock_s, self.meter.busy_joules(), self._decoding.steps
        batches: list[KvBatch] = []
        count = 0
        for ahead in range(self._steps_until(until_s)):
            if not self._scheduler.grow_decoding(ahead):
                break
            self._scheduler.store_decoded(first + ahead)
            count += 1
            if self._scheduler.has_events:
                batches.append(self._scheduler.take_events(self._time_after(count)))
        if not count:
            return None
        tokens = count * self._decoding.count
        self.meter.decode(count, self._decoding.count, self._decoding.context_tokens)
        self._decoding.tick(count)
        self.stats.generation_tokens += tokens
        end_s = self.clock_s
        return StepResult(
            start_s=start_s,
            end_s=end_s,
            steps=count,
            decode_tokens=tokens,
            prefill_tokens=0,
            joules=self.meter.busy_joules() - joules,
            prefilled=[],
            finished=self._take_finished(end_s),
            preempted=[],
            kv_batches=batches,
        )

    def _steps_until(self, until_s: float) -> int:
        """How many decode steps, at most up to the first finish, end by `until_s`."""
        most = self._decoding.steps_to_finish()
        if self._time_after(most) <= until_s:
            return most
        low, high = 0, most  # `low` steps end in time, `high` steps do not
        while high - low > 1:
            middle = (low + high) // 2
            if self._time_after(middle) <= until_s:
                low = middle
            else:
                high = middle
        return low
