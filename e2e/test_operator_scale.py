"""Many objects at once, and nothing to do: what it costs the API server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from harness.kube import Kube, Object
from harness.sentences import Given, Story, Then, is_ready
from support.installation import RESYNC_S, Installation, Metrics
from support.manifests import policy, pool, router

POOLS, POLICIES = 50, 20
RUNNING = 4
"""Pools with a worker; the others are at zero: the machine runs the workers too."""
WRITES = "create|update|patch|delete"
OF_KVFLEET = ("ModelPool", "RoutingPolicy", "FleetRouter", "AcceleratorProfile")
CHILDREN = ("Deployment", "Service", "PodDisruptionBudget", "ConfigMap", "ServiceAccount", "Role", "RoleBinding")
REQUESTS = "kvfleet_operator_api_requests_total"
MISSED = "kvfleet_operator_watch_missed_events_total"


def pools() -> list[Object]:
    return [
        pool(f"pool-{number}", replicas=int(number < RUNNING), model=f"model-{number}-8b") for number in range(POOLS)
    ]


def policies() -> list[Object]:
    return [policy(f"policy-{number}", f"pool-{2 * number}", f"pool-{2 * number + 1}") for number in range(POLICIES)]


def versions(kube: Kube) -> dict[str, str]:
    """Of everything kvfleet owns or reports on, in the test's namespace and of the cluster."""
    found = itertools.chain(
        (item for kind in OF_KVFLEET for item in kube.list(kind)),
        (item for kind in CHILDREN for item in kube.list(kind, "app.kubernetes.io/managed-by=kvfleet-operator")),
    )
    return {f"{item['kind']} {item['metadata']['name']}": item["metadata"]["resourceVersion"] for item in found}


def writes(metrics: Metrics) -> float:
    """The Lease's, which the operator renews all the time, are not counted."""
    return metrics.total(REQUESTS, verb=WRITES, resource="(?!leases).*")


def test_fifty_pools_and_twenty_policies_become_ready_and_a_resync_writes_nothing(
    kvfleet: Installation, given: Given, then: Then, story: Story, tells: Callable[[str], None]
) -> None:
    kube = story.kube
    given.applied(router())
    then.ready("FleetRouter", "router", within_s=60)
    before, began = kvfleet.metrics(), time.monotonic()
    given.applied(*pools(), *policies())

    def all_ready(kind: str, number: int) -> None:
        then.eventually(f"{number} {kind} are Ready", lambda: sum(map(is_ready, kube.list(kind))) == number, 180)

    all_ready("ModelPool", POOLS)
    all_ready("RoutingPolicy", POLICIES)
    all_ready("FleetRouter", 1)
    took_s, after = time.monotonic() - began, kvfleet.metrics()
    requests = after.total(REQUESTS) - before.total(REQUESTS)
    written = writes(after) - writes(before)
    tells(
        f"{POOLS} ModelPools and {POLICIES} RoutingPolicies Ready after {took_s:.1f} s;"
        f" {requests:.0f} API requests, {written:.0f} of them writes"
    )
    assert after.total("kvfleet_operator_reconciles_total", result="error") == before.total(
        "kvfleet_operator_reconciles_total", result="error"
    )

    settled = versions(kube)
    resynced = resyncs(kvfleet)
    quiet = kvfleet.metrics()
    then.eventually("the operator has resynced twice", lambda: resyncs(kvfleet) >= resynced + 2, 3 * RESYNC_S + 30)
    assert versions(kube) == settled
    after = kvfleet.metrics()
    assert writes(after) == writes(quiet)
    assert after.total(MISSED) == quiet.total(MISSED)  # not from zero: earlier tests cut watches and take rights away


def resyncs(kvfleet: Installation) -> float:
    """Listings of ModelPools by the leader: each resync makes one."""
    return kvfleet.metrics().total(REQUESTS, verb="list", resource="modelpools")
