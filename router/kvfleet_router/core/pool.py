"""The fleet as the router knows it: pools, their workers, the prefix index over them, and what models have taught.

A worker keeps its accounting and cache view as long as its name and URL stay the same. `version` counts every change of
who may get requests; lists of candidates are rebuilt when it moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp
from typing import Final

from kvfleet_api.cost import CostModel
from kvfleet_api.fleetconfig import PoolConfig
from kvfleet_router.core.calibration import PUBLISH_CHANGE, Calibration, OutputLengths, TokenRatio
from kvfleet_router.core.columns import Table
from kvfleet_router.core.energy import pack_target, watts
from kvfleet_router.core.energyfit import Figures
from kvfleet_router.core.index import PrefixIndex
from kvfleet_router.core.kvevents.view import ModelView
from kvfleet_router.core.predict import backlog_s
from kvfleet_router.core.worker import PREFILL_SHARE_WINDOW_S, Worker, WorkerEndpoint

LOAD_PERIOD_S: Final = 0.25
RATIO_STEP: Final = 0.05
"""Cache capacities follow the learned bytes per token in steps of this size."""


class ModelStats:
    """What requests for one model have taught: prompt bytes per token, output lengths, mean prompt and its uncached part."""

    __slots__ = ("mean_prompt_tokens", "mean_uncached_tokens", "outputs", "ratio")

    def __init__(self) -> None:
        self.ratio = TokenRatio()
        self.outputs = OutputLengths()
        self.mean_prompt_tokens = self.mean_uncached_tokens = 1024.0


class Pool:
    """One ModelPool's workers and what they share."""

    def __init__(
        self, config: PoolConfig, stats: ModelStats, index: PrefixIndex, block_bytes: int, itl_slo_s: float
    ) -> None:
        self.name = config.name
        self.workers: dict[str, Worker] = {}
        self.view: ModelView | None = None
        """What its workers hold by their own word; none: it is guessed."""
        self.why_guessed = "NoTokenizer"
        """While `view` is none."""
        self._index = index
        self.load = 0.0
        """Mean of the workers that get what comes: 0 idle, 1 at the edge of the ITL SLO."""
        self.capacity_rps = 0.0
        """Mean requests per second its workers could serve there."""
        self.joules_trusted = True
        """Joules may steer: there is no telemetry, or it and what was learned from it can be believed."""
        self._start_learning(config.cost)
        self.adopt(config, stats, block_bytes, itl_slo_s)

    def adopt(self, config: PoolConfig, stats: ModelStats, block_bytes: int, itl_slo_s: float) -> None:
        """Take a new configuration; workers start learning anew if the cost model is another."""
        self.config = config
        self.stats = stats
        self.block_bytes = block_bytes
        self.itl_slo_s = itl_slo_s
        self.served = frozenset([config.model, *config.adapters])
        if config.cost != self.cost:
            self._start_learning(config.cost)
        self._fit_blocks()

    def _start_learning(self, cost: CostModel) -> None:
        self.cost = cost
        self._prefill_s_per_token = cost.prefill_s_per_token
        self._prefill_s_per_token_pair = cost.prefill_s_per_token_pair
        self.joules = Figures.of(cost)
        self.calibration = Calibration(cost.step_s, cost.step_s_per_sequence)
        self.prefill_factor, self.step_s, self.step_s_per_sequence = self.calibration.figures()
        self._unpublished = 0
        for worker in self.workers.values():
            worker.start_learning()

    def publish(self) -> None:
        """Let all workers take over what was learned, once it has changed noticeably; not more often than it pays."""
        self._unpublished += 1
        if self._unpublished < len(self.workers):
            return
        self._unpublished = 0
        published = (self.prefill_factor, self.step_s, self.step_s_per_sequence)
        learned = self.calibration.figures()
        if any(abs(new - old) > PUBLISH_CHANGE * old for new, old in zip(learned, published, strict=True)):
            self.prefill_factor, self.step_s, self.step_s_per_sequence = learned
            for worker in self.workers.values():
                worker.adopt_costs()

    def learned_joules(self, figures: Figures) -> None:
        """Energy coefficients from telemetry."""
        self.joules = figures
        for worker in self.workers.values():
            worker.adopt_costs()

    def fit_blocks_if_moved(self) -> None:
        """Follow the learned bytes per token once they have moved noticeably."""
        if abs(self.block_bytes / self.stats.ratio.bytes_per_token / self.block_tokens - 1.0) > RATIO_STEP:
            self._fit_blocks()

    def _fit_blocks(self) -> None:
        self.block_tokens = self.block_bytes / self.stats.ratio.bytes_per_token
        for worker in self.workers.values():
            self._index.set_capacity(worker.cache, self.capacity_blocks)
            worker.adopt_costs()

    @property
    def capacity_blocks(self) -> int:
        """Blocks a worker's KV cache holds."""
        return int(self.cost.kv_tokens / self.block_tokens)

    def serves(self, model: str) -> bool:
        return model in self.served or self.config.model == "*"

    @property
    def asleep(self) -> bool:
        """Scaled to zero, and waking up when asked."""
        return self.config.scales_to_zero and not any(worker.assignable for worker in self.workers.values())

    def _taking(self) -> list[Worker]:
        """The workers that get what comes: not those about to be taken away, while there are others."""
        ready = [worker for worker in self.workers.values() if worker.assignable]
        return [worker for worker in ready if not worker.endpoint.draining] or ready

    def refresh_load(self) -> None:
        loads = [_load(worker, self.itl_slo_s) for worker in self._taking()]
        self.load = sum(loads) / len(loads) if loads else 0.0
        self.capacity_rps = len(loads) / self._service_s()

    def _service_s(self) -> float:
        """Seconds of a worker that a mean request takes when as many decode as the ITL SLO and the KV tokens allow."""
        stats, cost = self.stats, self.cost
        context = stats.mean_prompt_tokens + stats.outputs.mean / 2
        slope_s = self.step_s_per_sequence + cost.step_s_per_context_token * context
        room = min(float(cost.max_sequences), cost.kv_tokens / max(context, 1.0))
        sequences = max(min(room, (self.itl_slo_s - self.step_s) / slope_s if slope_s > 0 else room), 1.0)
        prefill_s = self.prefill_factor * cost.prefill_s(stats.mean_uncached_tokens, stats.mean_prompt_tokens)
        return max(prefill_s + stats.outputs.mean * (self.step_s / sequences + slope_s), 1e-6)

    def prefill_s(self, uncached_tokens: float, prompt_tokens: float) -> float:
        """`CostModel.prefill_s`, for every request: the router's own arithmetic is compiled."""
        context = prompt_tokens - uncached_tokens / 2
        return uncached_tokens * (self._prefill_s_per_token + self._prefill_s_per_token_pair * context)

    def unloaded_ttft_s(self, prompt_tokens: float) -> float:
        """TTFT of an uncached prompt on an idle worker."""
        return self.prefill_factor * self.prefill_s(prompt_tokens, prompt_tokens) + self.step_s

    def predicted_ttft_s(self, cached_share: float, now: float) -> float:
        """TTFT of a mean prompt that came now and found this share of itself cached; without a worker: on an idle one."""
        prompt = self.stats.mean_prompt_tokens
        own = self.prefill_factor * self.cost.prefill_s(prompt * (1.0 - cached_share), prompt)
        waits = [backlog_s(worker, now) + worker.inflation * own + worker.step_now_s for worker in self._taking()]
        return min(waits, default=own + self.step_s)

    def pack_target(self) -> int:
        """[b*] Sequences to fill a worker with before another one is used."""
        stats = self.stats
        prefill_s = self.prefill_factor * self.cost.prefill_s(stats.mean_uncached_tokens, stats.mean_prompt_tokens)
        return pack_target(
            self.cost,
            step_s=self.step_s,
            step_s_per_sequence=self.step_s_per_sequence,
            itl_slo_s=self.itl_slo_s,
            context_tokens=stats.mean_prompt_tokens + stats.outputs.mean,
            prefill_s_per_output_token=prefill_s / stats.outputs.mean,
        )

    def packed_sequences(self, now: float) -> float:
        """What this router has at the pool, in sequences of workers that are filled to the pack target.

        Requests in flight are no measure of demand: on half-empty workers they end sooner, so fewer are in flight for the same
        load, and a fleet sized by them shrinks until it is overloaded, grows, and shrinks again. This figure is the same
        however many workers the load is spread over.
        """
        target = self.pack_target()
        return sum(packed_sequences(worker, target, now) for worker in self.workers.values() if not worker.removed)

    def watts(self) -> float:
        """What the pool's workers draw by the cost model."""
        return sum(worker_watts(worker) for worker in self.workers.values())


