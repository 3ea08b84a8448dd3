"""Status writes, Events, and the API client's answers to everything an API server may say."""

import asyncio
from datetime import UTC, datetime

import pytest
from kubernetes.aio.client import Configuration

from kvfleet_operator.api import ApiError, KubeApi, NotLeader
from kvfleet_operator.resources import LEASE, POOL
from kvfleet_operator.statuses import StatusWriter, changes
from kvfleet_operator.world import World

NOW = datetime(2026, 1, 1, 12, 30, 0, 123456, tzinfo=UTC)


def condition(type_, status="True", message="m"):
    return {
        "type": type_, "status": status, "reason": "R", "message": message,
        "observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z",
    }  # fmt: skip


@pytest.fixture
def writer(api):
    return StatusWriter(api, World(), instance="operator-0")


async def test_a_status_is_written_once_and_then_left_alone(writer, cluster, make):
    live = cluster.put(make.pool())
    wanted = {"replicas": 2, "conditions": [condition("Ready")]}
    assert await writer.write(live, wanted, NOW)
    live = cluster.get("ModelPool", "llama")
    assert live["status"] == wanted
    assert not await writer.write(live, wanted, NOW)


async def test_fields_and_conditions_of_others_survive(writer, cluster, make):
    others = {"autoscaling": {"desiredReplicas": 4}, "replicas": 1}
    live = cluster.put({**make.pool(), "status": others})
    await writer.write(live, {"replicas": 2}, NOW)
    assert cluster.get("ModelPool", "llama")["status"] == {"autoscaling": {"desiredReplicas": 4}, "replicas": 2}


async def test_a_status_meant_for_an_older_object_is_refused(writer, cluster, make):
    live = cluster.put(make.pool())
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(replicas=3))
    with pytest.raises(ApiError) as raised:
        await writer.write(live, {"replicas": 2}, NOW)
    assert raised.value.status == 409


async def test_the_status_of_something_deleted_meanwhile_is_no_failure(writer, cluster, make):
    live = cluster.put(make.pool())
    cluster.remove("ModelPool", "llama")
    assert not await writer.write(live, {"replicas": 2}, NOW)


def test_only_what_differs_is_a_change():
    assert changes({"a": 1, "b": 2}, {"a": 1, "b": 3}) == {"b": 3}
    assert changes({}, {"adapters": [], "replicas": 0}) == {"replicas": 0}
    assert changes({"adapters": ["x"]}, {"adapters": []}) == {"adapters": []}
    live = {"conditions": [{**condition("Ready"), "unknownField": 1}]}
    assert changes(live, {"conditions": [condition("Ready")]}) == {}


async def test_an_event_tells_a_transition(writer, cluster, make):
    live = cluster.put({**make.pool(), "status": {"conditions": [condition("Ready", "False")]}})
    await writer.write(live, {"conditions": [condition("Ready"), condition("Accepted")]}, NOW)
    (event,) = cluster.all("Event")
    assert event["regarding"]["name"] == "llama" and event["regarding"]["kind"] == "ModelPool"
    assert (event["type"], event["reason"], event["note"]) == ("Normal", "R", "Ready=True: m")
    assert event["eventTime"] == "2026-01-01T12:30:00.123456Z"
    assert event["reportingController"] == "kvfleet.io/kvfleet-operator"


async def test_bad_news_is_a_warning_with_a_note_of_bounded_length(writer, cluster, make):
    live = cluster.put(make.profile())
    await writer.write(live, {"conditions": [condition("Accepted", "False", "x" * 5000)]}, NOW)
    (event,) = cluster.all("Event")
    assert event["type"] == "Warning"
    assert len(event["note"]) == 1024
    assert event["metadata"]["namespace"] == "default"


async def test_a_lost_event_fails_nothing(writer, cluster, make):
    cluster["post /apis/events.k8s.io/v1/namespaces/default/events"] << 403
    live = cluster.put(make.pool())
    assert await writer.write(live, {"conditions": [condition("Accepted", "False")]}, NOW)


# The client


