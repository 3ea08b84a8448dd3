"""Which figures a pool is scaled on: from `spec.autoscaling.signals` to expressions and queries.

A total is always compared with a target per worker (AverageValue), and only figures that do not grow with the fleet are
compared with the target itself (Value). Mixing the two up, a mean taken for a total, makes an autoscaler stop at a few
workers whatever the load.

    signal            value                                                     target
    concurrency       in flight at the pool + its share of the routers' queues  spec
      without target  the same, in sequences of workers filled to b*            80 % of the routers' pack target b*
    queueDepth        its share of the routers' queues                          spec
    timeToFirstToken  predicted, mean over requests in flight; 0 when idle      percent of the SLO
    kvUsage           KV cache in use, summed over workers                      percent of one worker's
    prometheus        the query's result                                        spec

Requests in flight do not say how many workers are needed: spread over more workers each of them ends sooner, so there are
fewer. The routers say what they would be on full workers, which is the same for any number.

A queue belongs to a policy, not to a pool: the requests for a model are shared equally among the policy's pools that
serve it. Without concurrency's queue term a full pool would look no busier the longer its queue gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kvfleet_api.fleetconfig import FleetConfig, PoolConfig
from kvfleet_api.modelpool import AutoscalingSpec, ConcurrencySignal, ScalingSignal, TTFTSignal
from kvfleet_operator.autoscale.expressions import (
    Expression,
    Least,
    Matcher,
    Selector,
    SumOfMeans,
    WeightedMean,
    WeightedSum,
)
from kvfleet_operator.autoscale.readings import SignalKind

IN_FLIGHT: Final = "kvfleet_router_in_flight"
PACKED: Final = "kvfleet_router_packed_sequences"
QUEUE_DEPTH: Final = "kvfleet_router_queue_depth"
PREDICTED_TTFT: Final = "kvfleet_router_predicted_ttft_seconds"
PACK_TARGET: Final = "kvfleet_router_pack_target_sequences"
REQUESTS: Final = "kvfleet_router_requests_total"
KV_USAGE: Final = "vllm:kv_cache_usage_perc"
POOL_TARGET_LABEL: Final = "kvfleet_io_pool"
"""The pods' label `kvfleet.io/pool`, as a PodMonitor writes it."""

DEFAULT_SIGNALS: Final = (
    ScalingSignal(concurrency=ConcurrencySignal()),
    ScalingSignal(time_to_first_token=TTFTSignal()),
)


@dataclass(frozen=True, slots=True)
class QueueShare:
    """The part of a policy's queue that counts for a pool."""

    policy: str
    share: float


@dataclass(frozen=True, slots=True)
class PoolScope:
    """A pool as the metrics name it."""

    namespace: str
    pool: str
    models: tuple[str, ...]
    """The names clients send for it: the model and its adapters."""
    queues: tuple[QueueShare, ...]
    ttft_slo_s: float
    """Of the strictest policy that sends requests here."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.pool}"


@dataclass(frozen=True, slots=True)
class Signal:
    """One figure to read, and what to compare it with."""

    name: str
    kind: SignalKind
    source: Literal["router", "worker", "query"]
    """Who reports it; `query`: whatever the user's PromQL asks."""
    expression: Expression | None
    query: str | None
    """The user's PromQL, where there is no expression."""
    target: float | Expression
    anchor: Selector | None = None
    """The series whose sources are counted and whose age is taken."""


def scope_of(config: FleetConfig, pool: PoolConfig) -> PoolScope:
    """How the routers that serve `config` speak of `pool`."""
    models = {other.name: other.model for other in config.pools}
    policies = [policy for policy in config.policies if any(ref.name == pool.name for ref in policy.pools)]
    queues = tuple(
        QueueShare(policy.name, 1 / sum(models.get(ref.name) == pool.model for ref in policy.pools))
        for policy in policies
    )
    slo_s = min((policy.ttft_slo_s for policy in policies), default=1.0)
    return PoolScope(config.namespace, pool.name, (pool.model, *pool.adapters), queues, slo_s)


def signals_of(spec: AutoscalingSpec, scope: PoolScope) -> list[Signal]:
    """The signals of a pool, named so that each name is unique within it."""
    built = [_signal(signal, scope) for signal in spec.signals or DEFAULT_SIGNALS]
    names = [signal.name for signal in built]
    return [
        signal if names.count(signal.name) == 1 else _renamed(signal, f"{signal.name}[{index}]")
        for index, signal in enumerate(built)
    ]


