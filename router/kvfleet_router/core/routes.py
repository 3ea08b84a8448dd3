"""Which policy takes a request, and which workers of its pools may get it.

A Lane is one policy for one model: the pools of the policy that serve the model, by tier. `Routes.find` returns the lane
of the first policy (in the configuration's order) whose match fits; `Lane.candidates` the usable workers of the lowest
tier that has any. A worker is usable if it is ready and not leaving, its circuit closed (on probation: idle), below the
policy's limit of requests in flight, and has not failed this request before. Those that the autoscaler is about to take away
(`draining`) are used only where none of the others is usable. When none is usable, `Lane.last_resort` says
whether to wait, to try one that failed, or to give up.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvfleet_api.fleetconfig import PolicyConfig
from kvfleet_router.core.budget import RetryBudget
from kvfleet_router.core.columns import slots_of
from kvfleet_router.core.parse import ParsedRequest
from kvfleet_router.core.pool import Fleet, Pool
from kvfleet_router.core.ticket import Arrival, Refusal
from kvfleet_router.core.worker import Worker

if TYPE_CHECKING:
    from kvfleet_router.core.policy import Policy
    from kvfleet_router.core.powerbudget import PowerBudget

ANY = "*"
"""The model of a pool that takes any name: workers given by URL alone."""


Tier = list[tuple["Pool", int]]
"""Pools and their weights."""


class Candidates:
    """Workers to choose from, in the shapes that scoring wants."""

    __slots__ = ("guarded", "mask", "slots", "staying", "unlike", "workers")

    def __init__(self, workers: Iterable[Worker]) -> None:
        self.workers = tuple(workers)
        self.slots = slots_of([worker.cache.slot for worker in self.workers])
        self.guarded = any(worker.breaker.on_probation for worker in self.workers)
        self.mask = sum(worker.cache.bit for worker in self.workers)
        rates = {worker.pool_state.cost.prefill_s_per_token for worker in self.workers}
        self.unlike = min(max(rates) / max(min(rates), 1e-9) - 1.0, 1.0) if len(rates) > 1 else 0.0
        """How unlike their accelerators are: 0 where all compute a prompt equally fast, 1 where one takes twice as long as another."""
        self.staying = self
        """Those of them that come first; by themselves, all."""

    def without_draining(self) -> Candidates:
        """The same, those first that the autoscaler does not want to take away."""
        staying = [worker for worker in self.workers if not worker.endpoint.draining]
        if 0 < len(staying) < len(self.workers):
            self.staying = Candidates(staying)
        return self


class Lane:
    """One policy for one model."""

    def __init__(self, config: PolicyConfig, policy: Policy, model: str, fleet: Fleet) -> None:
        self.config = config
        self.policy = policy
        self.model = model
        self.adapter = False
        """The model is a LoRA adapter of the pools'."""
        self.rescan_at = 0.0
        """Held requests of the lane are not decided again before."""
        self.power_budgets: tuple[PowerBudget, ...] = ()
        """What its requests must not exceed."""
        self.budget = RetryBudget(config.resilience.retry_budget_percent / 100)
        self._fleet = fleet
        # What every request asks for: a field of a configuration's model costs as much as ten of ours.
        self.prices_energy = config.energy_mode != "Off"
        self.uses_prefix = policy.uses_prefix and config.prefix.enabled
        self.asks_views = self.uses_prefix and config.prefix.source != "Approximate"
        self.ttft_slo_s = config.ttft_slo_s
        self.resumes = config.resilience.resume
        self.hedge_after_ms = config.resilience.hedge_after_milliseconds
        self._in_flight_limit = config.admission.max_in_flight_per_worker
        self._context_tokens, self._priority = config.context_tokens, config.priority
        self._headers = [(match.name.lower().encode(), match.value.encode()) for match in config.headers]
        self._built: dict[tuple[str, ...], tuple[int, Candidates]] = {}
        tiers: dict[int, Tier] = {}
        prefill: dict[int, Tier] = {}
        for ref in config.pools:
            pool = fleet.pools.get(ref.name)
            if pool is not None and ref.weight > 0 and pool.serves(model):
                phase = prefill if pool.config.role == "Prefill" else tiers
                phase.setdefault(ref.tier, []).append((pool, ref.weight))
        self.tiers = [tiers[tier] for tier in sorted(tiers)]
        self.prefill_tiers = [prefill[tier] for tier in sorted(prefill)]
        self.pools = [pool for tier in self.tiers for pool, _ in tier]
        """Those that answer."""
        self.prefill_pools = [pool for tier in self.prefill_tiers for pool, _ in tier]
        """Those that compute prompts for Decode pools (disaggregation.py)."""
        self.priced = any(pool.cost.step_joules > 0 or pool.cost.token_joules > 0 for pool in self.pools)
        """It is known what requests take, so what a choice saves can be told."""
        self._fastest = min(self.pools, key=lambda pool: pool.cost.prefill_s_per_token, default=None)
        self._longest_context = max((pool.config.max_context_tokens or 2**62 for pool in self.pools), default=0)
        every = (*self.pools, *self.prefill_pools)
        self.adapter = any(model in pool.config.adapters for pool in every)
        self._context_limited = any(pool.config.max_context_tokens for pool in every)

    def matches(self, parsed: ParsedRequest, prompt_tokens: float) -> bool:
        """Headers, context length and priority; the model is known to match."""
        tokens, priority = self._context_tokens, self._priority
        if tokens and (prompt_tokens < tokens.min or (tokens.max is not None and prompt_tokens > tokens.max)):
            return False
        if priority and (
            parsed.priority < priority.min or (priority.max is not None and parsed.priority > priority.max)
        ):
            return False
        return all(parsed.headers.get(name) == value for name, value in self._headers)

    def unloaded_ttft_s(self, prompt_tokens: float) -> float:
        """Of a prompt of which nothing is cached, at an idle worker of the fastest pool."""
        return self._fastest.unloaded_ttft_s(prompt_tokens) if self._fastest is not None else 0.0

    def load(self) -> float:
        """How busy its pools are; 1 where joules cannot be trusted: at the edge of the SLO joules do not count."""
        return self.busy() if all(pool.joules_trusted for pool in self.pools) else 1.0

    def capacity_rps(self) -> float:
        """Mean requests per second that its pools could serve."""
        return sum(pool.capacity_rps for pool in self.pools)

    def busy(self) -> float:
        """How busy its pools are, by what they could serve: 0 idle, 1 at the edge of the SLO."""
        total = self.capacity_rps()
        return sum(pool.load * pool.capacity_rps for pool in self.pools) / total if total > 0 else 0.0

    def candidates(self, arrival: Arrival, rng: random.Random, *, prefill: bool = False) -> Candidates | None:
        """The usable workers of the lowest tier that has any. Strategies blind to cost get one pool, drawn by weight.

        `prefill`: those that compute prompts for others.
        """
        for tier in self.prefill_tiers if prefill else self.tiers:
            pools = (
                [(pool, weight) for pool, weight in tier if self._fits(pool, arrival)]
                if self._context_limited
                else tier
            )
            if len(pools) > 1 and not self.policy.measures_cost:
                groups = [[pool] for pool in _drawn_by_weight(pools, rng)]
            else:
                groups = [[pool for pool, _ in pools]]
            for group in groups:
                closed = self._closed(group)
                usable = self._usable(closed.staying, arrival)
                if usable is None and closed.staying is not closed:
                    usable = self._usable(closed, arrival)
                if usable is not None:
                    return usable
        return None

    def last_resort(self, arrival: Arrival) -> Candidates | Refusal | None:
        """No worker is usable: workers to try all the same, a refusal, or None: wait for one."""
        closed = self._closed(self.pools)
        fresh = [worker for worker in closed.workers if worker.name not in arrival.excluded]
        if fresh:
            return None  # at their limit, or on probation and busy
        if closed.workers:
            return closed
        ejected = [worker for pool in self.pools for worker in pool.workers.values() if worker.assignable]
        if ejected:
            return Candidates([worker for worker in ejected if worker.name not in arrival.excluded] or ejected)
        if any(pool.asleep for pool in self.pools):
            return None
        message = f"No worker of model {self.model!r} is ready: try again, or look at the pool's workers"
        return Refusal(503, "no_worker", message, retry_after_s=5, type="service_unavailable")

    def _fits(self, pool: Pool, arrival: Arrival) -> bool:
        """The prompt (an estimate) fits the pool's context, or no other pool's is longer."""
        context = pool.config.max_context_tokens
        return context is None or arrival.prompt_tokens <= context or context == self._longest_context

    def _closed(self, pools: Sequence[Pool]) -> Candidates:
        """Assignable workers with a closed circuit, built once per version of the fleet."""
        key = tuple([pool.name for pool in pools])
        built = self._built.get(key)
        if built is None or built[0] != self._fleet.version:
            workers = [worker for pool in pools for worker in pool.workers.values()]
            closed = Candidates(worker for worker in workers if worker.assignable and worker.breaker.open_until is None)
            built = self._built[key] = (self._fleet.version, closed.without_draining())
        return built[1]

    def _usable(self, closed: Candidates, arrival: Arrival) -> Candidates | None:
        limit = self._in_flight_limit
        if limit is None and not closed.guarded and not arrival.excluded:
            return closed if closed.workers else None
        workers = [
            worker
            for worker in closed.workers
            if (limit is None or worker.in_flight < limit)
            and not (worker.breaker.on_probation and worker.in_flight)
            and worker.name not in arrival.excluded
        ]
        if len(workers) == len(closed.workers):
            return closed if workers else None
        return Candidates(workers) if workers else None


