"""The kinds the operator deals with, where the API server has them, and how to read a pod's or object's basics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from kvfleet_api import GROUP, VERSION
from kvfleet_operator.reconcile import names


@dataclass(frozen=True, slots=True)
class ResourceType:
    """A kind and its place in the API."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    optional: bool = False
    """The cluster may lack it: its absence is no error."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """The URL path of a collection, an object or a subresource."""
        parts = ["/apis", self.group, self.version] if self.group else ["/api", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


PROFILE: Final = ResourceType(GROUP, VERSION, "AcceleratorProfile", "acceleratorprofiles", namespaced=False)
POOL: Final = ResourceType(GROUP, VERSION, "ModelPool", "modelpools")
POLICY: Final = ResourceType(GROUP, VERSION, "RoutingPolicy", "routingpolicies")
ROUTER: Final = ResourceType(GROUP, VERSION, "FleetRouter", "fleetrouters")
OWN: Final = (PROFILE, POOL, POLICY, ROUTER)
"""The four kinds."""

CONFIG_MAP: Final = ResourceType("", "v1", "ConfigMap", "configmaps")

CHILDREN: Final = (
    ResourceType("", "v1", "ServiceAccount", "serviceaccounts"),
    ResourceType("rbac.authorization.k8s.io", "v1", "Role", "roles"),
    ResourceType("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings"),
    CONFIG_MAP,
    ResourceType("", "v1", "Service", "services"),
    ResourceType("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    ResourceType("apps", "v1", "Deployment", "deployments"),
    ResourceType("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets", optional=True),
)
"""What the operator applies, in the order in which it does."""

POD: Final = ResourceType("", "v1", "Pod", "pods")
EVENT: Final = ResourceType("events.k8s.io", "v1", "Event", "events")
LEASE: Final = ResourceType("coordination.k8s.io", "v1", "Lease", "leases")

WATCHED: Final = (*OWN, *CHILDREN, POD)
BY_KIND: Final[Mapping[str, ResourceType]] = {resource.kind: resource for resource in (*WATCHED, EVENT, LEASE)}


def label_selector(resource: ResourceType) -> str | None:
    """What of a kind the operator looks at: all of its own kinds, of the others what it made."""
    return None if resource in OWN else f"{names.MANAGED_BY}={names.MANAGER}"


def pod_address(pod: Mapping[str, Any]) -> str | None:
    """The IP of a pod that is ready and not on its way out."""
    if pod["metadata"].get("deletionTimestamp") or ready_since(pod) is None:
        return None
    return (pod.get("status") or {}).get("podIP")


def unix_s(stamp: object) -> float | None:
    """A timestamp of Kubernetes as Unix time; None where there is none."""
    try:
        return datetime.fromisoformat(str(stamp)).astimezone(UTC).timestamp()
    except ValueError:
        return None


def ready_since(pod: Mapping[str, Any]) -> str | None:
    """When a pod that is ready became so."""
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "Ready" and condition.get("status") == "True":
            return str(condition.get("lastTransitionTime") or "")
    return None