def worker_watts(worker: Worker, more: int = 0) -> float:
    """What the worker draws by the cost model, once those without a first token decode too, and `more` besides."""
    waiting = worker.pending + more
    step_s = worker.step_now_s + waiting * worker.step_s_per_sequence
    return watts(worker.pool_state.cost, worker.decoding + waiting, worker.context_tokens, step_s)


def packed_sequences(worker: Worker, target: int, now: float) -> float:
    """This router's part of the worker's work, in sequences of a worker that is filled to `target`.

    Of its time, the share in prefill, and of the rest as much as decoding its tokens would take at `target` sequences a step.
    Fuller workers count as many as they have.
    """
    in_flight = worker.in_flight
    if in_flight >= target:
        return float(worker.own.in_flight)
    prefill = min(worker.prefill_share * exp((worker.prefill_share_at - now) / PREFILL_SHARE_WINDOW_S), 1.0)
    context = worker.context_tokens / worker.decoding if worker.decoding else 0.0
    full_step_s = worker.step_s + target * (worker.step_s_per_sequence + worker.step_s_per_context_token * context)
    decode = worker.decoding * full_step_s / (target * worker.step_now_s)
    mine = worker.own.in_flight / in_flight if worker.elsewhere.in_flight else 1.0
    return mine * target * min(prefill + (1.0 - prefill) * decode, 1.0)


