"""The autoscaler at work: an operator, an API server, a router's metrics; what becomes of `replicas` and the status."""

import asyncio
import json
from urllib.parse import parse_qsl

import pytest
from operator_running import poll, reason, running
from scaling_fleet import Router, listening, put_fleet, replicas, worker_pod

from kvfleet_api.fleetconfig import DRAINING_ANNOTATION
from kvfleet_operator.autoscale.readers.prometheus import PrometheusSettings
from kvfleet_operator.autoscale.victims import DELETION_COST
from kvfleet_operator.scaling.loop import ScalerOptions

AT_ONCE = {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}, "scaleUp": {}}}
FAST = ScalerOptions(period_s=0.05, wake_s=0.02)


@pytest.fixture
async def router(unused_tcp_port):
    async with listening(Router(), unused_tcp_port) as found:
        found.port = unused_tcp_port
        yield found


def status(cluster):
    return (cluster.get("ModelPool", "llama").get("status") or {}).get("autoscaling") or {}


async def test_load_adds_workers_and_its_end_removes_them(cluster, login, make, router):
    async with running(login, scaling=FAST) as operator:
        put_fleet(cluster, make, router.port, **AT_ONCE)
        await cluster.until(lambda: replicas(cluster) == 1)
        cluster.roll_out("llama-workers")
        router.in_flight = 38
        await cluster.until(lambda: replicas(cluster) == 4)
        await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "ScalingActive") == "ValidMetrics")
        await cluster.until(lambda: status(cluster).get("bindingSignal") == "concurrency: 38 against 10")
        assert status(cluster)["desiredReplicas"] == cluster.get("ModelPool", "llama")["status"]["desiredReplicas"] == 4
        router.in_flight = 0
        await cluster.until(lambda: replicas(cluster) == 1)
        await cluster.until(lambda: status(cluster)["desiredReplicas"] == 1)
        await cluster.until(lambda: len([e for e in cluster.all("Event") if e["reason"].startswith("Scaled")]) == 2)
    up, down = [event for event in cluster.all("Event") if event["reason"].startswith("Scaled")]
    assert up["note"].startswith("from 1 to 4 workers: concurrency is 38 against a target of 10")
    assert down["note"].startswith("from 4 to 1 workers:")
    registry, pool = operator.metrics.registry, {"pool_namespace": "default", "pool": "llama"}
    for direction in ("up", "down"):
        name = "kvfleet_operator_pool_scalings_total"
        assert registry.get_sample_value(name, {**pool, "direction": direction}) == 1
    assert registry.get_sample_value("kvfleet_operator_pool_desired_replicas", pool) == 1


async def test_the_reconciler_leaves_the_scalers_number_alone(cluster, login, make, router):
    async with running(login, scaling=FAST) as operator:
        put_fleet(cluster, make, router.port)
        router.in_flight = 25
        await cluster.until(lambda: replicas(cluster) == 3)
        cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(engine={"args": ["--new"]}))
        await cluster.until(lambda: "--new" in str(cluster.get("Deployment", "llama-workers")))
        await poll(lambda: operator.queue.idle)
        assert replicas(cluster) == 3


async def test_once_settled_it_writes_nothing(cluster, login, make, router):
    async with running(login, scaling=FAST) as operator:
        put_fleet(cluster, make, router.port)
        router.in_flight = 25
        await cluster.until(lambda: replicas(cluster) == 3)
        cluster.roll_out("llama-workers")
        await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "Ready") == "Ready")
        await poll(lambda: operator.queue.idle)
        rounds = router.asked
        await poll(lambda: router.asked > rounds + 4)
        cluster.writes.clear()
        rounds = router.asked
        await poll(lambda: router.asked > rounds + 8)
        assert [write for write in cluster.writes if write[1] != "leases"] == []


async def three_workers(cluster, router):
    """`c` has the least to lose of a pool that has grown to three."""
    router.in_flight = 30
    router.workers = {"a": (9, 0), "b": (1, 5000), "c": (1, 100)}
    for name in router.workers:
        cluster.put(worker_pod(name))
    await cluster.until(lambda: replicas(cluster) == 3)
    cluster.roll_out("llama-workers")


