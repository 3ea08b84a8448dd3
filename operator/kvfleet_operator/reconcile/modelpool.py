"""ModelPool → Deployment or LeaderWorkerSet, headless Service, PodDisruptionBudget, the list of adapters; and its status.

Conditions: `Accepted` (the spec can be realised), `ResolvedRefs` (the AcceleratorProfile exists), `Available` (a worker
is ready), `Progressing` (something is still moving), `AdaptersLoaded` (on every ready worker; where there are adapters),
`CacheKnown` (routers know what workers cache; where a tokenizer is named), `EnergyTrusted` (joules steer; where routers have
telemetry), `Ready` (all of it is as wanted).

Without its AcceleratorProfile a pool is tolerated, not torn down: the profile says which resource a pod asks for, so a
new workload waits for it, and a running one stays exactly as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.common import Condition
from kvfleet_api.modelpool import ModelPool
from kvfleet_api.problems import Problem
from kvfleet_operator.reconcile import (
    adapters,
    cacheview,
    conditions,
    energyview,
    engine,
    lora,
    names,
    rollout,
    workload,
)
from kvfleet_operator.reconcile.adapters import WorkerAdapters
from kvfleet_operator.reconcile.cacheview import CacheView
from kvfleet_operator.reconcile.conditions import Finding
from kvfleet_operator.reconcile.energyview import EnergyView
from kvfleet_operator.reconcile.plan import Applied, Manifest, Plan, Rejection
from kvfleet_operator.reconcile.podtemplate import TemplateError


@dataclass(frozen=True, slots=True)
class PoolInput:
    """Everything a pool's reconciliation looks at."""

    pool: ModelPool
    profile: AcceleratorProfile | None
    problems: Sequence[Problem] = ()
    """What compiling the namespace's fleet found wrong with this pool."""
    live: Mapping[tuple[str, str], Manifest] | None = None
    """(kind, name) → owned children as they are."""
    workers: Mapping[str, WorkerAdapters | None] = field(default_factory=dict)
    """Ready worker → what is known of its adapters; None: it was not asked yet."""
    cache_views: Mapping[str, CacheView | None] = field(default_factory=dict)
    """Ready router replica → what it knows the workers' caches by; None: it has not said."""
    energy_views: Mapping[str, EnergyView | None] | None = None
    """Ready router replica → what it says of the workers' energy; None: no router keeps books of joules."""


def workload_key(pool: ModelPool) -> tuple[str, str]:
    """(kind, name) of the pool's workload."""
    multi_node = pool.spec.parallelism.nodes > 1
    kind = "LeaderWorkerSet" if multi_node else "Deployment"
    return kind, names.pool_workload(pool.metadata.name, multi_node=multi_node)


def children(given: PoolInput) -> Plan:
    """What should exist for the pool."""
    pool = given.pool
    key = workload_key(pool)
    live = (given.live or {}).get(key)
    around = [workload.service(pool), workload.disruption_budget(pool)]
    if lora.enabled(pool.spec, live):
        around.append(lora.config_map(pool, workload.labels(pool)))
    if given.profile is None:
        return Plan(around, untouched=_all_workloads(pool))
    try:
        return Plan([*around, workload.build(pool, given.profile, live)])
    except TemplateError:
        return Plan(around, untouched=_all_workloads(pool))


def _all_workloads(pool: ModelPool) -> frozenset[tuple[str, str]]:
    name = pool.metadata.name
    return frozenset(
        {
            ("Deployment", names.pool_workload(name, multi_node=False)),
            ("LeaderWorkerSet", names.pool_workload(name, multi_node=True)),
        }
    )


