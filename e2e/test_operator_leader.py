"""The operator dies: the standby goes on where it was."""

from __future__ import annotations

import time

from harness.kube import wait_until
from harness.sentences import Given, Story, Then, When
from support.installation import CONTAINER, Installation
from support.manifests import pool
from support.serving import Tells, all_answer, lossless_load, serving

LEASE_S = 15
"""For which a Lease counts after its holder's last word."""


def test_a_standby_takes_over_from_a_leader_that_was_killed(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, tells: Tells
) -> None:
    """Under streams, which it costs nothing."""
    serving(given, then, workers=2)
    wait_until(lambda: len(kvfleet.ready_pods()) == 2, "leader and standby are ready", 60)
    leader, transitions = kvfleet.leader(), kvfleet.lease()["leaseTransitions"]
    (standby,) = set(kvfleet.ready_pods()) - {leader}

    with lossless_load(story, then, 2, tells) as running:
        killed_at = time.monotonic()
        with story.tells(f"when the leading operator {leader} is killed"):
            story.cluster.signal_container(kvfleet.namespace, leader, CONTAINER, 9)
        when.applied(pool("other", 0)).scaled("ModelPool", "llama", to=3)
        with story.tells("then the standby leads"):
            wait_until(lambda: kvfleet.leader() == standby, f"{standby} leads", LEASE_S + 15)
        led_s = time.monotonic() - killed_at
        then.ready("ModelPool", "other")
        took_up_s = time.monotonic() - killed_at
        then.ready("ModelPool", "llama", within_s=60)
        all_answer(then, running, 3)
    assert kvfleet.lease()["leaseTransitions"] == transitions + 1
    tells(f"the standby led {led_s:.1f} s after the leader's SIGKILL and had reconciled after {took_up_s:.1f} s")

    with story.tells("then the killed one is a standby again"):
        wait_until(lambda: len(kvfleet.ready_pods()) == 2, "both are ready", 60)
    assert kvfleet.metrics(leader).total("kvfleet_operator_leader") == 0
    assert kvfleet.metrics(standby).total("kvfleet_operator_leader") == 1


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
