"""Runs the engine in real time and brings its tokens to the clients.

One timer: it fires when the step in progress ends, delivers what the step produced, and starts the next step at the very
virtual time the last one ended, so a late timer does not slow the engine down. Virtual time is real time times `speed`.

When the process cannot keep up, steps run one after the other without waiting, tokens of several steps go out in one chunk
(as vLLM merges them when its front end is busy), and virtual time lags; `lag_s` tells by how much.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from kvfleet_sim.engine import Engine
from kvfleet_sim.generation import Choice, Job
from kvfleet_sim.metrics import PowerMetrics, WorkerMetrics
from kvfleet_sim.request import KvBatch, StepResult
from kvfleet_sim.responses import Responses

log = logging.getLogger(__name__)

MERGE_AFTER_S: Final = 0.02
"""Real seconds of lag from which on tokens are merged, and how long they may be held back for it."""


class Worker:
    def __init__(
        self,
        engine: Engine,
        responses: Responses,
        metrics: WorkerMetrics,
        power: PowerMetrics,
        *,
        speed: float,
        stream_interval: int,
        publish: Callable[[KvBatch], None] | None,
        transfer_s_per_token: float = 0.0,
    ) -> None:
        self._transfer_s_per_token = transfer_s_per_token
        self.engine = engine
        self._responses = responses
        self._metrics = metrics
        self._power = power
        self._speed = speed
        self._stream_interval = stream_interval
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._origin_s = self._loop.time()
        self._current: StepResult | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._flushed_s = 0.0
        self._jobs: set[Job] = set()
        self._stopped = False

    @property
    def now_s(self) -> float:
        """Virtual time; while a step is in progress, not beyond its end."""
        now_s = (self._loop.time() - self._origin_s) * self._speed
        return now_s if self._current is None else min(now_s, self._current.end_s)

    @property
    def jobs(self) -> int:
        """Requests accepted and not answered."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Accept a job. Raises ValueError where the engine can never serve one of its choices."""
        for choice in job.choices:
            self.engine.check(choice.request)
        self._jobs.add(job)
        job.exchange.on_close = lambda: self._forget(job)
        if job.params.stream:
            job.exchange.start_events()
        if job.params.remote_prefill:
            received_s = self._transfer_s_per_token * job.prompt_tokens / self._speed
            self._loop.call_later(received_s, self._enqueue, job)
        else:
            self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        if job not in self._jobs:  # its client left, or the server is shutting down
            return
        now_s = self.now_s
        if self._current is None:
            self._power.mark(now_s)
        for choice in job.choices:
            self.engine.submit(choice.request, now_s)
        if self._current is None:
            self._start_step(now_s)

    def abort_all(self) -> None:
        """End every job at once with what it has, reason `abort`."""
        for job in list(self._jobs):
            for choice in job.choices:
                if choice.finish_reason is None:
                    self.engine.abort(choice.request)
                    choice.stop_reason = None
                    self._finish(choice, "abort", choice.seen_tokens)

    def stop(self) -> None:
        """Run no further step; open streams get nothing more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _forget(self, job: Job) -> None:
        """The client is gone."""
        self._jobs.discard(job)
        for choice in job.choices:
            self.engine.abort(choice.request)

    def _start_step(self, start_s: float) -> None:
        self._current = self.engine.step(start_s) if not self._stopped else None
        if self._current is not None:
            self._timer = self._loop.call_at(self._origin_s + self._current.end_s / self._speed, self._step_ended)

    def _step_ended(self) -> None:
        result, self._current = self._current, None
        assert result is not None
        self._metrics.lag_s = lag_s = max(0.0, self._loop.time() - self._origin_s - result.end_s / self._speed)
        self._metrics.observe_step(result)
        self._power.mark(result.end_s)
        if self._publish is not None:
            for batch in result.kv_batches:
                self._publish(batch)
        merging = lag_s > MERGE_AFTER_S and self._loop.time() - self._flushed_s < MERGE_AFTER_S
        if not merging:
            self._flushed_s = self._loop.time()
            self._deliver_tokens()
        for request in result.finished:
            choice = request.payload
            assert isinstance(choice, Choice)
            if choice.job in self._jobs:
                reason = "length" if choice.stop_reason is None else "stop"
                self._metrics.observe_finished(request, reason)
                self._finish(choice, reason, request.generated)
        self._start_step(result.end_s)

    def _deliver_tokens(self) -> None:
        """Bring the streams up to date."""
        engine, interval = self.engine, self._stream_interval
        for request in engine.running:
            choice = request.payload
            assert isinstance(choice, Choice)
            choice.seen_tokens = generated = engine.generated(request)
            new = generated - choice.sent_tokens
            if not new or not choice.job.params.stream or (new < interval and choice.sent_tokens):
                continue
            exchange = choice.job.exchange
            if exchange.writable:
                exchange.send(*self._opening(choice.job), self._responses.chunk(choice, choice.sent_tokens, generated))
                choice.sent_tokens = generated

    def _opening(self, job: Job) -> Sequence[bytes]:
        if job.opened:
            return ()
        job.opened = True
        return self._responses.opening(job)

    def _finish(self, choice: Choice, reason: str, generated: int) -> None:
        """The last of a choice; and of the answer, if it was the last choice."""
        job, first = choice.job, choice.sent_tokens
        choice.finish_reason = reason
        choice.sent_tokens = generated
        if job.params.stream:
            job.exchange.send(*self._opening(job), self._responses.chunk(choice, first, generated))
        job.unfinished -= 1
        if job.unfinished:
            return
        self._jobs.discard(job)
        if job.params.stream:
            job.exchange.send(*self._responses.closing(job))
            job.exchange.end()
        else:
            job.exchange.respond(200, self._responses.whole(job))
