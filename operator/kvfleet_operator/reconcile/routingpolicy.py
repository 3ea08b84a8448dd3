"""RoutingPolicy: no children of its own (routers load the compiled FleetConfig); its status says what became of it.

Conditions: `Accepted` (some pool can serve it), `ResolvedRefs` (all pools and models exist), `Conflicted` (another policy
takes requests it asks for), `Programmed` (every router replica serves with this very generation of it, as compiled now),
`CacheKnown` (routers know what its pools' workers cache; where it asks for that, and no part of `Ready`), `Ready`. A change of anything else in the fleet, or a configuration that routers refuse for another policy's sake, does not
make a policy that is served less programmed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvfleet_api.fleetconfig import PolicyConfig
from kvfleet_api.problems import Problem
from kvfleet_api.routingpolicy import RoutingPolicy
from kvfleet_operator.reconcile import cacheview, conditions
from kvfleet_operator.reconcile.cacheview import CacheView
from kvfleet_operator.reconcile.conditions import Finding
from kvfleet_operator.reconcile.energyview import EnergyView

MAX_REPLICAS = 256
"""Entries of `status.programmedBy`."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a router replica says it serves with."""

    revision: str
    """Of the whole configuration."""
    policies: Mapping[str, str] = field(default_factory=dict)
    """Policy → its own revision."""
    refused: str = ""
    """Why it does not take a newer configuration; empty: there is none that it refused."""
    pools: Mapping[str, CacheView] = field(default_factory=dict)
    """Pool → what its workers' caches are known by."""
    energy: Mapping[str, EnergyView] = field(default_factory=dict)
    """Pool → what is known of its energy, where books of joules are kept."""


@dataclass(frozen=True, slots=True)
class RouterView:
    """A FleetRouter as a policy sees it."""

    name: str
    revision: str
    """Of the configuration written for it."""
    replicas: Mapping[str, Loaded | None]
    """Ready replica → what it says it serves with; None: it has not said."""
    policies: Mapping[str, PolicyConfig] = field(default_factory=dict)
    """Those of the configuration written, by name."""

    def current(self) -> list[str]:
        """The replicas that serve with the configuration last written."""
        return sorted(pod for pod, loaded in self.replicas.items() if loaded and loaded.revision == self.revision)

    def serving(self, policy: str) -> dict[str, Loaded]:
        """The replicas that serve with the policy as it was last written."""
        if policy not in self.policies:
            return {}
        wanted = self.policies[policy].revision
        return {
            pod: loaded for pod, loaded in self.replicas.items() if loaded and loaded.policies.get(policy) == wanted
        }

    def refusals(self) -> list[str]:
        """What the replicas that stay with an older configuration say, each thing once, with who says it."""
        said: dict[str, list[str]] = {}
        for pod, loaded in sorted(self.replicas.items()):
            if loaded and loaded.refused and loaded.revision != self.revision:
                said.setdefault(loaded.refused, []).append(pod)
        return [f"{', '.join(pods)} refused it: {reason}" for reason, pods in said.items()]


def status(
    policy: RoutingPolicy,
    problems: Sequence[Problem],
    compiled: bool,
    routers: Sequence[RouterView],
    now: str,
    caches: Finding | None = None,
) -> dict[str, Any]:
    """`compiled`: the policy is part of the FleetConfig. `caches`: what there is to say of its pools' caches (cacheview.py)."""
    accepted = _accepted(problems, compiled)
    resolved = _of(problems, "ResolvedRefs")
    conflicted = _conflicted(problems)
    programmed = _programmed(policy, compiled, routers)
    ready = _ready([accepted, resolved, programmed], conflicted)
    known = [caches] if caches is not None and compiled else []
    findings = [accepted, resolved, conflicted, programmed, *known, ready]
    previous = policy.status.conditions if policy.status else []
    if not known:  # nobody speaks of it any more
        previous = [condition for condition in previous if condition.type != cacheview.TYPE]
    settled = conditions.settle(previous, findings, generation=policy.metadata.generation, now=now)
    by = [
        {"pod": pod, "revision": loaded.revision}
        for router in routers
        for pod, loaded in sorted(router.serving(policy.metadata.name).items())
    ]
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
    return Finding(condition, "False", wrong[0].reason, conditions.sentences(wrong))


def _accepted(problems: Sequence[Problem], compiled: bool) -> Finding:
    accepted = conditions.accepted(problems, "It is part of the routers' configuration.")
    if accepted.status == "True" and not compiled:
        return Finding("Accepted", "False", "NotCompiled", "It is not part of the routers' configuration.")
    return accepted


def _conflicted(problems: Sequence[Problem]) -> Finding:
    found = [problem for problem in problems if problem.condition == "Conflicted"]
    if not found:
        return Finding("Conflicted", "False", "NoConflict", "No other policy takes requests it asks for.")
    return Finding("Conflicted", "True", found[0].reason, conditions.sentences(found))


def _programmed(policy: RoutingPolicy, compiled: bool, routers: Sequence[RouterView]) -> Finding:
    if not compiled:
        return Finding("Programmed", "False", "NotAccepted", "Routers do not have it: see Accepted.")
    if not routers:
        message = "No FleetRouter in this namespace: create one"
        return Finding("Programmed", "False", "NoRouter", message)
    replicas = sum(len(router.replicas) for router in routers)
    serving = sum(len(router.serving(policy.metadata.name)) for router in routers)
    if not replicas:
        return Finding("Programmed", "False", "NoRouterReady", "No router replica is ready.")
    message = f"{serving} of {replicas} router replicas serve with generation {policy.metadata.generation}"
    if serving == replicas:
        return Finding("Programmed", "True", "Programmed", message)
    return pending(message, [refusal for router in routers for refusal in router.refusals()])


def pending(message: str, refusals: Sequence[str]) -> Finding:
    """Not every replica serves with what was written; where replicas refuse it, waiting does not help."""
    reason = "ConfigRefused" if refusals else "Pending"
    return Finding("Programmed", "False", reason, "; ".join([message, *refusals]))


def _ready(parts: Sequence[Finding], conflicted: Finding) -> Finding:
    if conflicted.status == "True" and all(part.status == "True" for part in parts):
        return Finding("Ready", "False", conflicted.reason, conflicted.message)
    return conditions.conjunction("Ready", parts, "Ready", parts[-1].message)
