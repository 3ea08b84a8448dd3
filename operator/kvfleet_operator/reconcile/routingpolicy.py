"""RoutingPolicy: no children of its own (routers load the compiled FleetConfig); its status says what became of it.

Conditions: `Accepted` (some pool can serve it), `ResolvedRefs` (all pools and models exist), `Conflicted` (another policy
takes requests it asks for), `Programmed` (every router replica serves with the configuration that holds this very
generation of it), `Ready`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfleet_api.compile import Problem
from kvfleet_api.routingpolicy import RoutingPolicy
from kvfleet_operator.reconcile import conditions
from kvfleet_operator.reconcile.conditions import Finding

MAX_REPLICAS = 256
"""Entries of `status.programmedBy`."""


@dataclass(frozen=True, slots=True)
class RouterView:
    """A FleetRouter as a policy sees it."""

    name: str
    revision: str | None
    """The configuration written for it; None: none could be."""
    replicas: Mapping[str, str | None]
    """Ready replica → the revision it says it serves with; None: it has not said."""

    def current(self) -> list[str]:
        """The replicas that serve with the configuration last written."""
        return sorted(pod for pod, revision in self.replicas.items() if revision and revision == self.revision)


def status(
    policy: RoutingPolicy, problems: Sequence[Problem], compiled: bool, routers: Sequence[RouterView], now: str
) -> dict[str, Any]:
    """`compiled`: the policy is part of the FleetConfig."""
    accepted = _accepted(problems, compiled)
    resolved = _of(problems, "ResolvedRefs")
    conflicted = _conflicted(problems)
    programmed = _programmed(compiled, routers)
    ready = _ready([accepted, resolved, programmed], conflicted)
    findings = [accepted, resolved, conflicted, programmed, ready]
    previous = policy.status.conditions if policy.status else []
    settled = conditions.settle(previous, findings, generation=policy.metadata.generation, now=now)
    by = [{"pod": pod, "revision": router.revision} for router in routers for pod in router.current()]
    return {
        "observedGeneration": policy.metadata.generation,
        "programmedBy": by[:MAX_REPLICAS] if compiled else [],
        "conditions": conditions.dump(settled),
    }


def _of(problems: Sequence[Problem], condition: str) -> Finding:
    """False with all that is wrong, or True."""
    wrong = [problem for problem in problems if problem.condition == condition]
    if not wrong:
        return Finding(condition, "True", condition, "All pools and models it names exist.")
    return Finding(condition, "False", wrong[0].reason, "; ".join(f"{p.field}: {p.message}" for p in wrong))


def _accepted(problems: Sequence[Problem], compiled: bool) -> Finding:
    wrong = [problem for problem in problems if problem.condition == "Accepted"]
    if wrong:
        return _of(problems, "Accepted")
    if not compiled:
        return Finding("Accepted", "False", "NotCompiled", "It is not part of the routers' configuration.")
    return Finding("Accepted", "True", "Accepted", "It is part of the routers' configuration.")


def _conflicted(problems: Sequence[Problem]) -> Finding:
    found = [problem for problem in problems if problem.condition == "Conflicted"]
    if not found:
        return Finding("Conflicted", "False", "NoConflict", "No other policy takes requests it asks for.")
    return Finding("Conflicted", "True", found[0].reason, "; ".join(f"{p.field}: {p.message}" for p in found))


def _programmed(compiled: bool, routers: Sequence[RouterView]) -> Finding:
    if not compiled:
        return Finding("Programmed", "False", "NotAccepted", "Routers do not have it: see Accepted.")
    if not routers:
        message = "No FleetRouter in this namespace: create one"
        return Finding("Programmed", "False", "NoRouter", message)
    replicas = sum(len(router.replicas) for router in routers)
    current = sum(len(router.current()) for router in routers)
    revisions = ", ".join(sorted({router.revision or "none" for router in routers}))
    if not replicas:
        return Finding("Programmed", "False", "NoRouterReady", "No router replica is ready.")
    message = f"{current} of {replicas} router replicas serve with revision {revisions}"
    if current < replicas:
        return Finding("Programmed", "False", "Pending", message)
    return Finding("Programmed", "True", "Programmed", message)


def _ready(parts: Sequence[Finding], conflicted: Finding) -> Finding:
    if conflicted.status == "True" and all(part.status == "True" for part in parts):
        return Finding("Ready", "False", conflicted.reason, conflicted.message)
    return conditions.conjunction("Ready", parts, "Ready", parts[-1].message)
