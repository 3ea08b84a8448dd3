"""AcceleratorProfile: no children; its status says that it is accepted, which pools refer to it and what they taught."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.modelpool import ModelPool
from kvfleet_operator.reconcile import conditions, energyview
from kvfleet_operator.reconcile.conditions import Finding
from kvfleet_operator.reconcile.energyview import PoolEnergy

MAX_POOLS = 1000
"""Entries of `status.pools`; further ones are counted in the message only."""


def status(
    profile: AcceleratorProfile,
    pools: Iterable[ModelPool],
    namespaces: Collection[str] | None,
    now: str,
    energies: Iterable[PoolEnergy] = (),
) -> dict[str, Any]:
    """`namespaces`: those this operator watches, None for all. Entries of others' namespaces stay as they are."""
    name = profile.metadata.name
    ours = {pool.key for pool in pools if pool.spec.accelerator.profile_ref == name}
    before = profile.status.pools if profile.status else []
    known = profile.status.estimates if profile.status else []
    others = {key for key in before if _foreign(key, namespaces)}
    foreign = {entry.pool for entry in known if _foreign(entry.pool, namespaces)}
    users = sorted(ours | others)
    message = f"{len(users)} ModelPool(s) refer to it."
    findings = [Finding("Accepted", "True", "Accepted", message), Finding("Ready", "True", "Ready", message)]
    previous = profile.status.conditions if profile.status else []
    settled = conditions.settle(previous, findings, generation=profile.metadata.generation, now=now)
    return {
        "observedGeneration": profile.metadata.generation,
        "pools": users[:MAX_POOLS],
        "estimates": energyview.estimates(energies, known, foreign, now),
        "conditions": conditions.dump(settled),
    }


def _foreign(pool: str, namespaces: Collection[str] | None) -> bool:
    return namespaces is not None and pool.partition("/")[0] not in namespaces
