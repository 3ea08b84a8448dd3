"""AcceleratorProfile: no children; its status says that it is accepted and which pools refer to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.modelpool import ModelPool
from kvfleet_operator.reconcile import conditions
from kvfleet_operator.reconcile.conditions import Finding

MAX_POOLS = 1000
"""Entries of `status.pools`; further ones are counted in the message only."""


def status(
    profile: AcceleratorProfile, pools: Iterable[ModelPool], namespaces: Collection[str] | None, now: str
) -> dict[str, Any]:
    """`namespaces`: those this operator watches, None for all. Entries of others' namespaces stay as they are."""
    name = profile.metadata.name
    ours = {pool.key for pool in pools if pool.spec.accelerator.profile_ref == name}
    before = profile.status.pools if profile.status else []
    others = {key for key in before if namespaces is not None and key.partition("/")[0] not in namespaces}
    users = sorted(ours | others)
    message = f"{len(users)} ModelPool(s) refer to it."
    findings = [Finding("Accepted", "True", "Accepted", message), Finding("Ready", "True", "Ready", message)]
    previous = profile.status.conditions if profile.status else []
    settled = conditions.settle(previous, findings, generation=profile.metadata.generation, now=now)
    return {
        "observedGeneration": profile.metadata.generation,
        "pools": users[:MAX_POOLS],
        "conditions": conditions.dump(settled),
    }
