"""Pools that grow with the load, go to zero and come back: with real controllers, from the chart to the streamed token."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.cluster import Cluster
from harness.kube import Object
from harness.sentences import Given, Story, Then, When
from harness.streams import streams
from kubernetes import client, config, watch
from support import curves
from support.installation import OPERATOR, Installation, condition
from support.load import arrivals, offered
from support.manifests import MODEL, engine, policy, pool, router
from support.prometheus import Gate, gate, prometheus
from support.scraping import entries

QUICK = "--autoscaling-seconds=1"
TOKEN = "prometheus-reader"
"""The Secret with the operator's token for Prometheus."""
WORKERS = "app.kubernetes.io/component=engine"
DEPLOYMENT = "llama-workers"
SHRINKS_AT_ONCE = {"scaleDown": {"stabilizationWindowSeconds": 0}}
OVERHEAD_S = 1.0
"""From zero to the first token, the worker's own start-up not counted."""
ARRIVALS = 200
SCALE_DOWNS = 20
DRAINING = "kvfleet.io/draining"


@pytest.fixture(scope="module")
def scaling(installation: Installation) -> Iterator[Installation]:
    """The release with an autoscaler that looks every second."""
    installation.install(f"--set=operator.extraArgs={{{QUICK}}}")
    yield installation
    installation.install()


def scaled(concurrency: int = 2, **autoscaling: Any) -> Object:
    signals = [{"concurrency": {"targetPerReplica": concurrency}}]
    return pool(autoscaling={"behavior": SHRINKS_AT_ONCE, "signals": signals, **autoscaling})


def replicas(count: int) -> Callable[[Object], bool]:
    return lambda found: bool(found["spec"]["replicas"] == count)