async def test_victims_are_marked_before_a_scale_down(cluster, login, make, router):
    async with running(login, scaling=FAST):
        put_fleet(cluster, make, router.port, **AT_ONCE)
        await three_workers(cluster, router)
        router.in_flight = 11
        await cluster.until(lambda: replicas(cluster) == 2)
        costs = {
            name: (cluster.get("Pod", name)["metadata"].get("annotations") or {}).get(DELETION_COST) for name in "abc"
        }
    assert costs == {"a": None, "b": None, "c": "-1001"}
    order = [write[1:] for write in cluster.writes]
    last = max(index for index, write in enumerate(order) if write == ("deployments", "llama-workers"))
    assert ("pods", "c") in order[:last]


async def test_routers_are_told_who_will_go_before_and_nobody_once_it_is_over(cluster, login, make, router):
    window = {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 4}, "scaleUp": {}}}

    def spared():
        told = (cluster.get("ConfigMap", "router")["metadata"].get("annotations") or {}).get(DRAINING_ANNOTATION)
        return None if told is None else json.loads(told)["llama"]["workers"]

    async with running(login, scaling=FAST):
        put_fleet(cluster, make, router.port, **window)
        await three_workers(cluster, router)
        await cluster.until(lambda: cluster.get("ConfigMap", "router"))
        assert spared() is None
        router.in_flight = 11
        before = len(cluster.writes)
        await cluster.until(lambda: spared() == ["c"])
        router.workers["a"] = (0, 0)  # by now it has less to lose
        await cluster.until(lambda: replicas(cluster) == 2)
        assert (cluster.get("Pod", "c")["metadata"].get("annotations") or {}).get(DELETION_COST) == "-1001"
        await cluster.until(lambda: spared() is None)
        data = cluster.get("ConfigMap", "router")["data"]
    assert set(data) == {"fleet.json"}
    order = [write[1:] for write in cluster.writes[before:]]
    assert order.index(("configmaps", "router")) < order.index(("deployments", "llama-workers"))


async def test_an_idle_pool_goes_to_zero_and_a_held_request_wakes_it_between_two_rounds(cluster, login, make, router):
    slow = ScalerOptions(period_s=3600, wake_s=0.02)
    async with running(login, scaling=FAST):
        put_fleet(cluster, make, router.port, minReplicas=0, scaleToZero={"idleSeconds": 1}, **AT_ONCE)
        await cluster.until(lambda: replicas(cluster) == 0)
        cluster.edit("Deployment", "llama-workers", lambda found: found["spec"].update(replicas=2))
        await cluster.until(lambda: replicas(cluster) == 0)
        await cluster.until(lambda: any("no request for" in event["note"] for event in cluster.all("Event")))
    async with running(login, scaling=slow):
        await poll(lambda: router.asked)
        router.queued = 1
        await cluster.until(lambda: replicas(cluster) == 1)


async def test_what_somebody_else_scaled_is_looked_at_at_once(cluster, login, make, router):
    async with running(login, scaling=ScalerOptions(period_s=3600, wake_s=0.02)):
        put_fleet(cluster, make, router.port)
        await cluster.until(lambda: replicas(cluster) == 1 and status(cluster).get("desiredReplicas") == 1)
        router.in_flight = 45
        cluster.edit("Deployment", "llama-workers", lambda found: found["spec"].update(replicas=2))
        await cluster.until(lambda: replicas(cluster) == 5)


