"""What energy asks of requests: to wait for a cheaper hour, and to wait where a power budget is used up. None is lost by it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import pytest
from harness.kube import Object
from harness.sentences import Given, Story, Then, When
from support.installation import Installation, Metrics, condition, pod_page
from support.manifests import MODEL, engine, policy, pool, router
from support.serving import ROUTERS, names

ADMIN_PORT = 9090
PATIENCE_S = 12 * 3600
Answers = Future[httpx.Response]


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def ask(story: Story, clients: ThreadPoolExecutor, **headers: str) -> Answers:
    """A request that goes on in the background."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
    url = story.url("router", path="/v1/chat/completions")
    return clients.submit(httpx.post, url, json=body, headers=headers, timeout=120)


def total(story: Story, name: str, **labels: str) -> float:
    """Of the one router."""
    (pod,) = names(story.kube, ROUTERS)
    return Metrics(pod_page(story.cluster, story.kube, pod, ADMIN_PORT, "/metrics")).total(name, **labels)


def telemetry(cheap_in_hours: int) -> Object:
    """Carbon intensities of a day with one cheap hour."""
    hour = (datetime.now(UTC).hour + cheap_in_hours) % 24
    grams = {hour: 50, (hour + 1) % 24: 500}
    return {"carbonByHour": [{"hour": at, "gramsPerKilowattHour": value} for at, value in sorted(grams.items())]}


def test_requests_that_may_wait_go_when_power_is_cheap_or_the_router_leaves(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, clients: ThreadPoolExecutor
) -> None:
    later = telemetry(cheap_in_hours=6)
    given.applied(pool(engine=engine(20)), policy(energy={"defer": {"maxSeconds": PATIENCE_S}}))
    given.applied(router(telemetry=later))
    then.ready("ModelPool", "llama", within_s=90).ready("FleetRouter", "router", within_s=90)
    then.eventually("a request is answered", lambda: ask(story, clients).result().status_code == 200)

    patient = {"x-kvfleet-defer-seconds": str(PATIENCE_S)}
    waiting = ask(story, clients, **patient)
    then.eventually("it is kept", lambda: total(story, "kvfleet_router_deferred_requests", policy="all") == 1)
    assert ask(story, clients).result().status_code == 200, "others do not wait for it"
    assert not waiting.done()
    when.applied(router(telemetry=telemetry(cheap_in_hours=0)))
    then.eventually("the cheap hour is here", waiting.done, within_s=60)
    assert waiting.result().status_code == 200
    assert total(story, "kvfleet_router_deferred_ended_total", policy="all", why="cheap") == 1

    when.applied(router(telemetry=later))

    def kept() -> bool:
        """Until the router knows of the change, they are answered at once."""
        nonlocal waiting
        if waiting.done():
            waiting = ask(story, clients, **patient)
        return total(story, "kvfleet_router_deferred_requests", policy="all") == 1

    then.eventually("one is kept again", kept, within_s=60)
    (pod,) = names(story.kube, ROUTERS)
    when.deleted("Pod", pod)
    then.eventually("the router lets it go", waiting.done, within_s=60)
    assert waiting.result().status_code == 200


def test_requests_wait_for_a_power_budget_and_go_when_it_is_raised(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story, clients: ThreadPoolExecutor
) -> None:
    given.applied(pool(engine=engine(20)), policy(), router(maxWatts=1))
    then.ready("ModelPool", "llama", within_s=90)

    def too_small(found: Object) -> bool:
        accepted = condition(found, "Accepted")
        return accepted.get("status") == "True" and "1 W are less than" in accepted["message"]

    then.is_so("FleetRouter", "router", "says that its budget is too small", too_small, within_s=60)
    then.eventually("the router is there", lambda: total(story, "kvfleet_power_budget_watts") == 1, within_s=90)
    waiting = ask(story, clients)
    then.eventually("a request waits", lambda: total(story, "kvfleet_router_queue_depth", policy="all") == 1)
    assert not waiting.done()
    when.patched("FleetRouter", "router", {"spec": {"maxWatts": 100_000}})
    then.eventually("it goes", waiting.done, within_s=60)
    assert waiting.result().status_code == 200
    then.is_so("FleetRouter", "router", "has nothing to say", lambda found: not too_small(found))
