"""What to look at again when an object changed: the edges between kinds, in one place.

AcceleratorProfile → pools that refer to it → routers and policies of their namespace
ModelPool          → itself, its profile, routers and policies of its namespace
RoutingPolicy      → routers and policies of its namespace (precedence and conflicts)
FleetRouter        → itself, policies of its namespace (Programmed)
a child            → its controller
a router's pod     → routers and policies of its namespace (Programmed)
a worker with LoRA → its pool (AdaptersLoaded)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from kvfleet_operator.reconcile import names


class Key(NamedTuple):
    """One object to reconcile."""

    kind: str
    namespace: str | None
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


class Lookup(Protocol):
    """What `dependents` needs to know of the world."""

    def keys(self, kind: str, namespace: str | None = None) -> Iterable[Key]: ...

    def pools_of_profile(self, profile: str) -> Iterable[Key]: ...


KINDS = ("AcceleratorProfile", "ModelPool", "RoutingPolicy", "FleetRouter")


def key_of(manifest: Mapping[str, Any]) -> Key:
    metadata = manifest["metadata"]
    return Key(manifest["kind"], metadata.get("namespace"), metadata["name"])


def dependents(manifest: Mapping[str, Any], lookup: Lookup) -> set[Key]:
    """The keys to reconcile because `manifest` came, changed or went; the object itself included."""
    key = key_of(manifest)
    match key.kind:
        case "AcceleratorProfile":
            pools = set(lookup.pools_of_profile(key.name))
            routing = {found for pool in pools for found in _routing(pool.namespace, lookup)}
            return {key, *pools, *routing}
        case "ModelPool":
            profile = ((manifest.get("spec") or {}).get("accelerator") or {}).get("profileRef")
            profiles = {Key("AcceleratorProfile", None, profile)} if isinstance(profile, str) else set()
            return {key, *profiles, *lookup.keys("ModelPool", key.namespace), *_routing(key.namespace, lookup)}
        case "RoutingPolicy":
            return {key, *_routing(key.namespace, lookup)}
        case "FleetRouter":
            return {key, *lookup.keys("RoutingPolicy", key.namespace)}
        case "Pod":
            return _pods_owners(manifest, lookup)
        case _:
            return _controller(manifest)


def _routing(namespace: str | None, lookup: Lookup) -> set[Key]:
    return {*lookup.keys("FleetRouter", namespace), *lookup.keys("RoutingPolicy", namespace)}


def _pods_owners(manifest: Mapping[str, Any], lookup: Lookup) -> set[Key]:
    labels, namespace = manifest["metadata"].get("labels") or {}, manifest["metadata"].get("namespace")
    if names.ROUTER in labels:
        return _routing(namespace, lookup)
    if names.LORA not in labels:
        return set()
    return {key for key in lookup.keys("ModelPool", namespace) if names.label_value(key.name) == labels.get(names.POOL)}


def _controller(manifest: Mapping[str, Any]) -> set[Key]:
    controller = names.controller_of(manifest)
    if controller is None or controller.get("kind") not in KINDS:
        return set()
    return {Key(controller["kind"], manifest["metadata"].get("namespace"), controller["name"])}
