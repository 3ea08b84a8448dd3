"""Under constant streams, whatever is done to the fleet on purpose costs no request and cuts no answer short."""

from __future__ import annotations

import time

import pytest
from harness.cluster import Cluster
from harness.sentences import Given, Story, Then, When
from support.installation import Installation
from support.serving import ENGINES, ROUTERS, Tells, all_answer, lossless_load, names, serving

AWAY_S = 30


def test_scaling_up_and_down(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, tells: Tells
) -> None:
    serving(given, then, workers=4)
    with lossless_load(story, then, 4, tells) as running:
        when.scaled("ModelPool", "llama", to=8)
        then.ready("ModelPool", "llama", within_s=120)
        all_answer(then, running, 8)
        when.scaled("ModelPool", "llama", to=2)
        then.ready("ModelPool", "llama", within_s=120)
        then.counts("Pod", 2, ENGINES, within_s=120)
        two = time.monotonic()
        then.eventually("two workers answer", lambda: len(running.workers_since(two)) == 2)
        assert running.workers_since(two) == names(story.kube, ENGINES)


@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (0, 1)])
def test_an_engine_rollout(
    kvfleet: Installation,
    given: Given,
    when: When,
    then: Then,
    story: Story,
    tells: Tells,
    surge: int,
    unavailable: int,
) -> None:
    """With never more workers than maxSurge allows, nor fewer than maxUnavailable."""
    workers = 3
    serving(given, then, workers, rollout={"maxSurge": surge, "maxUnavailable": unavailable})
    before = names(story.kube, ENGINES)
    existing, available = [workers], [workers]

    def the_old_ones_are_gone() -> bool:
        status = story.kube.get("Deployment", "llama-workers")["status"]
        existing.append(status["replicas"])
        available.append(status.get("availableReplicas", 0))
        return not before & names(story.kube, ENGINES)

    with lossless_load(story, then, workers, tells) as running:
        when.patched("ModelPool", "llama", {"spec": {"engine": {"args": ["--max-num-seqs", "128"]}}})
        then.eventually("the old workers are gone", the_old_ones_are_gone, 180)
        then.ready("ModelPool", "llama", within_s=60)
        all_answer(then, running, workers)
    assert max(existing) == workers + surge
    assert min(available) == workers - unavailable


def test_a_router_rollout(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, tells: Tells
) -> None:
    serving(given, then, workers=2, routers=2)
    before = names(story.kube, ROUTERS)
    with lossless_load(story, then, 2, tells):
        annotation = {"spec": {"podTemplate": {"metadata": {"annotations": {"e2e/rollout": "2"}}}}}
        when.patched("FleetRouter", "router", annotation)
        then.eventually("the old routers are gone", lambda: not before & names(story.kube, ROUTERS), 180)
        then.ready("FleetRouter", "router", within_s=60)


def test_a_worker_that_is_deleted(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, tells: Tells
) -> None:
    serving(given, then, workers=2)
    victim, *_ = names(story.kube, ENGINES)
    with lossless_load(story, then, 2, tells) as running:
        deleted = time.monotonic()
        when.deleted("Pod", victim)
        then.gone("Pod", victim, within_s=60).ready("ModelPool", "llama", within_s=60)
        outlived = [stream for stream in running.whole if stream.worker == victim and stream.ended > deleted]
        assert outlived, "no stream was running on the worker: the test proved nothing"
        all_answer(then, running, 2)


def test_an_api_server_that_is_away_for_half_a_minute(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, cluster: Cluster, tells: Tells
) -> None:
    """The operator loses its Lease meanwhile, and goes on afterwards; a router needs neither of them."""
    if not cluster.reaches_pods:
        pytest.skip("without the API server the router cannot be reached from outside the cluster")
    serving(given, then, workers=2, routers=2)
    with lossless_load(story, then, 2, tells) as running:
        with story.tells("when the API server is stopped"):
            cluster.stop_api_server()
        try:
            gone = time.monotonic()
            then.eventually(f"{AWAY_S} s have passed", lambda: time.monotonic() - gone > AWAY_S, AWAY_S + 5)
            assert len(running.workers_since(gone + 1)) == 2
        finally:
            with story.tells("when the API server is started again"):
                cluster.start_api_server()
        back = time.monotonic()
        when.scaled("ModelPool", "llama", to=3)
        then.is_so("Deployment", "llama-workers", "is scaled", lambda found: found["spec"]["replicas"] == 3, 60)
        tells(f"the operator reconciled again {time.monotonic() - back:.1f} s after the API server was back")
        then.ready("ModelPool", "llama", within_s=120)
        all_answer(then, running, 3)