class PodClock(threading.Thread):
    """When the API server first told of each worker, and when that it is ready."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        super().__init__()
        self.made: dict[str, float] = {}
        self.ready: dict[str, float] = {}
        self._namespace = namespace
        self._api = config.new_client_from_config(str(cluster.kubeconfig))  # type: ignore[no-untyped-call]
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        pods = client.CoreV1Api(self._api).list_namespaced_pod
        while not self._over.is_set():
            events = watch.Watch()  # type: ignore[no-untyped-call]
            for event in events.stream(pods, self._namespace, label_selector=WORKERS, timeout_seconds=5):  # type: ignore[no-untyped-call]
                now, found = time.monotonic(), event["object"]
                self.made.setdefault(found.metadata.name, now)
                if any(entry.type == "Ready" and entry.status == "True" for entry in found.status.conditions or []):
                    self.ready.setdefault(found.metadata.name, now)

    def close(self) -> None:
        self._over.set()
        self.join()
        self._api.close()


@pytest.fixture
def clock(cluster: Cluster, story: Story) -> Iterator[PodClock]:
    clock = PodClock(cluster, story.kube.namespace)
    yield clock
    clock.close()


def body(tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is a KV cache?"}]
    return {"model": MODEL, "messages": messages, "max_tokens": tokens, "ignore_eos": True, **more}


def first_token_at(url: str) -> float:
    with httpx.stream("POST", url, json=body(20, stream=True), timeout=90) as answer:
        assert answer.status_code == 200, answer.read()
        next(line for line in answer.iter_lines() if line)
        return time.monotonic()


def url_of(story: Story) -> str:
    return story.url("router", path="/v1/chat/completions")


def models(story: Story) -> list[str]:
    return [entry["id"] for entry in httpx.get(story.url("router", path="/v1/models"), timeout=10).json()["data"]]


def test_from_zero_by_a_request_up_with_a_burst_and_back_to_zero(
    scaling: Installation,
    given: Given,
    then: Then,
    story: Story,
    clock: PodClock,
    tells: Callable[[str], None],
) -> None:
    given.applied(scaled(minReplicas=0, maxReplicas=3, scaleToZero={"idleSeconds": 3}), policy(), router())
    then.ready("FleetRouter", "router", within_s=90).is_so("Deployment", DEPLOYMENT, "has no worker", replicas(0))
    assert models(story) == [MODEL]

    asked_at = time.monotonic()
    token_at = first_token_at(url_of(story))
    made_at, ready_at = min(clock.made.values()), min(clock.ready.values())
    overhead_s = (made_at - asked_at) + (token_at - ready_at)
    tells(
        f"zero → first token {token_at - asked_at:.2f} s: worker made after {made_at - asked_at:.3f} s, started in "
        f"{ready_at - made_at:.2f} s, first token {token_at - ready_at:.3f} s after it was ready"
    )

    with streams(url_of(story), MODEL, (300,) * 6) as load:
        then.is_so("Deployment", DEPLOYMENT, "has 3 workers", replicas(3), within_s=60)
        then.eventually("streams end", lambda: load.whole, within_s=60)
    assert load.failures == []
    then.is_so("Deployment", DEPLOYMENT, "has no worker", replicas(0), within_s=90)
    assert models(story) == [MODEL]
    notes = [event["note"] for event in story.kube.list("events.k8s.io/v1/Event") if event["reason"] == "ScaledDown"]
    assert any("no request for" in note for note in notes), notes
    status = story.kube.get("ModelPool", "llama")["status"]
    assert status["autoscaling"]["lastScaleTime"]
    assert overhead_s < OVERHEAD_S


def test_200_requests_at_zero_all_complete_though_the_operator_is_away(
    scaling: Installation, given: Given, then: Then, story: Story, tells: Callable[[str], None]
) -> None:
    given.applied(scaled(minReplicas=0, maxReplicas=2, scaleToZero={"idleSeconds": 600}), policy(), router())
    then.ready("FleetRouter", "router", within_s=90).ready("RoutingPolicy", "all", within_s=60)
    then.is_so("Deployment", DEPLOYMENT, "has no worker", replicas(0))

    async def ask() -> list[int]:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=ARRIVALS)) as asking:
            answers = await asyncio.gather(*(asking.post(url_of(story), json=body(5)) for _ in range(ARRIVALS)))
        return [answer.status_code for answer in answers]

    operators = len(scaling.pods())
    scaling.kube.patch("Deployment", OPERATOR, {"spec": {"replicas": 0}})
    try:
        then.eventually("no operator is there", lambda: not scaling.pods(), within_s=60)
        began = time.monotonic()
        statuses = asyncio.run(ask())
    finally:
        scaling.kube.patch("Deployment", OPERATOR, {"spec": {"replicas": operators}})
    tells(f"{statuses.count(200)} of {ARRIVALS} complete, the last after {time.monotonic() - began:.1f} s")
    assert statuses == [200] * ARRIVALS
    scaling.kube.wait("Deployment", OPERATOR, "is back", lambda found: found["status"].get("readyReplicas"), 60)


def test_no_stream_is_aborted_by_scale_downs_under_load(
    scaling: Installation, given: Given, when: When, then: Then, story: Story, tells: Callable[[str], None]
) -> None:
    given.applied(scaled(minReplicas=1, maxReplicas=2, concurrency=1000), policy(), router())
    then.ready("FleetRouter", "router", within_s=90).ready("ModelPool", "llama", within_s=90)

    def bounds(least: int, most: int) -> dict[str, Any]:
        return {"spec": {"autoscaling": {"minReplicas": least, "maxReplicas": most}}}

    with streams(url_of(story), MODEL, (20, 20, 200, 400)) as load:
        for _ in range(SCALE_DOWNS):
            when.patched("ModelPool", "llama", bounds(2, 2))
            then.is_so("Deployment", DEPLOYMENT, "has 2 workers", replicas(2))
            then.ready("Deployment", DEPLOYMENT, within_s=60)
            both = time.monotonic()
            then.eventually("both answer", lambda at=both: len(load.workers_since(at)) == 2, within_s=60)  # type: ignore[misc]
            when.patched("ModelPool", "llama", bounds(1, 1))
            then.is_so("Deployment", DEPLOYMENT, "has 1 worker", replicas(1))
            then.counts("Pod", 1, WORKERS, within_s=90)
    tells(f"{len(load.whole)} streams over {SCALE_DOWNS} scale-downs, {len(load.failures)} lost")
    assert load.failures == []


def test_workers_about_to_go_get_nothing_new_and_are_those_that_go(
    scaling: Installation, given: Given, then: Then, story: Story, tells: Callable[[str], None]
) -> None:
    window = {"scaleDown": {"stabilizationWindowSeconds": 30}}
    given.applied(scaled(minReplicas=1, maxReplicas=3, behavior=window), policy(strategy="round_robin"), router())
    then.ready("FleetRouter", "router", within_s=90).ready("ModelPool", "llama", within_s=90)
    with streams(url_of(story), MODEL, (200,) * 6) as load:
        then.is_so("Deployment", DEPLOYMENT, "has 3 workers", replicas(3), within_s=60)
        then.ready("Deployment", DEPLOYMENT, within_s=60)
        then.eventually("all three answer", lambda: len({each.worker for each in load.whole}) == 3, within_s=60)

    going: set[str] = set()

    def named(found: Object) -> bool:
        told = json.loads((found["metadata"].get("annotations") or {}).get(DRAINING, "{}"))
        going.update(told.get("llama", {}).get("workers", ()))
        return len(going) == 2

    with streams(url_of(story), MODEL, (40,) * 2) as less:
        then.is_so("ConfigMap", "router", "names two workers that are about to go", named, within_s=60)
        named_at = time.monotonic()

        def spared() -> bool:
            latest = less.since(named_at)[-6:]
            return len(latest) == 6 and not going & {each.worker for each in latest}

        then.eventually("round robin sends them nothing", spared, within_s=15)
        spared_at = time.monotonic()
        then.is_so("Deployment", DEPLOYMENT, "has 1 worker", replicas(1), within_s=60)
        gone_at = time.monotonic()
        then.counts("Pod", 1, WORKERS, within_s=90)
    [left] = story.kube.list("Pod", WORKERS)
    assert left["metadata"]["name"] not in going
    assert less.workers_since(spared_at) == {left["metadata"]["name"]}
    assert load.failures == less.failures == []
    tells(f"the routers knew {gone_at - named_at:.1f} s before the workers were taken away")


@pytest.fixture(scope="module")
def gated(scaling: Installation, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """A real Prometheus behind a gate that asks for a token, and an operator that reads it there."""
    assert cluster.reaches_pods, "Prometheus runs beside the built-in cluster"
    with gate() as found, prometheus(found, tmp_path_factory.mktemp("prometheus")):
        found.bearer = "let-me-read"
        token = {
            "stringData": {"token": found.bearer},
            "metadata": {"name": TOKEN},
            "apiVersion": "v1",
            "kind": "Secret",
        }
        scaling.kube.apply(token)
        prometheus_values = f"operator.prometheus.url={found.url},operator.prometheus.tokenSecret.name={TOKEN}"
        scaling.install(f"--set=operator.extraArgs={{{QUICK}}}", f"--set={prometheus_values}")
        yield found
        scaling.install(f"--set=operator.extraArgs={{{QUICK}}}")


LIES = {
    "refusing": "answered 503",
    "empty": "no router reports it",
    "nan": "its value is nan",
    "stale": "s old",
    "slow": "did not answer within",
}


def test_a_prometheus_that_fails_or_lies_removes_nothing_and_the_condition_says_so(
    gated: Gate, scaling: Installation, given: Given, then: Then, story: Story
) -> None:
    gated.targets = lambda: entries(story, scaling)
    gated.turn("honest")
    wanted = scaled(minReplicas=0, maxReplicas=3, scaleToZero={"idleSeconds": 1})
    wanted["spec"]["engine"] = engine(1.0)
    given.applied(wanted, policy(), router())
    then.ready("FleetRouter", "router", within_s=90)

    def scaling_active(status: str, words: str) -> Callable[[Object], bool]:
        def holds(found: Object) -> bool:
            entry = condition(found, "ScalingActive")
            return bool(entry and entry["status"] == status and words in entry["message"])

        return holds

    def told(mode: str) -> None:
        then.is_so(
            "ModelPool", "llama", f"says that Prometheus is {mode}", scaling_active("False", LIES[mode]), within_s=60
        )

    with streams(url_of(story), MODEL, (100,) * 4) as load:
        then.is_so("Deployment", DEPLOYMENT, "has 2 workers", replicas(2), within_s=90)
        then.ready("Deployment", DEPLOYMENT, within_s=90)
        then.is_so("ModelPool", "llama", "is scaled by Prometheus", scaling_active("True", "Every signal"))
        gated.turn("refusing")
        told("refusing")
    held = story.kube.get("Deployment", DEPLOYMENT)["spec"]["replicas"]
    assert held > 0
    for mode in LIES:  # and there is no load any more
        gated.turn(mode)
        told(mode)
        rounds = gated.asked
        then.eventually("it is asked again and again", lambda at=rounds: gated.asked > at + 2, within_s=90)  # type: ignore[misc]
        assert replicas(held)(story.kube.get("Deployment", DEPLOYMENT)), f"{mode}: workers were added or removed"
    gated.turn("honest")
    then.is_so("Deployment", DEPLOYMENT, "has no worker once Prometheus is honest", replicas(0), within_s=90)
    gated.targets = list
    assert load.failures == []


@pytest.fixture
def observed(gated: Gate, scaling: Installation, story: Story) -> Iterator[curves.Prometheus]:
    """Prometheus, scraping this test's fleet and the operator."""
    gated.targets = lambda: entries(story, scaling)
    yield curves.Prometheus(gated.behind)
    gated.targets = list