def status(given: PoolInput, applied: Applied, now: str) -> dict[str, Any]:
    """The status to report once the children were applied."""
    pool = given.pool
    reading = rollout.read(applied.live.get(workload_key(pool)))
    accepted, resolved = _accepted(given, applied.rejections), _resolved(given)
    available = rollout.available(reading, "worker")
    before = pool.status.conditions if pool.status else []
    if pool.spec.autoscaling is None:  # nobody speaks of it any more
        before = [condition for condition in before if condition.type != conditions.SCALING_ACTIVE]
    if given.energy_views is None:
        before = [condition for condition in before if condition.type != energyview.TYPE]
    loaded = _adapters_loaded(given, reading, before)
    known = _cache_known(given, before)
    rolled_out = rollout.rolled_out(reading, "worker")
    ready = _ready([accepted, resolved, rolled_out, *loaded], rolled_out.message)
    trusted = [] if given.energy_views is None else [energyview.finding(given.energy_views)]
    progressing = rollout.progressing(reading, "worker")
    findings = [accepted, resolved, available, progressing, *loaded, *known, *trusted, ready]
    settled = conditions.settle(before, findings, generation=pool.metadata.generation, now=now)
    reported: dict[str, Any] = {
        "observedGeneration": pool.metadata.generation,
        "selector": names.selector_text(names.pool_selector(pool.metadata.name)),
        "replicas": reading.existing if reading else 0,
        "readyReplicas": reading.ready if reading else 0,
        "updatedReplicas": reading.updated if reading else 0,
        "adapters": adapters.everywhere(adapters.wanted(pool.spec), given.workers),
        "energy": _energy(given),
        "conditions": conditions.dump(settled),
    }
    if pool.spec.autoscaling is None:
        reported |= {"desiredReplicas": workload.wanted_replicas(pool.spec), "autoscaling": None}
    return reported


def _accepted(given: PoolInput, rejections: Sequence[Rejection]) -> Finding:
    """First what keeps the pool from being realised, then what merely deserves a word."""
    if problem := template_problem(given):
        return Finding("Accepted", "False", "InvalidPodTemplate", problem)
    if rejections:
        return Finding("Accepted", "False", rejections[0].reason, " ".join(r.message for r in rejections))
    return conditions.accepted(given.problems, conditions.APPLIED, *engine.unwired(given.pool.spec))


def template_problem(given: PoolInput) -> str | None:
    """What is wrong with `podTemplate`, if anything."""
    if given.profile is None or given.pool.spec.pod_template is None:
        return None
    try:
        workload.build(given.pool, given.profile, None)
    except TemplateError as error:
        return str(error)
    return None


def _resolved(given: PoolInput) -> Finding:
    wrong = [problem for problem in given.problems if problem.condition == "ResolvedRefs"]
    if not wrong:
        reference = given.pool.spec.accelerator.profile_ref
        return Finding("ResolvedRefs", "True", "ResolvedRefs", f"AcceleratorProfile {reference} exists.")
    held = "a running workload is left as it is, a new one is created once the profile exists"
    return Finding("ResolvedRefs", "False", wrong[0].reason, f"{conditions.sentences(wrong)}; {held}")


def _adapters_loaded(given: PoolInput, reading: rollout.Rollout | None, before: Sequence[Condition]) -> list[Finding]:
    """Of pools that have adapters, or had some."""
    if not given.pool.spec.adapters and all(condition.type != adapters.TYPE for condition in before):
        return []
    return [adapters.finding(given.pool.spec, reading, given.workers)]


def _cache_known(given: PoolInput, before: Sequence[Condition]) -> list[Finding]:
    """Of pools that name a tokenizer, or did."""
    if given.pool.spec.model.tokenizer is None and all(condition.type != cacheview.TYPE for condition in before):
        return []
    return [cacheview.of_pool(given.pool, given.cache_views)]


def _energy(given: PoolInput) -> dict[str, Any] | None:
    if given.energy_views is None:
        return None
    before = given.pool.status.energy if given.pool.status else None
    return energyview.pool_status(given.energy_views.values(), before)


def _ready(parts: Sequence[Finding], message: str) -> Finding:
    found = conditions.conjunction("Ready", parts, "Ready", message)
    return replace(found, status="False") if found.status == "Unknown" else found