async def test_a_listing_is_read_page_by_page(api, cluster, make, monkeypatch):
    monkeypatch.setattr("kvfleet_operator.api.PAGE", 2)
    for number in range(5):
        cluster.put(make.pool(f"p{number}"))
    found = await api.list(POOL, None, None)
    assert [item["metadata"]["name"] for item in found] == ["p0", "p1", "p2", "p3", "p4"]
    assert {item["kind"] for item in found} == {"ModelPool"}
    assert len(cluster["get"]) == 3


async def test_a_listing_that_expired_half_way_starts_again(api, cluster, make, monkeypatch):
    monkeypatch.setattr("kvfleet_operator.api.PAGE", 1)
    cluster.put(make.pool("a"))
    cluster.put(make.pool("b"))
    cluster[kmock_params(cluster, "1")][:1] << 410
    found = await api.list(POOL, None, None)
    assert [item["metadata"]["name"] for item in found] == ["a", "b"]


def kmock_params(cluster, token):
    return cluster.params({"continue": token})


async def test_a_kind_the_cluster_lacks_is_none_and_an_absent_object_too(api, cluster):
    del cluster.resources["kvfleet.io/v1alpha1/modelpools"]
    assert await api.list(POOL, None, None) is None
    assert await api.get(POOL, "default", "x") is None


@pytest.mark.parametrize(
    ("status", "permanent"), [(400, True), (403, True), (422, True), (409, False), (429, False), (500, False)]
)
async def test_errors_carry_status_and_the_servers_words(api, cluster, status, permanent):
    (
        cluster["get /apis/kvfleet.io/v1alpha1/namespaces/default/modelpools/x"]
        << status
        << {"reason": "Why", "message": "because"}
    )
    with pytest.raises(ApiError, match="because") as raised:
        await api.get(POOL, "default", "x")
    assert (raised.value.status, raised.value.reason, raised.value.permanent) == (status, "Why", permanent)


async def test_nonsense_from_the_server_is_an_error_not_a_crash(api, cluster):
    cluster["get /apis/kvfleet.io/v1alpha1/namespaces/default/modelpools/x"] << 502 << b"<html>bad gateway"
    with pytest.raises(ApiError, match="bad gateway"):
        await api.get(POOL, "default", "x")


async def test_a_server_that_is_away_is_an_error_with_status_0(metrics):
    client = KubeApi(Configuration(host="http://127.0.0.1:1"), metrics)
    with pytest.raises(ApiError) as raised:
        await client.get(POOL, "default", "x")
    assert (raised.value.status, raised.value.permanent) == (0, False)
    await client.close()


@pytest.mark.parametrize("method", ["get", "create"])
async def test_a_server_that_takes_a_request_and_says_nothing_is_given_up(metrics, make, method):
    taken, left = asyncio.Event(), asyncio.Event()

    async def swallow(reader, writer):
        taken.set()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    host = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    silent = KubeApi(Configuration(host=host), metrics, read_timeout_s=0.05, write_timeout_s=0.05)
    try:
        with pytest.raises(ApiError) as raised:
            if method == "get":
                await silent.get(POOL, "default", "llama")
            else:
                await silent.create(POOL, make.pool())
    finally:
        await silent.close()
        server.close()
    assert taken.is_set()
    await left.wait()
    assert raised.value.status == 0 and not raised.value.permanent


async def test_no_write_leaves_a_process_that_may_not_lead(api, cluster, make):
    def fence():
        raise NotLeader("no")

    api.fence = fence
    await api.get(POOL, "default", "x")
    child = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "s", "namespace": "default", "uid": "u", "resourceVersion": "1"},
    }
    for write in (
        api.apply(child, force=True),
        api.create(LEASE, child),
        api.replace(LEASE, child),
        api.delete(child),
        api.patch_status(POOL, child, {}),
    ):
        with pytest.raises(NotLeader):
            await write
    assert cluster.writes == []


async def test_requests_are_counted_by_verb_resource_and_code(api, cluster, metrics, make):
    cluster.put(make.pool())
    await api.list(POOL, None, None)
    await api.get(POOL, "default", "nope")
    value = metrics.registry.get_sample_value
    name = "kvfleet_operator_api_requests_total"
    assert value(name, {"verb": "list", "resource": "modelpools", "code": "200"}) == 1
    assert value(name, {"verb": "get", "resource": "modelpools", "code": "404"}) == 1
