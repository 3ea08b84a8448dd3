"""The router against a real API server, with real controllers, kube-proxy and service accounts: workers come and go, the
configuration changes, the API server vanishes, and no stream is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.cluster import Cluster
from harness.kube import Object
from harness.sentences import Given, Story, Then, When
from harness.streams import Streams, streams
from kubernetes import client, config, watch

from kvfleet_api.manifests import load
from kvfleet_operator.render import render

MODEL = "llama-8b"
WORKERS = "app.kubernetes.io/component=engine"
DEPLOYMENT = "llama-workers"
LOAD = (20, 20, 20, 40, 400, 400)
"""Output tokens of each sender's requests: some come and go, some last for seconds."""
AWAY_S = 30
AT_ONCE_S = 1.0
"""Within which a change must reach dispatch."""


def manifests(namespace: str, **policy: Any) -> list[dict[str, Any]]:
    """One pool of workers at the speed of the real ones, and a router in front of it."""
    api = "kvfleet.io/v1alpha1"
    pool = {
        "model": {"name": MODEL, "uri": "meta-llama/Llama-3.1-8B-Instruct", "maxContextTokens": 8192},
        "accelerator": {"profileRef": "nvidia-h100-80gb"},
        "engine": {"env": [{"name": "E2E_SPEED", "value": "1"}]},
        "replicas": 2,
    }
    routing = {"match": {"models": [MODEL]}, "pools": [{"name": "llama"}], "strategy": "least_request", **policy}
    kinds = [
        ("ModelPool", "llama", pool),
        ("RoutingPolicy", "llama", routing),
        ("FleetRouter", "router", {"replicas": 1}),
    ]
    return [
        {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}
        for kind, name, spec in kinds
    ]


def rendered(folder: Path, namespace: str, **policy: Any) -> list[Object]:
    """The objects the operator would apply."""
    file = folder / "fleet.json"
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests(namespace, **policy)}))
    return render(load([file]))


class EndpointClock(threading.Thread):
    """When the API server first said of each pod that it is ready, and that it is terminating."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        super().__init__()
        self.ready: dict[str, float] = {}
        self.terminating: dict[str, float] = {}
        self._namespace = namespace
        self._api = config.new_client_from_config(str(cluster.kubeconfig))  # type: ignore[no-untyped-call]
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        slices = client.DiscoveryV1Api(self._api).list_namespaced_endpoint_slice
        selector = f"kubernetes.io/service-name={DEPLOYMENT}"
        while not self._over.is_set():
            stream = watch.Watch().stream(slices, self._namespace, label_selector=selector, timeout_seconds=5)
            for event in stream:
                self._note(event["object"], time.monotonic())

    def _note(self, part: Any, now: float) -> None:
        for endpoint in part.endpoints or ():
            name, conditions = endpoint.target_ref.name, endpoint.conditions
            if conditions.terminating:
                self.terminating.setdefault(name, now)
            elif conditions.ready:
                self.ready.setdefault(name, now)

    def close(self) -> None:
        self._over.set()
        self.join()
        self._api.close()


@pytest.fixture
def clock(cluster: Cluster, story: Story) -> Iterator[EndpointClock]:
    clock = EndpointClock(cluster, story.kube.namespace)
    yield clock
    clock.close()


@pytest.fixture
def url(given: Given, then: Then, story: Story, tmp_path: Path) -> str:
    """Of chat completions, once router and two workers are ready."""
    given.applied(*rendered(tmp_path, story.kube.namespace))
    then.ready("Deployment", DEPLOYMENT, within_s=90).ready("Deployment", "router", within_s=90)
    return story.url("router", path="/v1/chat/completions")


def admin(story: Story, path: str) -> httpx.Response:
    """The router's admin port."""
    (pod,) = story.kube.list("Pod", "app.kubernetes.io/component=router")
    name, ip = pod["metadata"]["name"], pod["status"]["podIP"]
    proxy = f"api/v1/namespaces/{story.kube.namespace}/pods/{name}:9090/proxy"
    base = f"http://{ip}:9090" if story.cluster.reaches_pods else f"{story.cluster.api_proxy()}/{proxy}"
    return httpx.get(base + path, timeout=5)


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line.startswith("kvfleet_router_")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def lag_of_new(clock: EndpointClock, load: Streams) -> float:
    """The longest time from a worker's readiness at the API server to the first request it got."""
    first: dict[str, float] = {}
    for stream in load.whole:
        first[stream.worker] = min(stream.started, first.get(stream.worker, stream.started))
    begun = min(first.values())
    return max(first[name] - at for name, at in clock.ready.items() if at > begun)


def lag_of_leaving(clock: EndpointClock, load: Streams) -> float:
    """The longest time after a worker's farewell at the API server that a request was still sent to it."""
    return max(
        (
            stream.started - clock.terminating[stream.worker]
            for stream in load.whole
            if stream.worker in clock.terminating
        ),
        default=0.0,
    )


