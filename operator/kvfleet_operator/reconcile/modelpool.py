"""ModelPool → Deployment or LeaderWorkerSet, headless Service, PodDisruptionBudget; and the pool's status.

Conditions: `Accepted` (the spec can be realised), `ResolvedRefs` (the AcceleratorProfile exists), `Available` (a worker
is ready), `Progressing` (something is still moving), `Ready` (all of it is as wanted).

Without its AcceleratorProfile a pool is tolerated, not torn down: the profile says which resource a pod asks for, so a
new workload waits for it, and a running one stays exactly as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.compile import Problem
from kvfleet_api.modelpool import ModelPool
from kvfleet_operator.reconcile import conditions, engine, names, rollout, workload
from kvfleet_operator.reconcile.conditions import Finding
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


def workload_key(pool: ModelPool) -> tuple[str, str]:
    """(kind, name) of the pool's workload."""
    multi_node = pool.spec.parallelism.nodes > 1
    kind = "LeaderWorkerSet" if multi_node else "Deployment"
    return kind, names.pool_workload(pool.metadata.name, multi_node=multi_node)


def children(given: PoolInput) -> Plan:
    """What should exist for the pool."""
    pool = given.pool
    key = workload_key(pool)
    around = [workload.service(pool), workload.disruption_budget(pool)]
    if given.profile is None:
        return Plan(around, untouched=_all_workloads(pool))
    try:
        return Plan([*around, workload.build(pool, given.profile, (given.live or {}).get(key))])
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
    parts = [accepted, resolved, rollout.rolled_out(reading, "worker")]
    ready = conditions.conjunction("Ready", parts, "Ready", parts[-1].message)
    findings = [accepted, resolved, available, rollout.progressing(reading, "worker"), ready]
    before = pool.status.conditions if pool.status else []
    settled = conditions.settle(before, findings, generation=pool.metadata.generation, now=now)
    reported: dict[str, Any] = {
        "observedGeneration": pool.metadata.generation,
        "selector": names.selector_text(names.pool_selector(pool.metadata.name)),
        "replicas": reading.existing if reading else 0,
        "readyReplicas": reading.ready if reading else 0,
        "updatedReplicas": reading.updated if reading else 0,
        "adapters": _adapters(pool, reading),
        "conditions": conditions.dump(settled),
    }
    return reported


def _accepted(given: PoolInput, rejections: Sequence[Rejection]) -> Finding:
    """First what keeps the pool from being realised, then what merely deserves a word."""
    if problem := template_problem(given):
        return Finding("Accepted", "False", "InvalidPodTemplate", problem)
    if rejections:
        return Finding("Accepted", "False", rejections[0].reason, " ".join(r.message for r in rejections))
    wrong = [problem for problem in given.problems if problem.condition == "Accepted"]
    errors = [problem for problem in wrong if problem.severity == "Error"]
    if errors:
        return Finding("Accepted", "False", errors[0].reason, _sentences(wrong))
    warnings = [*map(_sentence, wrong), *engine.unwired(given.pool.spec)]
    if warnings:
        return Finding("Accepted", "True", "AcceptedWithWarnings", "; ".join(warnings))
    return Finding("Accepted", "True", "Accepted", "The spec is valid and its objects are applied.")


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
    return Finding("ResolvedRefs", "False", wrong[0].reason, f"{_sentences(wrong)}; {held}")


def _sentences(problems: Sequence[Problem]) -> str:
    return "; ".join(map(_sentence, problems))


def _sentence(problem: Problem) -> str:
    return f"{problem.field}: {problem.message}"


def _adapters(pool: ModelPool, reading: rollout.Rollout | None) -> list[str]:
    """Adapters every ready worker has: those of the spec once it is rolled out, until then those known before."""
    if reading is not None and reading.complete:
        return [adapter.name for adapter in pool.spec.adapters] if reading.ready else []
    wanted = {adapter.name for adapter in pool.spec.adapters}
    return [name for name in (pool.status.adapters if pool.status else []) if name in wanted]
