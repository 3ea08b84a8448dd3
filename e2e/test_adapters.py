"""LoRA adapters come and go on running workers: no pod restarts, no request for an adapter meets a worker without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from harness.kube import Kube, Object
from harness.sentences import Given, Story, Then, When
from support.installation import OPERATOR, Installation, condition
from support.manifests import MODEL, policy, pool, router

SQL, LAW = {"name": "sql", "uri": "my-org/llama-8b-sql"}, {"name": "law", "uri": "my-org/llama-8b-law"}
NOWHERE = {"name": "nowhere", "uri": "/no/such/folder"}
WORKERS = "app.kubernetes.io/component=engine,kvfleet.io/pool=llama"
SECONDS_S = 10
"""Within which a changed list must have reached workers and routers."""
LEFT_S = 30
"""An idle worker that is told to go is gone long before its grace period of 155 s is over."""

Ask = Callable[[str], httpx.Response]


@pytest.fixture
def ask(story: Story) -> Ask:
    """A chat completion by the model or adapter of a name, through the router's Service."""

    def chat(model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
        return httpx.post(story.url("router", path="/v1/chat/completions"), json=body, timeout=30)

    return chat


def fleet(given: Given, then: Then, *adapters: Object, replicas: int = 2) -> None:
    given.applied(pool(replicas=replicas, adapters=list(adapters)), policy(), router())
    for kind, name in (("ModelPool", "llama"), ("FleetRouter", "router"), ("RoutingPolicy", "all")):
        then.ready(kind, name, within_s=90)


def unknown_to_router(answer: httpx.Response) -> bool:
    """404, and by no worker's word."""
    return answer.status_code == 404 and "x-kvfleet-worker" not in answer.headers


def starts(kube: Kube) -> dict[str, int]:
    """Worker → how often its engine was started again."""
    pods = kube.list("Pod", WORKERS)
    return {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["restartCount"] for pod in pods}


def adapters(status: str, reason: str, *words: str) -> Callable[[Object], bool]:
    """Whether AdaptersLoaded says so of the latest generation."""

    def holds(found: Object) -> bool:
        entry = condition(found, "AdaptersLoaded")
        current = entry.get("observedGeneration") == found["metadata"]["generation"]
        told = (entry.get("status"), entry.get("reason")) == (status, reason)
        return current and told and all(word in entry["message"] for word in words)

    return holds


def test_a_running_pool_gets_an_adapter_and_loses_it_without_a_restart(
    kvfleet: Installation, given: Given, when: When, then: Then, kube: Kube, ask: Ask, tells: Callable[[str], None]
) -> None:
    fleet(given, then, SQL)
    assert ask("sql").json()["model"] == "sql"
    assert unknown_to_router(ask("law"))
    before = starts(kube)
    began = time.monotonic()
    when.patched("ModelPool", "llama", {"spec": {"adapters": [SQL, LAW]}})
    then.eventually("law is served", lambda: ask("law").is_success, SECONDS_S)
    tells(f"a new adapter was served {time.monotonic() - began:.1f} s after the ModelPool named it")
    then.is_so("ModelPool", "llama", "has both everywhere", lambda found: found["status"]["adapters"] == ["sql", "law"])
    then.ready("ModelPool", "llama")
    answers = [ask(name) for name in ("law", "sql", MODEL) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-kvfleet-worker"] for answer in answers} == before.keys()
    when.patched("ModelPool", "llama", {"spec": {"adapters": [LAW]}})
    then.eventually("the router does not know sql any more", lambda: unknown_to_router(ask("sql")), SECONDS_S)
    then.is_so("ModelPool", "llama", "has one left", lambda found: found["status"]["adapters"] == ["law"])
    when.patched("ModelPool", "llama", {"spec": {"adapters": []}})
    then.is_so("ModelPool", "llama", "has none left", adapters("True", "NoAdapters"))
    then.ready("ModelPool", "llama")
    assert starts(kube) == before == dict.fromkeys(before, 0)


def test_the_first_adapter_of_a_pool_comes_with_a_rollout(
    kvfleet: Installation, given: Given, when: When, then: Then, kube: Kube, ask: Ask
) -> None:
    fleet(given, then, replicas=1)
    before = starts(kube)
    when.patched("ModelPool", "llama", {"spec": {"adapters": [SQL]}})
    then.is_so("ModelPool", "llama", "waits for the rollout", adapters("Unknown", "RollingOut"))
    then.ready("ModelPool", "llama", within_s=90)
    assert ask("sql").is_success
    then.eventually("the worker without it is gone", lambda: not before.keys() & starts(kube).keys())


def test_a_worker_that_was_killed_comes_back_with_its_adapters_and_no_request_misses_one(
    kvfleet: Installation, given: Given, when: When, then: Then, kube: Kube, ask: Ask
) -> None:
    fleet(given, then, SQL, LAW)
    killed, other = starts(kube)
    answers: list[httpx.Response] = []

    def server() -> str:
        answers.append(ask("law"))
        return str(answers[-1].headers.get("x-kvfleet-worker", ""))

    def ready_again(worker: str) -> bool:
        (container,) = kube.get("Pod", worker)["status"]["containerStatuses"]
        return bool(server()) and (container["restartCount"], container["ready"]) == (1, True)

    when.signalled(killed, "engine", 9)
    then.eventually("its engine was started again", lambda: ready_again(killed))
    # An adapter's requests stay with the worker that runs it: only without that one has the other to prove itself.
    when.signalled(other, "engine", 9)
    then.eventually("it serves law again", lambda: server() == killed, within_s=60)
    assert {answer.status_code for answer in answers} == {200}
    then.ready("ModelPool", "llama")
    assert ask("sql").is_success


@pytest.fixture
def no_operator(kvfleet: Installation) -> Iterator[Callable[[], None]]:
    """Takes the operator away until the test ends."""
    replicas = kvfleet.kube.get("Deployment", OPERATOR)["spec"]["replicas"]

    def scale(to: int) -> None:
        kvfleet.kube.patch("Deployment", OPERATOR, {"spec": {"replicas": to}})
        kvfleet.kube.wait(
            "Deployment", OPERATOR, f"has {to} ready", lambda found: found["status"].get("readyReplicas", 0) == to, 60
        )

    yield lambda: scale(0)
    scale(replicas)


def test_a_worker_that_starts_without_an_operator_has_its_adapters(
    no_operator: Callable[[], None], given: Given, when: When, then: Then, kube: Kube, ask: Ask
) -> None:
    fleet(given, then, SQL, replicas=1)
    (old,) = starts(kube)
    no_operator()
    when.deleted("Pod", old)
    then.gone("Pod", old, within_s=LEFT_S)
    then.eventually("another serves the adapter", lambda: ask("sql").headers["x-kvfleet-worker"] != old, within_s=60)
    assert ask("sql").is_success


def test_what_does_not_load_is_told_and_hinders_nothing_else(
    kvfleet: Installation, given: Given, when: When, then: Then, kube: Kube, ask: Ask
) -> None:
    fleet(given, then, SQL, replicas=1)
    (worker,) = starts(kube)
    when.patched("ModelPool", "llama", {"spec": {"adapters": [SQL, NOWHERE]}})
    told = adapters("False", "LoadFailed", "nowhere: ", "No adapter found for /no/such/folder", worker)
    then.is_so("ModelPool", "llama", "says what did not load, where and why", told)
    found = kube.get("ModelPool", "llama")
    assert found["status"]["adapters"] == ["sql"]
    assert condition(found, "Ready")["reason"] == "LoadFailed"
    assert [ask(name).status_code for name in ("sql", MODEL, "nowhere")] == [200, 200, 404]
    when.scaled("ModelPool", "llama", to=2)
    then.ready("Deployment", "llama-workers", within_s=60)
    when.patched("ModelPool", "llama", {"spec": {"adapters": [SQL]}})
    then.ready("ModelPool", "llama")
    events = [event for event in kube.list("events.k8s.io/v1/Event") if event.get("action") == "AdaptersLoaded"]
    assert {event["type"] for event in events} == {"Normal", "Warning"}
    assert any("/no/such/folder" in event["note"] for event in events if event["type"] == "Warning")
