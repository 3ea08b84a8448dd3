"""A fleet of the size people have: everything becomes Ready, and then nothing is written any more."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from harness.kube import Kube
from harness.sentences import Story, Then, is_ready
from support.installation import RESYNC_S, Installation
from support.manifests import policy, pool, router

POOLS, POLICIES = 50, 20
REQUESTS = "kvfleet_operator_api_requests_total"
RECONCILES = "kvfleet_operator_reconciles_total"
WRITES = "create|update|patch|delete|apply"


@pytest.fixture
def applied(kvfleet: Installation, story: Story) -> tuple[Kube, float]:
    """50 pools of 50 models, 20 policies over them, one router; and when the first was applied. Engines are left at zero."""
    kube = story.kube
    started = time.monotonic()
    with story.tells(f"when {POOLS} ModelPools, {POLICIES} RoutingPolicies and a FleetRouter are applied"):
        for number in range(POOLS):
            kube.apply(pool(f"pool-{number}", replicas=0, model=f"model-{number}"))
        for number in range(POLICIES):
            kube.apply(policy(f"policy-{number}", f"pool-{number}"))
        kube.apply(router())
    return kube, started


def all_ready(kube: Kube, kind: str, count: int) -> bool:
    found = kube.list(kind)
    return len(found) == count and all(map(is_ready, found))


def versions(kube: Kube) -> dict[tuple[str, str], str]:
    kinds = ("ModelPool", "RoutingPolicy", "FleetRouter", "Deployment", "Service", "PodDisruptionBudget", "ConfigMap")
    return {
        (kind, item["metadata"]["name"]): item["metadata"]["resourceVersion"]
        for kind in kinds
        for item in kube.list(kind)
    }


def test_a_large_fleet_becomes_ready_and_then_rests(
    applied: tuple[Kube, float], kvfleet: Installation, then: Then, tells: Callable[[str], None]
) -> None:
    kube, started = applied
    for kind, count in (("ModelPool", POOLS), ("RoutingPolicy", POLICIES), ("FleetRouter", 1)):
        then.eventually(f"{count} {kind} are Ready", lambda k=kind, n=count: all_ready(kube, k, n), within_s=180)
    ready_s = time.monotonic() - started
    metrics = kvfleet.metrics()
    tells(
        f"{POOLS} pools and {POLICIES} policies Ready {ready_s:.1f} s after the first apply; the operator made "
        f"{metrics.total(REQUESTS):.0f} API requests, {metrics.total(REQUESTS, verb=WRITES):.0f} of them writes"
    )

    # What was written last may still come back as events; then a whole round writes nothing.
    before, written = versions(kube), writes(kvfleet)

    def a_round_without_a_write() -> bool:
        nonlocal before, written
        round_begins(kvfleet, then)
        was, had = (before, written)
        before, written = versions(kube), writes(kvfleet)
        return (before, written) == (was, had)

    then.eventually("a resync of everything writes nothing", a_round_without_a_write, within_s=RESYNC_S * 5 + 60)


def writes(kvfleet: Installation) -> float:
    """Everything the leader wrote so far but for its Lease."""
    metrics = kvfleet.metrics()
    return metrics.total(REQUESTS, verb=WRITES) - metrics.total(REQUESTS, verb=WRITES, resource="leases")


def round_begins(kvfleet: Installation, then: Then) -> None:
    """Until every object was reconciled once more."""
    done = kvfleet.metrics().total(RECONCILES)

    def again() -> bool:
        return kvfleet.metrics().total(RECONCILES) >= done + POOLS + POLICIES + 1

    then.eventually("every object was looked at again", again, within_s=RESYNC_S * 3 + 60)
