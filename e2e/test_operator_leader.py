"""The operator dies: the standby goes on where it was."""

from __future__ import annotations

import itertools
import time

import pytest
from harness.kube import wait_until
from harness.sentences import Given, Story, Then, When
from support.installation import CONTAINER, RESYNC_S, Installation
from support.manifests import pool
from support.serving import Tells, all_answer, lossless_load, serving

LEASE_S = 15
"""For which a Lease counts after its holder's last word."""
AT_ONCE_S = 3.0
READ_TIMEOUT_S = 30
"""After which the operator gives a listing up that nobody answers."""


def test_another_operator_takes_over_from_a_leader_that_was_killed(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, tells: Tells
) -> None:
    """Under streams, which it costs nothing. The killed one is started again and waits for the Lease's end as well."""
    serving(given, then, workers=2)
    wait_until(lambda: len(kvfleet.ready_pods()) == 2, "leader and standby are ready", 60)
    leader, before = kvfleet.leader(), kvfleet.lease()

    with lossless_load(story, then, 2, tells) as running:
        killed_at = time.monotonic()
        with story.tells(f"when the leading operator {leader} is killed"):
            story.cluster.signal_container(kvfleet.namespace, leader, CONTAINER, 9)
        when.applied(pool("other", 0)).scaled("ModelPool", "llama", to=3)
        with story.tells("then another one leads"):
            dead = ("", before["holderIdentity"])
            wait_until(lambda: kvfleet.lease().get("holderIdentity", "") not in dead, "another leads", LEASE_S + 15)
        led_s = time.monotonic() - killed_at
        then.ready("ModelPool", "other")
        took_up_s = time.monotonic() - killed_at
        then.ready("ModelPool", "llama", within_s=60)
        all_answer(then, running, 3)
    assert kvfleet.lease()["leaseTransitions"] == before["leaseTransitions"] + 1
    tells(f"another led {led_s:.1f} s after the leader's SIGKILL and had reconciled after {took_up_s:.1f} s")

    with story.tells("then there are a leader and a standby again"):
        wait_until(lambda: len(kvfleet.ready_pods()) == 2, "both are ready", 60)
    leads = {pod: kvfleet.metrics(pod).total("kvfleet_operator_leader") for pod in kvfleet.ready_pods()}
    assert leads[kvfleet.leader()] == 1
    assert sorted(leads.values()) == [0, 1]


def test_a_leader_that_is_deleted_hands_over_at_once(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, tells: Tells
) -> None:
    wait_until(lambda: len(kvfleet.ready_pods()) == 2, "leader and standby are ready", 60)
    leader = kvfleet.leader()
    began = time.monotonic()
    with story.tells(f"when the leading operator {leader} is deleted"):
        kvfleet.kube.delete("Pod", leader)
    with story.tells("then another one leads"):
        wait_until(lambda: kvfleet.leader() != leader, "another operator leads", LEASE_S)
    led_s = time.monotonic() - began
    assert led_s < LEASE_S / 2, "the Lease was not given back"
    when.applied(pool("after", 0))
    then.ready("ModelPool", "after")
    tells(f"deleted; another led after {led_s:.1f} s")
    with story.tells("then there are two again"):
        wait_until(lambda: len(set(kvfleet.ready_pods()) - {leader}) == 2, "both are ready", 60)


def test_watches_that_go_dead_are_noticed_and_nothing_is_missed(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, tells: Tells
) -> None:
    """As after a firewall has forgotten its connections: neither end is told."""
    if not story.cluster.reaches_pods:
        pytest.skip("connections of pods are cut on the built-in cluster only")
    given.applied(pool("seen", 0))
    then.ready("ModelPool", "seen")
    leader, transitions = kvfleet.leader(), kvfleet.lease()["leaseTransitions"]
    began = time.monotonic()
    with story.tells(f"when the connections of {leader} go dead"):
        story.cluster.cut_connections(kvfleet.namespace, leader)
    when.applied(pool("unseen", 0))
    then.ready("ModelPool", "unseen", within_s=RESYNC_S + READ_TIMEOUT_S + 30)
    tells(f"with dead watches a new ModelPool was Ready after {time.monotonic() - began:.1f} s")
    then.eventually("what no watch delivered is counted", lambda: missed(kvfleet, leader) > 0)

    versions = itertools.count()

    def a_change_is_seen_at_once() -> bool:
        changed = {"spec": {"engine": {"env": [{"name": "VERSION", "value": str(next(versions))}]}}}
        generation = story.kube.patch("ModelPool", "unseen", changed)["metadata"]["generation"]
        deadline = time.monotonic() + AT_ONCE_S
        while time.monotonic() < deadline:
            if story.kube.get("ModelPool", "unseen")["status"].get("observedGeneration") == generation:
                return True
            time.sleep(0.05)
        return False

    then.eventually("changes are seen at once again", a_change_is_seen_at_once, within_s=120)
    tells(f"the watches worked again after {time.monotonic() - began:.1f} s")
    assert (kvfleet.leader(), kvfleet.lease()["leaseTransitions"]) == (leader, transitions), "the leader was lost"


def missed(kvfleet: Installation, pod: str) -> float:
    return kvfleet.metrics(pod).total("kvfleet_operator_watch_missed_events_total")
