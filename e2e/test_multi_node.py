"""A worker over several nodes: a group of a LeaderWorkerSet, run by that project's own controller."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from harness.cluster import Cluster
from harness.kube import Kube, Object
from harness.sentences import Given, Story, Then, When
from harness.streams import streams
from support import leaderworkersets
from support.installation import Installation, condition
from support.manifests import MODEL, engine, policy, pool, router
from support.serving import all_answer, names

GROUPS, NODES = 2, 2
LEADERS = "app.kubernetes.io/component=engine"
FOLLOWERS = "app.kubernetes.io/component=engine-follower"
PARALLELISM = {"tensor": 2, "nodes": NODES}
ROLLOUT = {"maxSurge": 1, "maxUnavailable": 0, "drainSeconds": 10}
"""Followers stay until their leader is gone, and take a simulated leader, which is back at its address at once, for the one
they know: they leave when the drain is over. A real engine is not ready again before its new followers are."""


@pytest.fixture(scope="module")
def without_lws(cluster: Cluster) -> Iterator[None]:
    if leaderworkersets.installed(cluster):
        pytest.fail(
            "this cluster has LeaderWorkerSet, and the test would remove it: run it on kind or the built-in cluster"
        )
    yield
    leaderworkersets.remove(cluster)


def test_a_multi_node_pool_waits_for_its_kind_and_then_serves_from_its_leaders(
    without_lws: None, kvfleet: Installation, given: Given, when: When, then: Then, story: Story
) -> None:
    kube = story.kube
    if leaderworkersets.installed(story.cluster):  # by a first try
        leaderworkersets.remove(story.cluster)
    workers = pool("llama", GROUPS, engine=engine(1), parallelism=PARALLELISM, rollout=ROLLOUT)
    given.applied(workers, policy(strategy="least_request"), router())

    def lacks_its_kind(found: Object) -> bool:
        accepted = condition(found, "Accepted")
        return accepted.get("reason") == "KindNotInstalled" and "LeaderWorkerSet" in accepted["message"]

    then.is_so("ModelPool", "llama", "says what is missing", lacks_its_kind)
    with story.tells("when LeaderWorkerSet is installed"):
        leaderworkersets.install(story.cluster)
    then.ready("ModelPool", "llama", within_s=120).ready("RoutingPolicy", "all", within_s=60)
    live = kube.get("LeaderWorkerSet", "llama-lws")
    assert live["spec"]["leaderWorkerTemplate"]["size"] == NODES
    assert live["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"] == {
        "maxSurge": 1, "maxUnavailable": 0, "partition": 0,
    }  # fmt: skip
    assert [len(kube.list("Pod", selector)) for selector in (LEADERS, FOLLOWERS)] == [GROUPS, GROUPS * (NODES - 1)]
    assert kube.get("ModelPool", "llama")["status"]["readyReplicas"] == GROUPS
    assert engines_know_each_other(kube)

    leaders = names(kube, LEADERS)
    with streams(story.url("router", path="/v1/chat/completions"), MODEL, (20, 20, 20, 60)) as load:
        all_answer(then, load, GROUPS)
        assert load.workers_since(0) == leaders

        when.scaled("LeaderWorkerSet", "llama-lws", to=1)
        then.is_so(
            "LeaderWorkerSet", "llama-lws", "has its replicas back", lambda found: found["spec"]["replicas"] == GROUPS
        )
        when.scaled("ModelPool", "llama", to=GROUPS + 1)
        then.ready("ModelPool", "llama", within_s=120)
        all_answer(then, load, GROUPS + 1)

        before = names(kube, LEADERS)
        when.patched("ModelPool", "llama", {"spec": {"engine": {"args": ["--max-num-seqs", "128"]}}})
        then.is_so("ModelPool", "llama", "rolls out", lambda found: condition(found, "Progressing")["status"] == "True")
        then.ready("ModelPool", "llama", within_s=180)
        all_answer(then, load, GROUPS + 1)
        assert all_new(kube.list("Pod", LEADERS))
        assert len(before) == GROUPS + 1
    assert load.failures == []

    when.deleted("ModelPool", "llama")
    then.gone("LeaderWorkerSet", "llama-lws").counts("Pod", 0, LEADERS, within_s=90).counts(
        "Pod", 0, FOLLOWERS, within_s=90
    )


def all_new(leaders: list[Object]) -> bool:
    new = ["--max-num-seqs" in pod["spec"]["containers"][0]["args"] for pod in leaders]
    return new == [True] * (GROUPS + 1)


def replicas(count: int) -> Callable[[Object], bool]:
    return lambda found: bool(found["spec"]["replicas"] == count)


def test_a_multi_node_pool_is_woken_from_zero_grows_with_the_load_and_goes_to_zero_again(
    without_lws: None, kvfleet: Installation, given: Given, then: Then, story: Story
) -> None:
    if not leaderworkersets.installed(story.cluster):
        leaderworkersets.install(story.cluster)
    scaling = {
        "minReplicas": 0,
        "maxReplicas": GROUPS,
        "scaleToZero": {"idleSeconds": 3},
        "signals": [{"concurrency": {"targetPerReplica": 2}}],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}},
    }
    given.applied(pool(engine=engine(1), parallelism=PARALLELISM, autoscaling=scaling), policy(), router())
    then.ready("FleetRouter", "router", within_s=90).ready("RoutingPolicy", "all", within_s=60)
    then.is_so("LeaderWorkerSet", "llama-lws", "has no group", replicas(0))
    with streams(story.url("router", path="/v1/chat/completions"), MODEL, (100,) * 6) as load:
        then.is_so("LeaderWorkerSet", "llama-lws", f"has {GROUPS} groups", replicas(GROUPS), within_s=90)
        then.eventually("each has answered", lambda: len(load.workers_since(0)) == GROUPS, within_s=90)
    assert load.failures == []
    then.is_so("LeaderWorkerSet", "llama-lws", "has no group", replicas(0), within_s=90)
    then.counts("Pod", 0, LEADERS, within_s=90).counts("Pod", 0, FOLLOWERS, within_s=90)


def engines_know_each_other(kube: Kube) -> bool:
    """Each follower was told its leader's address and its own rank, as the engine's processes need it."""
    for pod in kube.list("Pod", FOLLOWERS):
        log = kube.logs(pod["metadata"]["name"], "engine")
        leader = f"{pod['metadata']['labels']['leaderworkerset.sigs.k8s.io/name']}-"
        if "--headless" not in log or "--node-rank 1" not in log or f"--master-addr {leader}" not in log:
            return False
    return True
