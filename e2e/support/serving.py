"""A fleet that serves, and streams through it while a test changes something."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


def serving(given: Given, then: Then, workers: int, routers: int = 1, **more: Any) -> None:
    """A pool, a policy and a router, all ready; the engines run at their real speed. `more` is for the pool's spec.

    Requests are spread evenly, so that every worker has some: where that is costly, kvfleet's own strategy would not.
    """
    spread = policy(strategy="least_request")
    given.applied(pool(replicas=workers, engine=engine(1), **more), spread, router(replicas=routers))
    then.ready("ModelPool", "llama", within_s=120).ready("FleetRouter", "router", within_s=120)
    then.ready("RoutingPolicy", "all", within_s=60)


def all_answer(then: Then, running: Streams, workers: int) -> None:
    """Each of them, to requests sent from now on."""
    now = time.monotonic()
    then.eventually(f"{workers} workers answer", lambda: len(running.workers_since(now)) == workers)


def streams_go_on(then: Then, running: Streams, count: int = 10) -> None:
    now = time.monotonic()
    then.eventually("streams go on", lambda: len(running.since(now)) > count)


@contextmanager
def lossless_load(story: Story, then: Then, workers: int, tells: Tells) -> Iterator[Streams]:
    """Streams through the router's Service while the block lasts, every one of which must come to its end."""
    with streams(story.url("router", path="/v1/chat/completions"), MODEL, LOAD) as running:
        all_answer(then, running, workers)
        yield running
        streams_go_on(then, running)
    tells(f"{len(running.whole)} streams, {len(running.failures)} failed or cut short")
    assert running.failures == []


def names(kube: Kube, selector: str) -> set[str]:
    return {pod["metadata"]["name"] for pod in kube.list("Pod", selector)}
