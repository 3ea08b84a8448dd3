"""What a reconciliation wants, and what came of it: the two messages between the pure part and the client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]
"""A Kubernetes object as JSON."""


def kind_name(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """(kind, name): what identifies a child among its owner's children."""
    return manifest["kind"], manifest["metadata"]["name"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The children an object wants. Owned children in neither list are deleted."""

    objects: list[Manifest] = field(default_factory=list)
    untouched: frozenset[tuple[str, str]] = frozenset()
    """(kind, name) of children to leave as they are, or absent."""


def leftovers(children: Mapping[tuple[str, str], Manifest], plan: Plan) -> list[Manifest]:
    """The owned `children` a plan has no use for and that are not on their way out already."""
    kept = {kind_name(manifest) for manifest in plan.objects} | plan.untouched
    return [
        child for key, child in children.items() if key not in kept and not child["metadata"].get("deletionTimestamp")
    ]


@dataclass(frozen=True, slots=True)
class Rejection:
    """A child that could not be brought about."""

    kind: str
    name: str
    reason: str
    """`NameConflict`: it exists and is not ours; `Rejected`: the API server refused it."""
    message: str


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a plan."""

    rejections: list[Rejection] = field(default_factory=list)
    live: Mapping[tuple[str, str], Manifest] = field(default_factory=dict)
    """(kind, name) → the child as the API server has it now."""
