"""How the kinds are named and what `kubectl get` prints of them. Ready, wanted, ready, age come first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Names:
    plural: str
    short: str
    scope: str = "Namespaced"


NAMES: Final = {
    "ModelPool": Names("modelpools", "mp"),
    "RoutingPolicy": Names("routingpolicies", "rp"),
    "FleetRouter": Names("fleetrouters", "fr"),
    "AcceleratorProfile": Names("acceleratorprofiles", "ap", "Cluster"),
}
SCALED: Final = frozenset({"ModelPool", "FleetRouter"})
"""Kinds with a scale subresource."""


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    path: str
    type: str = "string"
    wide: bool = False
    description: str = ""

    def entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": self.name, "type": self.type, "jsonPath": self.path}
        if self.description:
            entry["description"] = self.description
        return {**entry, "priority": 1} if self.wide else entry


def _condition(kind: str, *, wide: bool = False) -> _Column:
    return _Column(kind, f'.status.conditions[?(@.type=="{kind}")].status', wide=wide)


_WHY = _Column(
    "Message", '.status.conditions[?(@.type=="Ready")].message', wide=True, description="Why it is Ready or is not"
)
_AGE = _Column("Age", ".metadata.creationTimestamp", "date")
_AVAILABLE = _Column("Available", ".status.readyReplicas", "integer", description="Replicas that are ready")
_COLUMNS: Final[dict[str, tuple[_Column, ...]]] = {
    "ModelPool": (
        _condition("Ready"),
        _Column("Desired", ".status.desiredReplicas", "integer", description="Workers wanted"),
        _AVAILABLE,
        _AGE,
        _Column("Model", ".spec.model.name"),
        _Column("Accelerator", ".spec.accelerator.profileRef"),
        _Column("Role", ".spec.role", wide=True),
        _Column("Signal", ".status.autoscaling.bindingSignal", wide=True, description="What the autoscaler went by"),
        _WHY,
    ),
    "RoutingPolicy": (
        _condition("Ready"),
        _condition("Accepted"),
        _condition("Programmed"),
        _AGE,
        _Column("Strategy", ".spec.strategy"),
        _Column("Energy", ".spec.energy.mode"),
        _Column("Priority", ".spec.priority", "integer", wide=True),
        _condition("Conflicted", wide=True),
        _WHY,
    ),
    "FleetRouter": (
        _condition("Ready"),
        _Column("Desired", ".spec.replicas", "integer", description="Router pods wanted"),
        _AVAILABLE,
        _AGE,
        _Column("Address", ".status.address"),
        _Column("Revision", ".status.revision", wide=True, description="Configuration last written"),
        _WHY,
    ),
    "AcceleratorProfile": (
        _condition("Ready"),
        _Column("Product", ".spec.accelerator.product"),
        _Column("Idle W", ".spec.power.idleWatts", "integer"),
        _Column("Max W", ".spec.power.maxWatts", "integer"),
        _AGE,
        _WHY,
    ),
}


def columns(kind: str) -> list[dict[str, Any]]:
    """The printer columns of a kind."""
    return [column.entry() for column in _COLUMNS[kind]]
