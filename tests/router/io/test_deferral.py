"""A request kept for a cheaper time, over HTTP: it waits, goes, can be given up, and is not lost when the router leaves."""

import time

from scripted import Bench, ScriptedWorker, chat_body, eventually, fleet, post

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_api.routingpolicy import DeferSpec
from kvfleet_router.app import RouterApp

DEFER = b"X-Kvfleet-Defer-Seconds: 36000"


def deferring(*workers: ScriptedWorker, dear_now: bool) -> FleetConfig:
    config = fleet(workers)
    policy = config.policies[0].model_copy(update={"defer": DeferSpec.model_validate({"maxSeconds": 86_400})})
    hour = time.gmtime().tm_hour  # it may turn while the test runs
    hours = [{"hour": hour, "gramsPerKilowattHour": 400}, {"hour": (hour + 2) % 24, "gramsPerKilowattHour": 100}]
    telemetry = TelemetrySpec.model_validate({"carbonByHour": hours}) if dear_now else None
    return config.model_copy(update={"policies": [policy], "telemetry": telemetry})


def kept(router: RouterApp) -> int:
    return len(router.dispatcher.deferral)


async def test_one_that_may_wait_is_kept_until_the_router_leaves_and_is_answered_then(bench: Bench) -> None:
    worker = await bench.worker()
    router = await bench.router(config=deferring(worker, dear_now=True))
    client = await bench.client(router)
    await client.send(post(chat_body(), DEFER))
    await eventually(lambda: kept(router) == 1)
    assert (await bench.ask(router, post(chat_body()))).status == 200, "others go past it"
    page = (await bench.ask(router, b"GET /metrics HTTP/1.1\r\nHost: r\r\n\r\n", admin=True)).body.decode()
    assert 'kvfleet_router_deferred_requests{policy="kvfleet.default"} 1.0' in page
    assert len(worker.requests) == 1
    await router.stop(drain_s=10.0)
    assert (await client.answer()).status == 200
    assert len(worker.requests) == 2


async def test_in_quiet_times_it_goes_and_its_latency_does_not_count_the_wait(bench: Bench) -> None:
    router = await bench.router(config=deferring(await bench.worker(), dear_now=False))
    answer = await bench.ask(router, post(chat_body(), DEFER))
    assert answer.status == 200
    [record] = router.dispatcher.decisions.recent(1)
    assert record["deferred_until"] == "cheap"
    assert router.dispatcher.deferral.ended == {("kvfleet.default", "cheap"): 1}


async def test_a_client_that_leaves_is_kept_no_longer(bench: Bench) -> None:
    router = await bench.router(config=deferring(await bench.worker(), dear_now=True))
    client = await bench.client(router)
    await client.send(post(chat_body(), DEFER))
    await eventually(lambda: kept(router) == 1)
    client.writer.close()
    await eventually(lambda: kept(router) == 0)
    assert router.server.body_bytes == 0


async def test_a_bad_header_is_named(bench: Bench) -> None:
    router = await bench.router(config=deferring(await bench.worker(), dear_now=True))
    answer = await bench.ask(router, post(chat_body(), b"X-Kvfleet-Defer-Seconds: tomorrow"))
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "x-kvfleet-defer-seconds"
