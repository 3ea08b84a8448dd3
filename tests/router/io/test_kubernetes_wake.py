"""Requests for a pool at zero wait at the router, which wakes the pool itself and then serves them in their order."""

from __future__ import annotations

import asyncio
import time

from fake_api import CONFIG_MAPS, SLICES, FakeApi, answering, config_map, endpoint_slice
from followers import Cluster, in_pool
from prometheus_client.parser import text_string_to_metric_families
from scripted import Bench, chat_body, eventually, post

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.app import RouterApp
from kvfleet_router.io import kubernetes_wake

SCALE = "/apis/apps/v1/namespaces/inference/deployments/pool-workers/scale"
GROUP_SCALE = "/apis/leaderworkerset.x-k8s.io/v1/namespaces/inference/leaderworkersets/pool-lws/scale"


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


def at_zero(wake_target: str | None = "deployments/pool-workers") -> FleetConfig:
    config = in_pool()
    pool = config.pools[0].model_copy(update={"scales_to_zero": True, "wake_target": wake_target})
    return config.model_copy(update={"pools": [pool]})


async def router_of(cluster: Cluster, api: FakeApi, config: FleetConfig) -> RouterApp:
    api.put(CONFIG_MAPS, config_map(config))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    return app


async def wakes(bench: Bench, app: RouterApp) -> dict[str, float]:
    page = await bench.ask(app, get("/metrics"), admin=True)
    families = text_string_to_metric_families(page.body.decode())
    found = (family.samples for family in families if family.name == "kvfleet_router_wakes")
    return {s.labels["result"]: s.value for samples in found for s in samples if s.name.endswith("_total")}


async def test_a_request_wakes_its_pool_within_200_ms_and_is_served_once_a_worker_is_ready(
    cluster: Cluster, api: FakeApi, bench: Bench
) -> None:
    api.put_scale(SCALE, 0)
    app = await router_of(cluster, api, at_zero())
    models = await bench.ask(app, get("/v1/models"))
    assert [model["id"] for model in models.json()["data"]] == ["m"]
    assert api.replicas(SCALE) == 0

    worker = await bench.worker()
    began = time.monotonic()
    asking = [asyncio.create_task(bench.ask(app, post(chat_body()))) for _ in range(20)]
    await eventually(lambda: api.replicas(SCALE) == 1)
    patch = next(call for call in api.calls if call.method == "PATCH")
    assert patch.at - began < 0.2
    assert patch.query == {"fieldManager": "kvfleet-router"}
    await eventually(lambda: sum(app.dispatcher.queue_depths().values()) == 20)
    models = await bench.ask(app, get("/v1/models"))
    assert [model["id"] for model in models.json()["data"]] == ["m"]

    api.put(SLICES, endpoint_slice("w-0", worker.port, ready=False))
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    assert {answer.status for answer in await asyncio.gather(*asking)} == {200}
    assert (await wakes(bench, app))["woken"] == 1


async def test_a_worker_over_several_nodes_is_woken_as_well(cluster: Cluster, api: FakeApi, bench: Bench) -> None:
    api.put_scale(GROUP_SCALE, 0)
    app = await router_of(cluster, api, at_zero("leaderworkersets/pool-lws"))
    asking = asyncio.create_task(bench.ask(app, post(chat_body())))
    await eventually(lambda: api.replicas(GROUP_SCALE) == 1)
    asking.cancel()


async def test_what_is_awake_already_is_left_alone(cluster: Cluster, api: FakeApi, bench: Bench) -> None:
    """Its workers are starting; how many there are is the autoscaler's business."""
    api.put_scale(SCALE, 3)
    app = await router_of(cluster, api, at_zero())
    asking = asyncio.create_task(bench.ask(app, post(chat_body())))
    async with asyncio.timeout(10):
        while not await wakes(bench, app):
            pass
    assert await wakes(bench, app) == {"awake": 1}
    assert api.replicas(SCALE) == 3
    asking.cancel()


async def test_failures_are_tried_again_until_it_works(cluster: Cluster, api: FakeApi, bench: Bench) -> None:
    app = await router_of(cluster, api, at_zero())  # the workload does not exist yet
    asking = asyncio.create_task(bench.ask(app, post(chat_body())))
    await eventually(lambda: len([call for call in api.calls if call.path == SCALE]) > 1)
    api.once(SCALE, answering(503), watch=False, times=2)
    api.put_scale(SCALE, 0)
    await eventually(lambda: api.replicas(SCALE) == 1)
    async with asyncio.timeout(10):
        while "woken" not in (counted := await wakes(bench, app)):
            pass
    assert counted["woken"] == 1
    assert counted["failed"] >= 3
    asking.cancel()


async def test_a_configuration_without_the_workloads_name_is_told_and_harms_nobody(
    cluster: Cluster, api: FakeApi, bench: Bench
) -> None:
    app = await router_of(cluster, api, at_zero(None))
    asking = asyncio.create_task(bench.ask(app, post(chat_body())))
    async with asyncio.timeout(10):
        while (await wakes(bench, app)).get("failed", 0) < 2:
            pass
    assert not [call for call in api.calls if call.method == "PATCH"]
    asking.cancel()


async def test_a_pool_put_to_sleep_again_while_requests_wait_is_woken_again(
    cluster: Cluster, api: FakeApi, bench: Bench
) -> None:
    source = cluster.source()
    source._waker = kubernetes_wake.Waker(source._access, "inference", again_s=0.05)
    api.put_scale(SCALE, 0)
    api.put(CONFIG_MAPS, config_map(at_zero()))
    app = await cluster.router(source)
    await eventually(lambda: not app.unready)
    asking = asyncio.create_task(bench.ask(app, post(chat_body())))
    await eventually(lambda: api.replicas(SCALE) == 1)
    api.put_scale(SCALE, 0)
    await eventually(lambda: api.replicas(SCALE) == 1)
    asking.cancel()