def _load(worker: Worker, itl_slo_s: float) -> float:
    """The share of its time in prefill, and of what is left the share of the tokens it could decode at the edge of the ITL
    SLO; or the share of its KV tokens in use, if that is more.

    A worker's tokens per second with n sequences are to those with many as (step − W) to step. So the mean over workers is the
    same however the load is spread over them: packing does not make a fleet look busier.
    """
    step_s, fixed_s = worker.step_now_s, worker.step_s
    edge = max(1.0 - fixed_s / itl_slo_s, 0.05)
    prefill = min(worker.prefill_share, 1.0)
    load = prefill + (1.0 - prefill) * (1.0 - fixed_s / step_s) / edge
    return min(max(load, worker.kv_used_tokens / worker.kv_tokens, 0.0), 1.0)


class Fleet:
    """All pools by name, one prefix index, one table of columns."""

    def __init__(self) -> None:
        self.pools: dict[str, Pool] = {}
        self.index = PrefixIndex()
        self.table = Table()
        self.version = 0
        self.stats: dict[str, ModelStats] = {}
        self._loads_due = 0.0
        self.views = 0
        """Pools whose workers tell what they hold."""
        self._by_name: dict[str, Worker] = {}
        self._by_name_version = 0

    def use_view(self, pool: Pool, view: ModelView | None, why: str = "NoTokenizer") -> None:
        """How the pool's workers' caches are known from now on. `why`: a reason in CamelCase where it is none."""
        pool.why_guessed = why
        if view is not pool.view:
            for worker in pool.workers.values():
                worker.hold(None)
            pool.view = view
            self.views = sum(pool.view is not None for pool in self.pools.values())

    def configure(
        self, configs: Iterable[PoolConfig], block_bytes: int, itl_slos: dict[str, float], now: float
    ) -> None:
        """Pools as configured from now on; those gone lose their workers."""
        wanted = {config.name: config for config in configs}
        for name in [name for name in self.pools if name not in wanted]:
            self.set_endpoints(name, [], now)
            self.use_view(self.pools[name], None)
            del self.pools[name]
        for name, config in wanted.items():
            stats = self.stats.setdefault(config.model, ModelStats())
            slo = itl_slos.get(name, 0.05)
            if name in self.pools:
                self.pools[name].adopt(config, stats, block_bytes, slo)
            else:
                self.pools[name] = Pool(config, stats, self.index, block_bytes, slo)
            if config.endpoints:
                static = [
                    WorkerEndpoint(e.name, e.url, kv_events_url=e.kv_events_url, kv_replay_url=e.kv_replay_url)
                    for e in config.endpoints
                ]
                self.set_endpoints(name, static, now)
        models = {config.model for config in wanted.values()}
        self.stats = {model: stats for model, stats in self.stats.items() if model in models}
        self.version += 1

    def set_endpoints(self, pool_name: str, endpoints: Sequence[WorkerEndpoint], now: float) -> list[Worker]:
        """The pool's workers from now on; returns those removed. An unknown pool has none. ValueError: nothing changed."""
        pool = self.pools.get(pool_name)
        if pool is None:
            return []
        listed = {endpoint.name: endpoint for endpoint in endpoints}
        for told in listed.values():
            known = pool.workers.get(told.name)
            if known is None or known.url != told.url:
                _ = told.address  # raises where it is none
        removed = []
        for worker in list(pool.workers.values()):
            endpoint = listed.get(worker.name)
            if endpoint is not None and endpoint.url == worker.url:
                worker.endpoint = endpoint
                continue
            worker.hold(None)  # before its bit is another's
            worker.remove()
            self.index.remove_worker(worker.cache)
            removed.append(pool.workers.pop(worker.name))
        turns = min((worker.sent_requests for worker in pool.workers.values()), default=0)
        for name, endpoint in listed.items():
            if name not in pool.workers:
                cache = self.index.add_worker(pool.capacity_blocks)
                worker = Worker(endpoint, pool, cache, self.table, now)
                worker.sent_requests = turns
                pool.workers[name] = worker
        self.version += 1
        return removed

    def workers(self) -> list[Worker]:
        return [worker for pool in self.pools.values() for worker in pool.workers.values()]

    def by_name(self) -> dict[str, Worker]:
        """The workers now known, by name."""
        if self._by_name_version != self.version:
            self._by_name_version = self.version
            self._by_name = {worker.name: worker for worker in self.workers()}
        return self._by_name

    def refresh_loads(self, now: float) -> None:
        """Bring the pools' loads up to date, a few times a second."""
        if now >= self._loads_due:
            self._loads_due = now + LOAD_PERIOD_S
            for pool in self.pools.values():
                pool.refresh_load()