@pytest.mark.parametrize("silence", ["router", "prometheus"])
async def test_without_data_nothing_is_removed_and_the_condition_says_so(
    cluster, login, make, router, silence, unused_tcp_port_factory
):
    url = f"http://127.0.0.1:{unused_tcp_port_factory()}"
    prometheus = PrometheusSettings(url) if silence == "prometheus" else None
    router.silent = silence == "router"
    async with running(login, scaling=FAST, prometheus=prometheus):
        put_fleet(cluster, make, router.port, minReplicas=0, scaleToZero={"idleSeconds": 1}, **AT_ONCE)
        await cluster.until(lambda: cluster.get("Deployment", "llama-workers"))
        cluster.edit("Deployment", "llama-workers", lambda found: found["spec"].update(replicas=5))
        await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "ScalingActive") == "NoMetrics")
        asked = router.asked
        await poll(lambda: router.asked > asked + 30)
        assert replicas(cluster) == 5
    message = cluster.conditions("ModelPool", "llama")["ScalingActive"]["message"]
    assert url in message if prometheus else "could be scraped" in message


async def test_a_router_that_wakes_the_pool_first_is_not_overruled(cluster, login, make, router):
    """Its write and ours meet: ours is refused, and judged anew."""
    async with running(login, scaling=FAST):
        put_fleet(cluster, make, router.port, minReplicas=0, scaleToZero={"idleSeconds": 1}, **AT_ONCE)
        await cluster.until(lambda: replicas(cluster) == 0)
        path = "/apis/apps/v1/namespaces/default/deployments/llama-workers"
        cluster[f"patch {path}"][:1] << 409
        router.queued = 35
        await cluster.until(lambda: replicas(cluster) == 4)


async def test_the_status_tells_the_forecast_and_how_long_workers_take_to_start(cluster, login, make, router):
    async with running(login, scaling=FAST) as operator:
        put_fleet(cluster, make, router.port, forecast={"mode": "Observe"})
        await cluster.until(lambda: status(cluster).get("forecast") == "learning: 0% of a day seen")
        assert "startupSeconds" not in status(cluster)
        cluster.put(worker_pod("a"))
        await cluster.until(lambda: status(cluster).get("startupSeconds") == 120)
        cluster.put(worker_pod("b", ready_at="2026-01-01T00:04:00Z"))
        await cluster.until(lambda: status(cluster).get("startupSeconds") == 228)
        registry, pool = operator.metrics.registry, {"pool_namespace": "default", "pool": "llama"}
        assert registry.get_sample_value("kvfleet_operator_pool_startup_seconds", pool) == 228
        assert registry.get_sample_value("kvfleet_operator_pool_forecast_demand", pool) == 0
        cluster.edit("ModelPool", "llama", lambda found: found["spec"]["autoscaling"].update(forecast={"mode": "Off"}))
        await cluster.until(lambda: "forecast" not in status(cluster))


async def test_without_autoscaling_nothing_of_it_stays_in_the_status(cluster, login, make, router):
    async with running(login, scaling=FAST):
        put_fleet(cluster, make, router.port)
        await cluster.until(lambda: status(cluster) and reason(cluster, "ModelPool", "llama", "ScalingActive"))

        def fixed(found):
            del found["spec"]["autoscaling"]
            found["spec"]["replicas"] = 2

        cluster.edit("ModelPool", "llama", fixed)
        await cluster.until(lambda: replicas(cluster) == 2)
        await cluster.until(lambda: not status(cluster) and not reason(cluster, "ModelPool", "llama", "ScalingActive"))
        assert cluster.get("ModelPool", "llama")["status"]["desiredReplicas"] == 2


async def test_a_new_pools_past_is_read_from_prometheus_once(cluster, login, make, router, unused_tcp_port_factory):
    port, asked = unused_tcp_port_factory(), []

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:"))
        asked.append((head.split(" ")[1], dict(parse_qsl((await reader.readexactly(length)).decode()))))
        body = b'{"status": "success", "data": {"resultType": "matrix", "result": []}}'
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    prometheus = PrometheusSettings(f"http://127.0.0.1:{port}")
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server, running(login, scaling=FAST, prometheus=prometheus):
        put_fleet(cluster, make, router.port)
        await poll(lambda: len([path for path, _ in asked if path.endswith("/query")]) > 20)
    (past,) = [form for path, form in asked if path.endswith("/query_range")]
    assert past["query"].startswith('(sum(kvfleet_router_packed_sequences{namespace="default",pool="llama"})')
    assert float(past["end"]) - float(past["start"]) == pytest.approx(14 * 86_400)
