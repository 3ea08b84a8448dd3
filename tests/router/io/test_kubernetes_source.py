"""The router in a cluster: what its ConfigMap and its EndpointSlices say, and what requests see of it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from fake_api import CONFIG_MAPS, SLICES, Call, FakeApi, answering, config_map, endpoint_slice
from followers import Cluster, in_pool, in_two_pools, names, served
from scripted import STREAM_END, STREAM_HEAD, Bench, Seen, chat_body, event, eventually, fleet, post

from kvfleet_router.io import kubernetes_slices
from kvfleet_router.io.kubernetes import KubernetesSource
from kvfleet_router.io.kubernetes_access import AccessError

GET_READY = b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n"

# The start


async def test_no_request_is_taken_before_configuration_and_workers_are_known(
    cluster: Cluster, api: FakeApi, bench: Bench
) -> None:
    """And every step says what is missing."""
    worker = await bench.worker()
    api.once(CONFIG_MAPS, answering(403), watch=False, times=10_000)
    app = await cluster.router()

    async def readiness() -> tuple[int, str]:
        answer = await bench.ask(app, GET_READY, admin=True)
        return answer.status, answer.json()["status"]

    async def until(part: str) -> None:
        async with asyncio.timeout(10):
            while part not in (await readiness())[1]:
                pass
        assert (await readiness())[0] == 503

    await until("waiting for ConfigMap inference/router: 403: says 403")
    refused = await bench.ask(app, post(chat_body()))
    assert refused.status == 503
    assert refused.header("retry-after") == "1"
    assert refused.json()["error"]["code"] == "starting"
    assert "waiting for ConfigMap" in refused.json()["error"]["message"]
    assert (await bench.ask(app, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")).status == 503
    api.scripts.clear()
    await until("does not exist")
    api.once(SLICES, answering(500), watch=False, times=10_000)
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    api.put(CONFIG_MAPS, config_map(in_pool()))
    await until("waiting for the workers' EndpointSlices: 500: says 500")
    api.scripts.clear()
    await eventually(lambda: not app.unready)
    assert (await readiness())[0] == 200
    assert await served(bench, app) == "w-0"


async def test_the_mounted_copy_is_used_while_the_config_map_cannot_be_read(
    cluster: Cluster, api: FakeApi, tmp_path: Path
) -> None:
    mounted, newer = in_pool(drain_s=1.0), in_pool(drain_s=2.0)
    file = tmp_path / "fleet.json"
    file.write_text(mounted.to_json())
    api.once(CONFIG_MAPS, answering(403), watch=False, times=10_000)
    api.put(SLICES, endpoint_slice("w-0", 8000))
    recorder = await cluster.follow(cluster.source(fallback=file))
    await eventually(lambda: names(recorder) == ["w-0"])
    assert recorder.config == mounted
    api.put(CONFIG_MAPS, config_map(newer))
    api.scripts.clear()
    await eventually(lambda: recorder.config == newer)


async def test_a_mounted_copy_is_not_asked_where_the_config_map_can_be_read(
    cluster: Cluster, api: FakeApi, tmp_path: Path
) -> None:
    file = tmp_path / "fleet.json"
    file.write_text(in_pool(drain_s=1.0).to_json())
    api.put(CONFIG_MAPS, config_map(in_pool(drain_s=2.0)))
    recorder = await cluster.follow(cluster.source(fallback=file))
    await eventually(lambda: recorder.told)
    assert recorder.told[0] == ("config", in_pool(drain_s=2.0).revision)


async def test_a_mounted_copy_that_is_unreadable_is_no_harm(
    cluster: Cluster, api: FakeApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api.once(CONFIG_MAPS, answering(503), watch=False)
    api.put(CONFIG_MAPS, config_map(in_pool()))
    recorder = await cluster.follow(cluster.source(fallback=tmp_path / "none.json"))
    await eventually(lambda: recorder.config == in_pool())
    assert "none.json: cannot be read" in caplog.text


@pytest.mark.parametrize("reference", ["router", "a/b/c", "/router", "inference/", "Inference/router", "a/b,c"])
async def test_what_names_no_config_map_is_refused(cluster: Cluster, reference: str) -> None:
    with pytest.raises(AccessError, match="NAMESPACE/NAME"):
        KubernetesSource(cluster.api.mount(cluster.folder), reference)


# Changes


async def test_changes_reach_requests_at_once(cluster: Cluster, api: FakeApi, bench: Bench) -> None:
    first, second = await bench.worker(), await bench.worker()
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", first.port))
    app = await cluster.router()
    await eventually(lambda: api.watching(CONFIG_MAPS) and api.watching(SLICES))
    began = time.perf_counter()
    api.put(SLICES, endpoint_slice("w-0", first.port, ready=False))
    api.put(SLICES, endpoint_slice("w-1", second.port))
    await eventually(lambda: [worker.state for worker in app.dispatcher.workers()] == ["not_ready", "ready"])
    assert time.perf_counter() - began < 1.0
    assert {await served(bench, app) for _ in range(4)} == {"w-1"}
    began = time.perf_counter()
    api.put(CONFIG_MAPS, config_map(in_pool(drain_s=7.0)))
    await eventually(lambda: app.dispatcher.config.drain_s == 7.0)
    assert time.perf_counter() - began < 1.0
    samples = await bench.metrics(app)
    assert samples[f'kvfleet_router_config_info{{revision="{in_pool(drain_s=7.0).revision}"}}'] == 1


async def test_a_terminating_worker_gets_no_new_request_and_ends_its_answers(
    cluster: Cluster, api: FakeApi, bench: Bench
) -> None:
    may_end = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a"))
        await may_end.wait()
        writer.write(STREAM_END)

    leaving, staying = await bench.worker(behave), await bench.worker()
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", leaving.port))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    client = await bench.client(app)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    api.put(SLICES, endpoint_slice("w-1", staying.port))
    api.put(SLICES, endpoint_slice("w-0", leaving.port, ready=False, terminating=True))
    await eventually(lambda: [worker.state for worker in app.dispatcher.workers()] == ["terminating", "ready"])
    assert {await served(bench, app) for _ in range(8)} == {"w-1"}
    api.delete(SLICES, "pool-workers-w-0")
    await eventually(lambda: [worker.name for worker in app.dispatcher.workers()] == ["w-1"])
    assert await served(bench, app) == "w-1"
    may_end.set()
    assert await client.reader.readuntil(STREAM_END) == event("a") + STREAM_END
    assert len(leaving.requests) == 1


async def test_a_worker_that_is_not_ready_is_not_used_though_there_is_no_other(
    cluster: Cluster, api: FakeApi, bench: Bench
) -> None:
    worker = await bench.worker()
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", worker.port, ready=False))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    answer = await bench.ask(app, post(chat_body()))
    assert answer.status == 503
    assert not worker.requests
    api.put(SLICES, endpoint_slice("w-0", worker.port, ready=True))
    await eventually(lambda: app.dispatcher.workers()[0].state == "ready")
    assert await served(bench, app) == "w-0"


async def test_that_all_workers_are_lost_at_once_is_doubted_for_a_while(
    cluster: Cluster, api: FakeApi, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an outage of the API server, when no node could report."""
    monkeypatch.setattr(kubernetes_slices, "DOUBT_S", 0.4)
    workers = [await bench.worker(), await bench.worker()]
    api.put(CONFIG_MAPS, config_map(in_pool()))
    for number, worker in enumerate(workers):
        api.put(SLICES, endpoint_slice(f"w-{number}", worker.port))
    app = await cluster.router()
    await eventually(lambda: not app.unready and api.watching(SLICES))
    for number, worker in enumerate(workers):
        api.put(SLICES, endpoint_slice(f"w-{number}", worker.port, ready=False, serving=False))
    doubted = 'kvfleet_router_kubernetes_doubted_workers{pool="static"}'
    async with asyncio.timeout(10):
        while (await bench.metrics(app))[doubted] != 2:
            await served(bench, app)
    assert {await served(bench, app) for _ in range(4)} == {"w-0", "w-1"}
    await eventually(lambda: {worker.state for worker in app.dispatcher.workers()} == {"not_ready"})
    assert (await bench.ask(app, post(chat_body()))).status == 503
    api.put(SLICES, endpoint_slice("w-0", workers[0].port))
    await eventually(lambda: "ready" in {worker.state for worker in app.dispatcher.workers()})
    assert await served(bench, app) == "w-0"