def test_workers_come_and_go_under_streams_and_none_is_lost(
    when: When, then: Then, story: Story, url: str, clock: EndpointClock
) -> None:
    with streams(url, MODEL, LOAD) as load:
        then.eventually("both workers answer", lambda: len(load.workers_since(0)) == 2)
        when.scaled("Deployment", DEPLOYMENT, to=4)
        then.ready("Deployment", DEPLOYMENT, within_s=90)
        at_four = time.monotonic()
        then.eventually("four workers answer", lambda: len(load.workers_since(at_four)) == 4)
        when.scaled("Deployment", DEPLOYMENT, to=1)
        then.eventually("three are leaving", lambda: len(clock.terminating) == 3)
        then.counts("Pod", 1, WORKERS, within_s=90)
        alone = time.monotonic()
        then.eventually("the last one answers alone", lambda: len(load.since(alone)) > 20)
    assert load.failures == []
    assert load.workers_since(alone) == set(clock.ready) - set(clock.terminating)
    joined, left = lag_of_new(clock, load), lag_of_leaving(clock, load)
    outlived = sum(
        stream.ended > clock.terminating[stream.worker] for stream in load.whole if stream.worker in clock.terminating
    )
    print(
        f"{len(load.whole)} streams, 0 lost; first request to a new worker {joined * 1000:.0f} ms after it was ready, last to a "
        f"leaving one {left * 1000:.0f} ms after it was told to go; {outlived} streams outlived their worker's farewell"
    )
    assert joined < AT_ONCE_S
    assert left < AT_ONCE_S
    assert outlived, "no stream was running on a worker that left: the test proved nothing"


def test_a_changed_configuration_is_loaded_at_once_and_told(
    when: When, then: Then, story: Story, url: str, tmp_path: Path
) -> None:
    def revision() -> str:
        return str(admin(story, "/readyz").json()["revision"])

    def written(objects: list[Object]) -> Mapping[str, Any]:
        return next(item for item in objects if item["kind"] == "ConfigMap")

    before = written(rendered(tmp_path, story.kube.namespace))
    assert revision() == before["metadata"]["annotations"]["kvfleet.io/config-revision"]
    changed = written(rendered(tmp_path, story.kube.namespace, strategy="kvfleet", slo={"ttftMilliseconds": 700}))
    wanted = changed["metadata"]["annotations"]["kvfleet.io/config-revision"]
    with streams(url, MODEL, (20, 20)) as load:
        then.eventually("streams run", lambda: load.whole)
        began = time.monotonic()
        when.applied(changed)
        while revision() != wanted:
            assert time.monotonic() - began < AT_ONCE_S, "the change did not reach dispatch at once"
        print(f"a changed configuration was in use {(time.monotonic() - began) * 1000:.0f} ms after it was sent")
        done = len(load.whole)
        then.eventually("streams go on", lambda: len(load.whole) > done + 5)
        when.patched("ConfigMap", "router", {"data": {"fleet.json": "{}"}})
        errors = "kvfleet_router_config_errors_total"
        then.eventually("it is refused", lambda: samples(admin(story, "/metrics").text)[errors] == 1)
        assert revision() == wanted
    assert load.failures == []


def test_that_all_workers_are_lost_at_once_is_not_believed_at_once(
    when: When, then: Then, story: Story, url: str
) -> None:
    """The node controller says so of nodes that could not report, as after an outage, until their kubelets correct it."""
    doubted = 'kvfleet_router_kubernetes_doubted_workers{pool="llama"}'

    def used_though_lost() -> float:
        return samples(admin(story, "/metrics").text)[doubted]

    with streams(url, MODEL, LOAD) as load:
        then.eventually("both workers answer", lambda: len(load.workers_since(0)) == 2)
        lost = time.monotonic()
        for pod in story.kube.list("Pod", WORKERS):
            conditions = [
                entry | {"status": "False"} if entry["type"] == "Ready" else entry
                for entry in pod["status"]["conditions"]
            ]
            name, patch = pod["metadata"]["name"], {"status": {"conditions": conditions}}
            story.kube.patch("Pod", name, patch, subresource="status")
        then.eventually("both are used though they are called lost", lambda: used_though_lost() == 2)
        then.eventually("both go on to answer", lambda: len(load.workers_since(lost + 1)) == 2)
        then.eventually("their kubelet has corrected it", lambda: used_though_lost() == 0)
        then.ready("Deployment", DEPLOYMENT)
    assert load.failures == []


def test_streams_go_on_while_the_api_server_is_away(
    when: When, then: Then, story: Story, url: str, cluster: Cluster
) -> None:
    if not cluster.reaches_pods:
        pytest.skip("without the API server neither the router nor its admin port can be reached from here")
    (pod,) = story.kube.list("Pod", "app.kubernetes.io/component=router")
    metrics_url = f"http://{pod['status']['podIP']}:9090/metrics"
    connected = [
        f'kvfleet_router_kubernetes_connected{{resource="{name}"}}' for name in ("configmaps", "endpointslices")
    ]

    def shown() -> list[float]:
        found = samples(httpx.get(metrics_url, timeout=5).text)
        return [found[name] for name in connected]

    assert shown() == [1, 1]
    with streams(url, MODEL, LOAD) as load:
        then.eventually("both workers answer", lambda: len(load.workers_since(0)) == 2)
        cluster.stop_api_server()
        try:
            gone = time.monotonic()
            then.eventually("the router says so", lambda: shown() == [0, 0])
            then.eventually(f"{AWAY_S} s have passed", lambda: time.monotonic() - gone > AWAY_S, AWAY_S + 5)
            assert len(load.workers_since(gone + 1)) == 2
            served = len(load.since(gone))
            assert httpx.get(metrics_url.replace("/metrics", "/readyz"), timeout=5).status_code == 200
        finally:
            cluster.start_api_server()
        back = time.monotonic()
        # kube-proxy has to learn first where the API server is: pods reach it through its Service.
        then.eventually("the router hears it again", lambda: shown() == [1, 1], within_s=120)
        print(
            f"{served} streams were begun and ended without the API server; heard {time.monotonic() - back:.1f} s after"
        )
        when.scaled("Deployment", DEPLOYMENT, to=3)
        then.ready("Deployment", DEPLOYMENT, within_s=90)
        at_three = time.monotonic()
        then.eventually("three workers answer", lambda: len(load.workers_since(at_three)) == 3)
    assert load.failures == []
