"""FleetRouter → ConfigMap (the compiled FleetConfig), Deployment, Service, ServiceAccount, Role, RoleBinding,
PodDisruptionBudget; and the router's status.

A changed configuration reaches the pods through the ConfigMap they watch; nothing of it is in the pod template, so no
change of pools or policies ever restarts a router.

Conditions: `Accepted`, `Available`, `Progressing`, `Programmed` (every ready replica serves with the revision last
written), `Ready`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfleet_api.compile import CompiledFleet
from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_operator.reconcile import conditions, names, rollout, routerpods
from kvfleet_operator.reconcile.conditions import Finding
from kvfleet_operator.reconcile.plan import Applied, Plan, Rejection
from kvfleet_operator.reconcile.podtemplate import TemplateError
from kvfleet_operator.reconcile.routingpolicy import Loaded, RouterView, pending


@dataclass(frozen=True, slots=True)
class RouterInput:
    """Everything a router's reconciliation looks at."""

    router: FleetRouter
    fleet: CompiledFleet
    replicas: Mapping[str, Loaded | None]
    """Ready replica → what it says it serves with; None: it has not said."""


def children(given: RouterInput) -> Plan:
    """What should exist for the router."""
    router = given.router
    around = [
        routerpods.service_account(router),
        *routerpods.permissions(router, given.fleet.config),
        routerpods.config_map(router, given.fleet.config),
        routerpods.service(router),
        routerpods.disruption_budget(router),
    ]
    try:
        return Plan([*around, routerpods.deployment(router, given.fleet.config.pools)])
    except TemplateError:
        return Plan(around, untouched=frozenset({("Deployment", names.bounded(router.metadata.name))}))


def view(given: RouterInput) -> RouterView:
    """The router as its namespace's policies see it."""
    config = given.fleet.config
    policies = {policy.name: policy for policy in config.policies}
    return RouterView(given.router.metadata.name, config.revision, given.replicas, policies)


def status(given: RouterInput, applied: Applied, now: str) -> dict[str, Any]:
    """The status to report once the children were applied."""
    router = given.router
    reading = rollout.read(applied.live.get(("Deployment", names.bounded(router.metadata.name))))
    accepted = _accepted(given, applied.rejections)
    programmed = _programmed(view(given))
    available = rollout.available(reading, "router replica")
    parts = [accepted, rollout.rolled_out(reading, "router replica"), programmed]
    ready = conditions.conjunction("Ready", parts, "Ready", parts[1].message)
    findings = [accepted, available, rollout.progressing(reading, "router replica"), programmed, ready]
    previous = router.status.conditions if router.status else []
    settled = conditions.settle(previous, findings, generation=router.metadata.generation, now=now)
    return {
        "observedGeneration": router.metadata.generation,
        "replicas": reading.existing if reading else 0,
        "readyReplicas": reading.ready if reading else 0,
        "selector": names.selector_text(names.router_selector(router.metadata.name)),
        "revision": given.fleet.config.revision,
        "address": routerpods.address(router),
        "conditions": conditions.dump(settled),
    }


def template_problem(router: FleetRouter) -> str | None:
    """What is wrong with `podTemplate`, if anything."""
    try:
        routerpods.deployment(router)
    except TemplateError as error:
        return str(error)
    return None


def _accepted(given: RouterInput, rejections: Sequence[Rejection]) -> Finding:
    if problem := template_problem(given.router):
        return Finding("Accepted", "False", "InvalidPodTemplate", problem)
    if rejections:
        return Finding("Accepted", "False", rejections[0].reason, " ".join(r.message for r in rejections))
    return conditions.accepted(given.fleet.problems_of(given.router), conditions.APPLIED)


def _programmed(router: RouterView) -> Finding:
    current, replicas = len(router.current()), len(router.replicas)
    message = f"{current} of {replicas} ready replicas serve with revision {router.revision}"
    if not replicas:
        return Finding("Programmed", "False", "NoneReady", "No replica is ready.")
    if current < replicas:
        return pending(message, router.refusals())
    return Finding("Programmed", "True", "Programmed", message)