def test_replicas_follow_the_load(
    observed: curves.Prometheus,
    given: Given,
    when: When,
    then: Then,
    story: Story,
    tells: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> None:
    """With --curves DIRECTORY: more shapes of load, the same again with a fixed fleet of the peak's size, a page of both."""
    into: Path | None = request.config.getoption("--curves")
    shapes = curves.LONG if into else curves.SHORT
    wanted = scaled(concurrency=3, minReplicas=0, maxReplicas=6, scaleToZero={"idleSeconds": 10})
    wanted["spec"]["autoscaling"]["behavior"] = {"scaleDown": {"stabilizationWindowSeconds": 10}}
    wanted["spec"]["engine"] = engine(0.25, "--max-num-seqs", "4")
    wanted["spec"]["engine"]["env"].append({"name": "POD_NAMESPACE", "value": story.kube.namespace})
    given.applied(wanted, policy(), router())
    then.ready("FleetRouter", "router", within_s=90).ready("RoutingPolicy", "all", within_s=60)

    def through(what: str) -> curves.Run:
        begun = time.time()
        with story.tells(f"when {what} is offered {', '.join(shape.name for shape in shapes)}"):
            moments = arrivals(curves.rate_of(shapes), sum(shape.seconds for shape in shapes))
            answers = offered(url_of(story), moments, tokens=40)
        wrong = [answer.wrong for answer in answers if answer.wrong]
        assert wrong == [], f"{len(wrong)} of {len(answers)}"
        return curves.Run(begun, shapes, observed)

    run = through("an autoscaled pool")
    windows = {window.name: window for window in run.windows()}
    total = run.total()
    told = (f"{name} {window.peak} workers, {window.attainment} in SLO" for name, window in windows.items())
    tells(f"{'; '.join(told)}; {total.replica_s / (total.peak * (run.ended - run.started)):.0%} of a fixed fleet")
    assert windows["burst"].peak >= 3
    for number, shape in enumerate(shapes[:-1]):
        if shape.name == "idle":
            ends = run.started + sum(shape.seconds for shape in shapes[: number + 1])
            assert observed.value(curves.DESIRED, ends) == 0
            assert observed.value(curves.WORKERS, ends) <= 1  # the last one may still be leaving
    assert windows["from zero"].requests > 0
    assert total.replica_s < 0.8 * total.peak * (run.ended - run.started)
    if into is not None:
        peak = max(int(value) for value in observed.series(curves.DESIRED, run.started, run.ended))
        when.patched(
            "ModelPool",
            "llama",
            {"spec": {"autoscaling": {"minReplicas": peak, "maxReplicas": peak, "scaleToZero": None}}},
        )
        then.is_so("Deployment", DEPLOYMENT, f"has {peak} workers", replicas(peak)).ready("Deployment", DEPLOYMENT, 120)
        fixed = through(f"a fixed fleet of {peak}")
        curves.write_page(run, fixed, into)
        curves.draw_dashboards(observed, run, into)