async def test_a_new_pool_comes_with_its_workers(cluster: Cluster, api: FakeApi) -> None:
    """No request ever meets a pool that is configured but whose workers are not known yet."""
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", 8000))
    api.put(SLICES, endpoint_slice("o-0", 8000, service="other-workers"))
    recorder = await cluster.follow()
    await eventually(lambda: names(recorder) == ["w-0"])
    recorder.told.clear()
    may_answer, asked = asyncio.Event(), asyncio.Event()

    async def slow(call: Call, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await may_answer.wait()
        api.answer_list(call, writer)

    api.once(SLICES, slow, watch=False)
    api.put(CONFIG_MAPS, config_map(in_two_pools()))
    await asked.wait()
    assert recorder.told == []
    may_answer.set()
    await eventually(lambda: recorder.told)
    assert recorder.told == [("config", in_two_pools().revision), ("pool", ["w-0"]), ("other", ["o-0"])]


async def test_a_pool_that_left_is_forgotten(cluster: Cluster, api: FakeApi) -> None:
    api.put(CONFIG_MAPS, config_map(in_two_pools()))
    recorder = await cluster.follow()
    await eventually(lambda: recorder.config == in_two_pools())
    api.put(CONFIG_MAPS, config_map(in_pool()))
    await eventually(lambda: recorder.config == in_pool())
    recorder.told.clear()
    api.put(SLICES, endpoint_slice("o-0", 8000, service="other-workers"))
    api.put(SLICES, endpoint_slice("w-0", 8000))
    await eventually(lambda: names(recorder) == ["w-0"])
    assert recorder.told == [("static", ["w-0"])]


async def test_static_workers_need_no_slices(cluster: Cluster, api: FakeApi, bench: Bench) -> None:
    worker = await bench.worker()
    api.put(CONFIG_MAPS, config_map(fleet([worker])))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    assert await served(bench, app) == f"127.0.0.1:{worker.port}"
    assert not api.calls_of(SLICES, watch=False)


async def test_an_unchanged_config_map_is_no_news(cluster: Cluster, api: FakeApi) -> None:
    """An annotation was written, or everything was listed anew."""
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", 8000))
    recorder = await cluster.follow()
    await eventually(lambda: names(recorder) == ["w-0"])
    before = list(recorder.told)
    annotated = config_map(in_pool())
    annotated["metadata"]["annotations"] = {"a": "b"}
    api.put(CONFIG_MAPS, annotated)
    api.put(SLICES, endpoint_slice("w-0", 8000))
    api.forget()
    for path in (CONFIG_MAPS, SLICES):
        await eventually(lambda: api.watching(path))  # noqa: B023
        api.watching(path)[0].cut()
        await eventually(lambda: len(api.calls_of(path, watch=False)) == 2)  # noqa: B023
    api.put(SLICES, endpoint_slice("w-1", 8000))
    await eventually(lambda: names(recorder) == ["w-0", "w-1"])
    assert recorder.told == [*before, ("static", ["w-0", "w-1"])]


async def test_what_a_command_line_says_is_applied_to_what_is_read(cluster: Cluster, api: FakeApi) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    source = cluster.source(adapt=lambda config: config.model_copy(update={"name": "adapted"}))
    recorder = await cluster.follow(source)
    await eventually(lambda: recorder.config.name == "adapted")


# Configurations that cannot be served


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (config_map("{"), "(document)"),
        (config_map('{"pools": 1, "policies": []}'), "pools"),
        ({"metadata": {"name": "router"}, "data": {"other.json": "{}"}}, "has no key fleet.json"),
        ({"metadata": {"name": "router"}, "data": None}, "has no key fleet.json"),
        (None, "does not exist"),
    ],
    ids=["no JSON", "a wrong type", "another key", "no data", "deleted"],
)
async def test_an_unusable_config_map_changes_nothing(
    cluster: Cluster, api: FakeApi, change: dict[str, Any] | None, reason: str
) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    recorder = await cluster.follow()
    await eventually(lambda: recorder.config == in_pool() and api.watching(SLICES))
    if change is None:
        api.delete(CONFIG_MAPS, "router")
    else:
        api.put(CONFIG_MAPS, change)
    await eventually(lambda: recorder.rejected)
    assert recorder.rejected[0].startswith("ConfigMap inference/router: ")
    assert reason in recorder.rejected[0]
    api.put(SLICES, endpoint_slice("w-0", 8000))
    await eventually(lambda: names(recorder) == ["w-0"])
    assert recorder.config == in_pool()
    api.put(CONFIG_MAPS, config_map(in_pool(drain_s=3.0)))
    await eventually(lambda: recorder.config.drain_s == 3.0)


async def test_workers_of_the_configuration_in_use_are_followed_while_its_successor_is_refused(
    cluster: Cluster, api: FakeApi, bench: Bench
) -> None:
    worker = await bench.worker()
    api.put(CONFIG_MAPS, config_map(in_pool()))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    other = in_pool("other-workers")
    policy = other.policies[0].model_copy(update={"strategy": "no_such_strategy"})
    api.put(CONFIG_MAPS, config_map(other.model_copy(update={"policies": [policy]})))
    await eventually(lambda: app.loaded.errors == 1)
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    await eventually(lambda: app.dispatcher.workers())
    assert await served(bench, app) == "w-0"
    assert app.dispatcher.config.revision == in_pool().revision