def _renamed(signal: Signal, name: str) -> Signal:
    return Signal(name, signal.kind, signal.source, signal.expression, signal.query, signal.target, signal.anchor)


def _signal(signal: ScalingSignal, scope: PoolScope) -> Signal:
    in_flight = _pool_series(IN_FLIGHT, scope)
    if signal.concurrency is not None:
        wanted = signal.concurrency.target_per_replica
        if wanted is None:
            share = signal.concurrency.target_percent_of_pack_target / 100
            target: float | Expression = Least(_pool_series(PACK_TARGET, scope), share)
            at_pool = _pool_series(PACKED, scope)
        else:
            target, at_pool = float(wanted), in_flight
        demand = WeightedSum(((1.0, at_pool), *_queue_terms(scope)))
        return Signal("concurrency", "AverageValue", "router", demand, None, target, at_pool)
    if signal.queue_depth is not None:
        wanted_depth = float(signal.queue_depth.target_per_replica)
        depth = WeightedSum(_queue_terms(scope))
        return Signal("queueDepth", "AverageValue", "router", depth, None, wanted_depth, in_flight)
    if signal.time_to_first_token is not None:
        slo_s = scope.ttft_slo_s * signal.time_to_first_token.target_percent_of_slo / 100
        predicted = WeightedMean(_pool_series(PREDICTED_TTFT, scope), weight=in_flight)
        return Signal("timeToFirstToken", "Value", "router", predicted, None, slo_s, in_flight)
    if signal.kv_usage is not None:
        usage = Selector(KV_USAGE, (), (_namespace(scope), (POOL_TARGET_LABEL, (scope.pool,))))
        share = signal.kv_usage.target_percent / 100
        return Signal("kvUsage", "AverageValue", "worker", SumOfMeans(usage), None, share, usage)
    assert signal.prometheus is not None, "a ScalingSignal has exactly one of its fields"
    asked = signal.prometheus
    return Signal("prometheus", asked.type, "query", None, asked.query, asked.target_milli / 1000)


def activity_signals(scope: PoolScope) -> tuple[Signal, Signal]:
    """What tells an idle pool: requests in flight or held for it, and requests ever served."""
    in_flight = _pool_series(IN_FLIGHT, scope)
    held = tuple((1.0, selector) for _, selector in _queue_terms(scope))
    busy = WeightedSum(((1.0, in_flight), *held))
    served = WeightedSum(((1.0, _pool_series(REQUESTS, scope)),))
    return (
        Signal("busy", "Value", "router", busy, None, 1.0, in_flight),
        Signal("served", "Value", "router", served, None, 1.0, in_flight),
    )


def _namespace(scope: PoolScope) -> Matcher:
    return ("namespace", (scope.namespace,))


def _pool_series(metric: str, scope: PoolScope) -> Selector:
    return Selector(metric, (("pool", (scope.pool,)),), (_namespace(scope),))


def _queue_terms(scope: PoolScope) -> tuple[tuple[float, Selector], ...]:
    """A queue without a `model` label counts whole, as it may hold requests for any model."""
    models = (*scope.models, "")
    return tuple(
        (queue.share, Selector(QUEUE_DEPTH, (("policy", (queue.policy,)), ("model", models)), (_namespace(scope),)))
        for queue in scope.queues
    )


def query_of(signal: Signal) -> str:
    """The one PromQL query that reads a signal: its value, its target, its sources and its age at one instant.

    The parts are told apart by a label `part`. A user's query is sent as it is.
    """
    if signal.expression is None or signal.anchor is None:
        assert signal.query is not None, "a signal has an expression or a query"
        return signal.query
    anchor = signal.anchor.promql()
    parts = {
        "value": signal.expression.promql(),
        "sources": f"count(count by (instance) ({anchor}))",
        "age": f"time() - min(timestamp({anchor}))",
    }
    if not isinstance(signal.target, float):
        parts["target"] = signal.target.promql()
    return " or ".join(f'label_replace({promql}, "part", "{part}", "", "")' for part, promql in parts.items())


def metrics_of(signals: Sequence[Signal]) -> set[str]:
    """Names of all metrics that evaluating `signals` needs."""
    names: set[str] = set()
    for signal in signals:
        for expression in (signal.expression, signal.target):
            if expression is not None and not isinstance(expression, float):
                names.update(selector.metric for selector in expression.selectors())
        if signal.anchor is not None:
            names.add(signal.anchor.metric)
    return names
