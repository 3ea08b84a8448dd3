"""The autoscaled pools of the observed world, as the autoscaler needs them. Pure.

A pool takes part once its workload exists and is its own. The routers of its namespace are asked about it, as each of
them serves all pools of the namespace.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kvfleet_api.fleetconfig import PoolConfig
from kvfleet_api.modelpool import AutoscalingSpec, ModelPool
from kvfleet_operator.autoscale.autoscaler import PoolStep
from kvfleet_operator.autoscale.decide import Workers
from kvfleet_operator.autoscale.ranking import RequestShape, rank_pools, watts_per_worker
from kvfleet_operator.autoscale.readings import Reading
from kvfleet_operator.autoscale.signals import PoolScope, Signal, activity_signals, scope_of, signals_of
from kvfleet_operator.autoscale.startup import Start
from kvfleet_operator.reconcile import names
from kvfleet_operator.reconcile.dependents import Key
from kvfleet_operator.reconcile.modelpool import workload_key
from kvfleet_operator.reconcile.plan import Manifest
from kvfleet_operator.resources import ready_since, unix_s
from kvfleet_operator.world import World

MEAN_REQUEST = RequestShape()
PREPARATION_S = 1800
"""What a node and the engine's image may take before the engine starts."""


@dataclass(frozen=True, slots=True)
class ScaledPool:
    """One autoscaled pool."""

    pool: ModelPool
    autoscaling: AutoscalingSpec
    config: PoolConfig
    """As the routers have it."""
    itl_slo_s: float
    """Of the strictest policy that sends requests here."""
    workload: Manifest
    scope: PoolScope
    router_urls: tuple[str, ...]
    """Admin ports of the ready router replicas."""
    starts: Sequence[Start] = ()
    """Of the workers there are."""
    signals: Sequence[Signal] = field(init=False)
    activity: Sequence[Signal] = field(init=False)
    """What tells whether it is idle."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "signals", signals_of(self.autoscaling, self.scope))
        object.__setattr__(self, "activity", activity_signals(self.scope))

    @property
    def key(self) -> Key:
        return Key("ModelPool", self.scope.namespace, self.scope.pool)

    @property
    def name(self) -> str:
        """`namespace/name`."""
        return self.scope.key

    @property
    def workers(self) -> Workers:
        ready = int((self.workload.get("status") or {}).get("readyReplicas") or 0)
        return Workers(int(self.workload["spec"].get("replicas", 1)), ready)

    @property
    def selector(self) -> str:
        """Of the pods that serve HTTP."""
        return names.selector_text(names.pool_selector(self.scope.pool))

    @property
    def startup_limit_s(self) -> float:
        """No worker takes longer until it is ready: beyond that its engine is restarted."""
        return PREPARATION_S + self.pool.spec.engine.startup_seconds

    @property
    def asks_workers(self) -> bool:
        return any(signal.source == "worker" for signal in self.signals)


def scaled_pools(world: World, namespaces: Collection[str] | None) -> list[ScaledPool]:
    """Every pool to scale, in a stable order. `namespaces`: those watched, None for all."""
    found = []
    for pool in sorted(world.pools(), key=lambda pool: pool.key):
        if pool.spec.autoscaling is None or (namespaces is not None and pool.metadata.namespace not in namespaces):
            continue
        scaled = _scaled(world, pool, pool.spec.autoscaling)
        if scaled is not None:
            found.append(scaled)
    return found


def _scaled(world: World, pool: ModelPool, autoscaling: AutoscalingSpec) -> ScaledPool | None:
    namespace = pool.metadata.namespace or "default"
    kind, name = workload_key(pool)
    workload = world.get(Key(kind, namespace, name))
    if workload is None or not names.is_owned(workload, pool.metadata.uid):
        return None
    if workload["metadata"].get("deletionTimestamp"):
        return None
    fleet = world.fleet(namespace).config
    config = next((config for config in fleet.pools if config.name == pool.metadata.name), None)
    if config is None:
        return None
    slos = [policy.itl_slo_s for policy in fleet.policies if any(ref.name == config.name for ref in policy.pools)]
    return ScaledPool(
        pool,
        autoscaling,
        config,
        min(slos, default=0.05),
        workload,
        scope_of(fleet, config),
        _routers(world, namespace),
        [start_of(pod) for pod in world.workers(pool)],
    )


def start_of(pod: Manifest) -> Start:
    """How a worker's pod started."""
    metadata = pod["metadata"]
    return Start(
        metadata.get("uid") or metadata["name"],
        unix_s(metadata.get("creationTimestamp")) or 0.0,
        unix_s(ready_since(pod)),
    )


def _routers(world: World, namespace: str) -> tuple[str, ...]:
    return tuple(
        f"http://{f'[{ip}]' if ':' in ip else ip}:{router.spec.admin_port}"
        for router in world.routers(namespace)
        for _, ip in sorted(world.router_pods(router).items())
    )


def step_of(
    pool: ScaledPool, readings: Sequence[Reading], activity: Sequence[Reading], startup_s: float | None = None
) -> PoolStep:
    """What the autoscaler is told about a pool. `startup_s`: as measured."""
    cost = pool.config.cost
    ranked = rank_pools({pool.name: cost}, MEAN_REQUEST, pool.itl_slo_s)[0]
    busy, served = activity
    return PoolStep(
        pool.name,
        pool.autoscaling,
        pool.workers,
        readings,
        busy,
        served,
        startup_s=startup_s,
        gpus_per_worker=pool.config.gpus_per_worker,
        watts_per_worker=watts_per_worker(cost, MEAN_REQUEST, ranked.sequences_per_worker),
        joules_per_token=ranked.joules_per_token,
        priority=pool.autoscaling.priority,
    )
