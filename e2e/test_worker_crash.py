"""A worker that is killed: what had not begun is answered by others, what had begun ends with a clear error."""

from __future__ import annotations

from harness.sentences import Given, Story, Then, When
from harness.streams import streams
from support.installation import Installation, Metrics, pod_page
from support.manifests import MODEL, engine, policy, pool, router
from support.serving import ENGINES, ROUTERS, Tells, all_answer, names, streams_go_on

WORKERS, SEQUENCES, SENDERS = 3, 2, 15
"""An engine runs two sequences at once, so that of its five requests three are waiting when it dies."""
TOKENS = 100
ADMIN_PORT = 9090


def router_metrics(story: Story) -> Metrics:
    (pod,) = names(story.kube, ROUTERS)
    return Metrics(pod_page(story.cluster, story.kube, pod, ADMIN_PORT, "/metrics"))


def test_a_worker_that_is_killed(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, tells: Tells
) -> None:
    engines = engine(1, "--max-num-seqs", str(SEQUENCES))
    given.applied(pool(replicas=WORKERS, engine=engines), policy(strategy="least_request"), router())
    then.ready("ModelPool", "llama", within_s=120).ready("FleetRouter", "router", within_s=120)
    victims = sorted(names(story.kube, ENGINES))[:2]
    with streams(story.url("router", path="/v1/chat/completions"), MODEL, (TOKENS,) * SENDERS) as load:
        for victim in victims:
            all_answer(then, load, WORKERS)
            in_flight = router_metrics(story).total("kvfleet_router_worker_in_flight", worker=f".*{victim}")
            assert in_flight > SEQUENCES, "no request is waiting at the worker: the test would prove nothing"
            when.signalled(victim, "engine", 9)
            streams_go_on(then, load, 2 * SENDERS)
            then.ready("ModelPool", "llama", within_s=60)
        all_answer(then, load, WORKERS)

    after = router_metrics(story)
    retried = after.total("kvfleet_router_retries_total")
    broken = after.total("kvfleet_router_requests_total", outcome="failed")
    tells(
        f"{len(victims)} workers killed: {len(load.whole)} streams whole, {retried:.0f} tries on another worker,"
        f" {len(load.failures)} streams that had begun ended with an error event"
    )
    assert all(failure.told and failure.events for failure in load.failures), (
        "a request was lost before its first token"
    )
    assert {failure.told for failure in load.failures} == {
        "The worker failed while it answered; what came before is incomplete."
    }
    assert 0 < len(load.failures) <= len(victims) * SEQUENCES
    assert broken == len(load.failures)
    assert retried >= len(victims)
