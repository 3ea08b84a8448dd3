"""Exactly the permissions the operator needs, in the shape of Kubernetes' PolicyRules.

The Helm chart is generated from this list, and a test holds every request the operator makes against it. Rights the
operator only hands on (what a router may read) are in it as well: Kubernetes lets nobody grant what he does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvfleet_api import GROUP
from kvfleet_operator.resources import CHILDREN, EVENT, LEASE, OWN, POD, POOL, PROFILE, ROUTER

WATCH: Final = ("list", "watch")
READ: Final = ("get", *WATCH)
MANAGE: Final = (*READ, "create", "patch", "delete")
"""Server-side apply is `patch`, and `create` where the object does not exist."""


@dataclass(frozen=True, slots=True)
class Rule:
    groups: tuple[str, ...]
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    names: tuple[str, ...] = ()

    def manifest(self) -> dict[str, Any]:
        """As in a Role or ClusterRole."""
        rule = {"apiGroups": list(self.groups), "resources": list(self.resources), "verbs": list(self.verbs)}
        return {**rule, "resourceNames": list(self.names)} if self.names else rule


def cluster_rules(*, cluster_wide: bool) -> list[Rule]:
    """For a ClusterRole: always what is cluster-scoped, and with `cluster_wide` everything else of `namespaced_rules`."""
    profiles = [
        Rule((GROUP,), (PROFILE.plural,), WATCH),
        Rule((GROUP,), (f"{PROFILE.plural}/status",), ("patch",)),
    ]
    if not cluster_wide:
        return profiles
    return [
        *profiles,
        Rule(("apiextensions.k8s.io",), ("customresourcedefinitions",), WATCH),
        *namespaced_rules(),
    ]


def namespaced_rules() -> list[Rule]:
    """For a Role in each watched namespace, or part of the ClusterRole."""
    own = tuple(resource.plural for resource in OWN if resource.namespaced)
    owners = (POOL.plural, ROUTER.plural)
    groups: dict[str, list[str]] = {}
    for resource in CHILDREN:
        groups.setdefault(resource.group, []).append(resource.plural)
    return [
        Rule((GROUP,), own, WATCH),
        Rule((GROUP,), owners, ("get",)),  # does the owner still exist?
        Rule((GROUP,), tuple(f"{plural}/status" for plural in own), ("patch",)),
        # Where OwnerReferencesPermissionEnforcement is on, blocking an owner's deletion needs this.
        Rule((GROUP,), tuple(f"{plural}/finalizers" for plural in owners), ("update",)),
        *(Rule((group,), tuple(plurals), MANAGE) for group, plurals in groups.items()),
        Rule((POD.group,), (POD.plural,), (*WATCH, "patch")),  # which worker goes first
        # Handed on to routers, which wake pools at zero.
        Rule(("apps",), ("deployments/scale",), ("get", "patch")),
        Rule(("leaderworkerset.x-k8s.io",), ("leaderworkersets/scale",), ("get", "patch")),
        Rule(("discovery.k8s.io",), ("endpointslices",), WATCH),
        Rule((EVENT.group,), (EVENT.plural,), ("create",)),
    ]


def lease_rules(name: str) -> list[Rule]:
    """For a Role in the Lease's namespace. `create` cannot be bound to a name."""
    return [
        Rule((LEASE.group,), (LEASE.plural,), ("create",)),
        Rule((LEASE.group,), (LEASE.plural,), ("get", "update"), (name,)),
    ]


def allows(rules: Sequence[Rule], verb: str, group: str, resource: str, name: str | None = None) -> bool:
    """Whether some rule permits it; `resource` with its subresource, as `modelpools/status`."""
    return any(
        verb in rule.verbs
        and group in rule.groups
        and resource in rule.resources
        and (not rule.names or name in rule.names)
        for rule in rules
    )  # fmt: skip
