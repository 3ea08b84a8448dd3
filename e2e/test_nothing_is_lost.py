"""Under constant streams, whatever is done to the fleet on purpose costs no request and cuts no answer short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from harness.kube import Kube
from harness.sentences import Given, Story, Then, When
from harness.streams import Streams, streams
from support.installation import Installation
from support.manifests import MODEL, engine, policy, pool, router

LOAD = (20, 20, 20, 60, 400, 400, 1500)
"""Output tokens of each sender's requests at an engine's real speed: some take moments, some outlast the 5 s that a worker
goes on for after it was told to leave."""
ENGINES = "app.kubernetes.io/component=engine"
ROUTERS = "app.kubernetes.io/component=router"
Tells = Callable[[str], None]


@pytest.fixture
def fleet(kvfleet: Installation, given: Given, then: Then) -> Callable[[int, int], None]:
    """Has a pool of as many workers, a policy and a router of as many replicas, all ready."""

    def build(workers: int, routers: int = 1) -> None:
        given.applied(pool(replicas=workers, engine=engine(1)), policy(), router(replicas=routers))
        then.ready("ModelPool", "llama", within_s=120).ready("FleetRouter", "router", within_s=120)
        then.ready("RoutingPolicy", "all", within_s=60)

    return build


@contextmanager
def load(story: Story, then: Then, workers: int, tells: Tells) -> Iterator[Streams]:
    """Streams through the router's Service while the block lasts, every one of which must come to its end."""
    with streams(story.url("router", path="/v1/chat/completions"), MODEL, LOAD) as running:
        then.eventually("every worker answers", lambda: len(running.workers_since(0)) == workers)
        yield running
        over = time.monotonic()
        then.eventually("streams go on", lambda: len(running.since(over)) > 10)
    tells(f"{len(running.whole)} streams, {len(running.failures)} failed or cut short")
    assert running.failures == []


def names(kube: Kube, selector: str) -> set[str]:
    return {pod["metadata"]["name"] for pod in kube.list("Pod", selector)}


def test_scaling_up_and_down(
    fleet: Callable[[int, int], None], when: When, then: Then, story: Story, tells: Tells
) -> None:
    fleet(4, 1)
    with load(story, then, 4, tells) as running:
        when.scaled("ModelPool", "llama", to=8)
        then.ready("ModelPool", "llama", within_s=120)
        eight = time.monotonic()
        then.eventually("eight workers answer", lambda: len(running.workers_since(eight)) == 8)
        when.scaled("ModelPool", "llama", to=2)
        then.ready("ModelPool", "llama", within_s=120)
        then.counts("Pod", 2, ENGINES, within_s=120)
        two = time.monotonic()
        then.eventually("two workers answer", lambda: len(running.workers_since(two)) == 2)
        assert running.workers_since(two) == names(story.kube, ENGINES)


def test_an_engine_rollout(
    fleet: Callable[[int, int], None], when: When, then: Then, story: Story, tells: Tells
) -> None:
    fleet(3, 1)
    before = names(story.kube, ENGINES)
    with load(story, then, 3, tells) as running:
        when.patched("ModelPool", "llama", {"spec": {"engine": {"args": ["--max-num-seqs", "128"]}}})
        then.ready("ModelPool", "llama", within_s=180)
        then.eventually("the old workers are gone", lambda: not before & names(story.kube, ENGINES), 120)
        rolled_out = time.monotonic()
        then.eventually("the new ones answer", lambda: len(running.workers_since(rolled_out)) == 3)


def test_a_router_rollout(
    fleet: Callable[[int, int], None], when: When, then: Then, story: Story, tells: Tells
) -> None:
    fleet(2, 2)
    before = names(story.kube, ROUTERS)
    with load(story, then, 2, tells):
        annotation = {"spec": {"podTemplate": {"metadata": {"annotations": {"e2e/rollout": "2"}}}}}
        when.patched("FleetRouter", "router", annotation)
        then.eventually("the old routers are gone", lambda: not before & names(story.kube, ROUTERS), 180)
        then.ready("FleetRouter", "router", within_s=60)


def test_a_worker_that_is_deleted(
    fleet: Callable[[int, int], None], when: When, then: Then, story: Story, tells: Tells
) -> None:
    fleet(2, 1)
    victim, *_ = names(story.kube, ENGINES)
    with load(story, then, 2, tells) as running:
        deleted = time.monotonic()
        when.deleted("Pod", victim)
        then.gone("Pod", victim, within_s=60).ready("ModelPool", "llama", within_s=60)
        outlived = [stream for stream in running.whole if stream.worker == victim and stream.ended > deleted]
        assert outlived, "no stream was running on the worker: the test proved nothing"
        back = time.monotonic()
        then.eventually("its successor answers", lambda: len(running.workers_since(back)) == 2)