def _drawn_by_weight(pools: list[tuple[Pool, int]], rng: random.Random) -> list[Pool]:
    """The pools in an order drawn by weight: the later ones stand in when the first has no usable worker."""
    left = list(pools)
    order = []
    while left:
        chosen = rng.choices(range(len(left)), [weight for _, weight in left])[0]
        order.append(left.pop(chosen)[0])
    return order


class Routes:
    """Lanes by model name."""

    def __init__(self, policies: Sequence[tuple[PolicyConfig, Policy]], fleet: Fleet) -> None:
        self._fleet = fleet
        self._policies = policies
        names = {name for pool in fleet.pools.values() for name in pool.served} - {ANY}
        names.update(name for config, _ in policies for name in config.models if name != ANY)
        self._lanes = {name: self._build(name) for name in names}
        self._any = self._build(ANY) if any(pool.config.model == ANY for pool in fleet.pools.values()) else []
        self.models = sorted({name for pool in fleet.pools.values() for name in pool.served} - {ANY})

    def _build(self, model: str) -> list[Lane]:
        lanes = []
        for config, policy in self._policies:
            if model in config.models or ANY in config.models:
                lane = Lane(config, policy, model, self._fleet)
                if lane.pools:
                    lanes.append(lane)
        return lanes

    def lanes(self) -> list[Lane]:
        return [lane for lanes in (*self._lanes.values(), self._any) for lane in lanes]

    def find(self, parsed: ParsedRequest) -> Lane | Refusal:
        """The lane that takes the request."""
        model = parsed.model
        if not model:
            if len(self.models) != 1 and not self._any:
                message = (
                    f"`model` is missing: name one of {', '.join(self.models[:20]) or 'the served models (none yet)'}"
                )
                return Refusal(400, "missing_required_parameter", message, param="model")
            model = ANY if self._any else self.models[0]
        lanes = self._lanes.get(model) or self._any
        for lane in lanes:
            if lane.matches(parsed, self.prompt_tokens(parsed, lane)):
                return lane
        if lanes or model in self.models:
            message = f"No routing policy takes this request for model {model!r}: check the policies' match"
            return Refusal(404, "no_matching_policy", message)
        message = f"The model {model!r} does not exist; served: {', '.join(self.models[:20]) or 'none'}"
        return Refusal(404, "model_not_found", message, param="model")

    @staticmethod
    def prompt_tokens(parsed: ParsedRequest, lane: Lane) -> float:
        """Known, or estimated from what the model's prompts have taught."""
        if parsed.prompt_tokens is not None:
            return max(float(parsed.prompt_tokens), 1.0)
        return max(parsed.prompt_bytes / lane.pools[0].stats.ratio.bytes_per_token, 1.0)
