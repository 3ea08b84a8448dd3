"""A fleet that serves, and streams through it while a test changes something."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harness.kube import Kube
from harness.sentences import Given, Story, Then
from harness.streams import Streams, streams
from support.manifests import MODEL, engine, policy, pool, router

LOAD = (20, 20, 20, 60, 400, 400, 1500)
"""Output tokens of each sender's requests at an engine's real speed: some take moments, some outlast the 5 s that a worker
goes on for after it was told to leave."""
ENGINES = "app.kubernetes.io/component=engine"
ROUTERS = "app.kubernetes.io/component=router"
Tells = Callable[[str], None]


def serving(given: Given, then: Then, workers: int, routers: int = 1) -> None:
    """A pool, a policy and a router, all ready; the engines run at their real speed.

    Requests are spread evenly, so that every worker has some: where that is costly, kvfleet's own strategy would not.
    """
    spread = policy(strategy="least_request")
    given.applied(pool(replicas=workers, engine=engine(1)), spread, router(replicas=routers))
    then.ready("ModelPool", "llama", within_s=120).ready("FleetRouter", "router", within_s=120)
    then.ready("RoutingPolicy", "all", within_s=60)


@contextmanager
def load(story: Story, then: Then, workers: int) -> Iterator[Streams]:
    """Streams through the router's Service while the block lasts."""
    with streams(story.url("router", path="/v1/chat/completions"), MODEL, LOAD) as running:
        then.eventually("every worker answers", lambda: len(running.workers_since(0)) == workers)
        yield running
        over = time.monotonic()
        then.eventually("streams go on", lambda: len(running.since(over)) > 10)


@contextmanager
def lossless_load(story: Story, then: Then, workers: int, tells: Tells) -> Iterator[Streams]:
    """Streams every one of which must come to its end."""
    with load(story, then, workers) as running:
        yield running
    tells(f"{len(running.whole)} streams, {len(running.failures)} failed or cut short")
    assert running.failures == []


def names(kube: Kube, selector: str) -> set[str]:
    return {pod["metadata"]["name"] for pod in kube.list("Pod", selector)}
