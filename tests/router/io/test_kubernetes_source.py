"""The router in a cluster: what the API server says, however it says it and however it fails, and what requests see of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import trustme
from fake_api import (
    CONFIG_MAPS,
    QUICK,
    SLICES,
    Call,
    FakeApi,
    answering,
    config_map,
    endpoint_slice,
    saying,
)
from scripted import STREAM_END, STREAM_HEAD, Bench, Seen, chat_body, event, eventually, fleet, post

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.app import RouterApp
from kvfleet_router.core.dispatcher import WorkerEndpoint
from kvfleet_router.io import kubernetes_watch
from kvfleet_router.io.config_source import ConfigRejected
from kvfleet_router.io.kubernetes import KubernetesSource
from kvfleet_router.io.kubernetes_access import AccessError
from kvfleet_router.io.kubernetes_watch import Timings

EMPTY = FleetConfig(pools=[], policies=[])
GET_READY = b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n"


def in_pool(service: str = "pool-workers", **changes: Any) -> FleetConfig:
    """A fleet of one pool whose workers are behind `service`."""
    config = fleet([], model="m")
    pool = config.pools[0].model_copy(update={"endpoints": [], "service": service})
    return config.model_copy(update={"pools": [pool], **changes})


def in_two_pools() -> FleetConfig:
    config = in_pool()
    pools = [pool.model_copy(update={"name": name, "service": f"{name}-workers"})
             for pool in config.pools for name in ("pool", "other")]  # fmt: skip
    policy = config.policies[0]
    weighted = [policy.pools[0].model_copy(update={"name": pool.name}) for pool in pools]
    return config.model_copy(
        update={"pools": pools, "policies": [policy.model_copy(update={"pools": weighted})]}
    )


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    api = FakeApi()
    await api.start()
    try:
        yield api
    finally:
        await api.stop()


class Recorder:
    """A sink that notes what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.config: FleetConfig = EMPTY
        self.workers: dict[str, list[WorkerEndpoint]] = {}
        self.rejected: list[str] = []
        self.refuse = ""

    def take_config(self, config: FleetConfig) -> None:
        if self.refuse:
            raise ConfigRejected(self.refuse)
        self.config = config
        self.told.append(("config", config.revision))

    def take_endpoints(self, pool: str, endpoints: Sequence[WorkerEndpoint]) -> None:
        self.workers[pool] = list(endpoints)
        self.told.append((pool, [endpoint.name for endpoint in endpoints]))

    def reject_config(self, reason: str) -> None:
        self.rejected.append(reason)


class Cluster:
    """An API server, and the routers and sinks that follow it."""

    def __init__(self, api: FakeApi, bench: Bench, folder: Path) -> None:
        self.api, self.bench, self.folder = api, bench, folder

    def source(self, *, timings: Timings = QUICK, **options: Any) -> KubernetesSource:
        access = self.api.mount(self.folder)
        return KubernetesSource(access, "inference/router", timings=timings, rng=random.Random(1), **options)

    async def follow(self, source: KubernetesSource | None = None) -> Recorder:
        """A sink that a source feeds."""
        recorder = Recorder()
        task = asyncio.create_task((source or self.source()).run(recorder))

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.bench.on_close(end)
        return recorder

    async def router(self, source: KubernetesSource | None = None) -> RouterApp:
        app = RouterApp(EMPTY, source=source or self.source())
        await app.start()
        self.bench.on_close(app.stop, 0.0)
        return app


@pytest.fixture
async def cluster(api: FakeApi, bench: Bench, tmp_path: Path) -> Cluster:
    return Cluster(api, bench, tmp_path / "serviceaccount")


def names(recorder: Recorder, pool: str = "static") -> list[str]:
    return [worker.name for worker in recorder.workers.get(pool, [])]


async def served(bench: Bench, app: RouterApp) -> str | None:
    """Which worker answered a request."""
    answer = await bench.ask(app, post(chat_body()))
    assert answer.status == 200, answer.body
    return answer.header("x-kvfleet-worker")


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
    api._scripts.clear()
    await until("does not exist")
    api.once(SLICES, answering(500), watch=False, times=10_000)
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    api.put(CONFIG_MAPS, config_map(in_pool()))
    await until("waiting for the workers' EndpointSlices: 500: says 500")
    api._scripts.clear()
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
    api._scripts.clear()
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
        api._list(call, writer)

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
    await eventually(lambda: app.metrics.config_errors == 1)
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    await eventually(lambda: app.dispatcher.workers())
    assert await served(bench, app) == "w-0"
    assert app.dispatcher.config.revision == in_pool().revision


# The API server fails


async def test_while_the_api_server_is_away_requests_are_served(
    cluster: Cluster, api: FakeApi, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first, second = await bench.worker(), await bench.worker()
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", first.port))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    await eventually(lambda: api.watching(CONFIG_MAPS) and api.watching(SLICES))
    connected = [f'kvfleet_router_kubernetes_connected{{resource="{name}"}}' for name in ("configmaps", "endpointslices")]
    age = 'kvfleet_router_kubernetes_last_contact_age_seconds{resource="endpointslices"}'
    samples = await bench.metrics(app)
    assert [samples[name] for name in connected] == [1, 1]
    assert samples['kvfleet_router_kubernetes_lists_total{resource="endpointslices"}'] == 1
    await api.stop()
    failures = 'kvfleet_router_kubernetes_failures_total{resource="endpointslices",cause="unreachable"}'
    async with asyncio.timeout(10):
        while (samples := await bench.metrics(app)).get(failures, 0) < 5:
            assert await served(bench, app) == "w-0"
    assert [samples[name] for name in connected] == [0, 0]
    assert samples[age] > 0
    assert app.unready == ""
    api.put(SLICES, endpoint_slice("w-0", first.port, ready=False))
    api.put(SLICES, endpoint_slice("w-1", second.port))
    await api.start()
    await eventually(lambda: [worker.name for worker in app.dispatcher.workers()] == ["w-0", "w-1"])
    assert await served(bench, app) == "w-1"
    await eventually(lambda: api.watching(CONFIG_MAPS))
    assert [(await bench.metrics(app))[name] for name in connected] == [1, 1]
    losses = [text for text in caplog.messages if "endpointslices: " in text and "stays in use" in text]
    assert 1 <= len(losses) <= 3, "one line for each way it fails, not for each try"


async def test_a_watch_ended_in_good_order_goes_on_where_it_was(cluster: Cluster, api: FakeApi) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    recorder = await cluster.follow()
    await eventually(lambda: api.watching(SLICES))
    item = api.put(SLICES, endpoint_slice("w-0", 8000))
    await eventually(lambda: names(recorder) == ["w-0"])
    api.watching(SLICES)[0].end()
    await eventually(lambda: len(api.calls_of(SLICES, watch=True)) == 2)
    assert api.calls_of(SLICES, watch=True)[1].query["resourceVersion"] == item["metadata"]["resourceVersion"]
    await eventually(lambda: api.watching(SLICES))
    api.put(SLICES, endpoint_slice("w-1", 8000))
    await eventually(lambda: names(recorder) == ["w-0", "w-1"])
    assert len(api.calls_of(SLICES, watch=False)) == 1
    assert api.connections == 2, "one connection for each of the two collections"


async def test_a_watch_asks_for_bookmarks_and_for_an_end(cluster: Cluster, api: FakeApi) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    await cluster.follow()
    await eventually(lambda: api.watching(SLICES))
    query = api.watching(SLICES)[0].call.query
    assert query["allowWatchBookmarks"] == "true"
    assert 240 <= int(query["timeoutSeconds"]) <= 300
    assert query["labelSelector"] == "kubernetes.io/service-name in (pool-workers)"
    assert api.watching(CONFIG_MAPS)[0].call.query["fieldSelector"] == "metadata.name=router"


async def test_a_bookmark_moves_where_the_next_watch_begins(cluster: Cluster, api: FakeApi) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    await cluster.follow()
    await eventually(lambda: api.watching(SLICES))
    version = api.bookmark(SLICES)
    api.watching(SLICES)[0].end()
    await eventually(lambda: len(api.calls_of(SLICES, watch=True)) == 2)
    assert api.calls_of(SLICES, watch=True)[1].query["resourceVersion"] == version


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
async def test_an_event_cut_off_in_the_middle_is_asked_for_again(cluster: Cluster, api: FakeApi, share: float) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    recorder = await cluster.follow()
    await eventually(lambda: api.watching(SLICES))
    watch = api.watching(SLICES)[0]
    api.watches.remove(watch)
    item = api.put(SLICES, endpoint_slice("w-0", 8000))
    api.watches.append(watch)
    line = orjson.dumps({"type": "ADDED", "object": item})
    watch.send_raw(line[: int(share * len(line))] or b" ")
    await watch.writer.drain()
    watch.cut()
    await eventually(lambda: names(recorder) == ["w-0"])
    assert len(api.calls_of(SLICES, watch=False)) == 1
    assert recorder.told.count(("static", ["w-0"])) == 1


async def test_events_may_arrive_in_any_pieces(cluster: Cluster, api: FakeApi) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    recorder = await cluster.follow()
    await eventually(lambda: api.watching(SLICES))
    watch = api.watching(SLICES)[0]
    events = b""
    for number in range(3):
        item = endpoint_slice(f"w-{number}", 8000)
        item["metadata"]["resourceVersion"] = str(1000 + number)
        events += orjson.dumps({"type": "ADDED", "object": item}) + b"\n"
    for start in range(0, len(events), 7):
        watch.send_raw(events[start : start + 7])
    await eventually(lambda: names(recorder) == ["w-0", "w-1", "w-2"])


@pytest.mark.parametrize("as_event", [False, True], ids=["as an answer", "as an event"])
async def test_a_version_that_is_too_old_is_followed_by_a_new_list(
    cluster: Cluster, api: FakeApi, as_event: bool
) -> None:
    """What was deleted in between is gone afterwards."""
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", 8000))
    recorder = await cluster.follow()
    await eventually(lambda: names(recorder) == ["w-0"] and api.watching(SLICES))
    watch = api.watching(SLICES)[0]
    api.watches.remove(watch)
    api.delete(SLICES, "pool-workers-w-0")
    api.put(SLICES, endpoint_slice("w-1", 8000))
    api.watches.append(watch)
    api.forget()
    if as_event:
        watch.send("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"})
    else:
        watch.cut()
    await eventually(lambda: names(recorder) == ["w-1"])
    assert len(api.calls_of(SLICES, watch=False)) == 2


async def test_an_error_event_is_got_over(cluster: Cluster, api: FakeApi) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    recorder = await cluster.follow()
    await eventually(lambda: api.watching(SLICES))
    api.watching(SLICES)[0].send("ERROR", {"kind": "Status", "code": 504, "message": "too large resource version"})
    await eventually(lambda: len(api.calls_of(SLICES, watch=True)) == 2)
    api.put(SLICES, endpoint_slice("w-0", 8000))
    await eventually(lambda: names(recorder) == ["w-0"])
    assert len(api.calls_of(SLICES, watch=False)) == 1


async def test_a_silent_watch_is_given_up(cluster: Cluster, api: FakeApi) -> None:
    """The connection lives, and something in between passes nothing on."""
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.once(SLICES, saying(b""), watch=True)
    source = cluster.source(timings=replace(QUICK, stalled_s=0.05))
    recorder = await cluster.follow(source)
    await eventually(lambda: recorder.config == in_pool())
    api.put(SLICES, endpoint_slice("w-0", 8000))
    await eventually(lambda: names(recorder) == ["w-0"])
    assert source._contacts["endpointslices"].failures["stalled"] >= 1


@pytest.mark.parametrize(
    "line",
    [
        b"no json\n",
        b"[]\n",
        b'{"type": "MODIFIED"}\n',
        b'{"type": "PAINTED", "object": {"metadata": {"name": "x", "resourceVersion": "1"}}}\n',
        b'{"type": "ADDED", "object": {"metadata": {"name": 7}}}\n',
        b'{"type": "ADDED", "object": {"metadata": {"name": "x"}, "endpoints": {"a": 1}}}\n',
        b'{"type": "ADDED", "object": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}\n",
        b"x" * 5000,
    ],
    ids=["no JSON", "a list", "no object", "unknown type", "wrong name", "wrong endpoints", "deep", "endless"],
)
async def test_what_cannot_be_understood_is_followed_by_a_new_list(
    cluster: Cluster, api: FakeApi, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if line.startswith(b"x"):
        monkeypatch.setattr(kubernetes_watch, "MAX_EVENT_BYTES", 4096)
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", 8000))
    api.once(SLICES, saying(line), watch=True)
    recorder = await cluster.follow()
    await eventually(lambda: len(api.calls_of(SLICES, watch=False)) == 2)
    await eventually(lambda: api.watching(SLICES))
    api.put(SLICES, endpoint_slice("w-1", 8000))
    await eventually(lambda: names(recorder) == ["w-0", "w-1"])


@pytest.mark.parametrize(
    "behaviour",
    [
        answering(200, [1]),
        answering(200, {"metadata": {}, "items": []}),
        answering(200, {"metadata": {"resourceVersion": "1"}, "items": [{"metadata": 1}]}),
        answering(404),
        answering(500),
        answering(200, {"metadata": {"resourceVersion": "1"}, "items": [{"metadata": {"name": "x" * 10_000}}]}),
    ],
    ids=["a list", "no version", "wrong object", "404", "500", "too large"],
)
async def test_a_list_that_fails_is_tried_again(
    cluster: Cluster, api: FakeApi, behaviour: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_watch, "MAX_PAGE_BYTES", 8192)
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", 8000))
    api.once(SLICES, behaviour, watch=False)
    recorder = await cluster.follow()
    await eventually(lambda: names(recorder) == ["w-0"])
    assert len(api.calls_of(SLICES, watch=False)) == 2


async def test_more_objects_than_can_be_are_not_taken(
    cluster: Cluster, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_watch, "MAX_OBJECTS", 3)
    api.put(CONFIG_MAPS, config_map(in_pool()))
    for number in range(3):
        api.put(SLICES, endpoint_slice(f"w-{number}", 8000))
    source = cluster.source()
    recorder = await cluster.follow(source)
    await eventually(lambda: len(names(recorder)) == 3 and api.watching(SLICES))
    api.put(SLICES, endpoint_slice("w-3", 8000))
    await eventually(lambda: source._contacts["endpointslices"].failures.get("bad_answer", 0) >= 2)
    assert len(names(recorder)) == 3
    api.delete(SLICES, "pool-workers-w-0")
    await eventually(lambda: names(recorder) == ["w-1", "w-2", "w-3"])


async def test_long_lists_come_in_pages(
    cluster: Cluster, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_watch, "PAGE_OBJECTS", 2)
    api.put(CONFIG_MAPS, config_map(in_pool()))
    for number in range(5):
        api.put(SLICES, endpoint_slice(f"w-{number}", 8000))
    recorder = await cluster.follow()
    await eventually(lambda: len(names(recorder)) == 5)
    assert [call.query.get("continue") for call in api.calls_of(SLICES, watch=False)] == [None, "2", "4"]


async def test_a_busy_server_is_left_alone_as_long_as_it_asks(cluster: Cluster, api: FakeApi) -> None:
    times: list[float] = []

    async def busy(call: Call, writer: asyncio.StreamWriter) -> None:
        times.append(time.perf_counter())
        await answering(429, None, b"retry-after: 1")(call, writer)

    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.once(CONFIG_MAPS, busy, watch=False)
    recorder = await cluster.follow(cluster.source(timings=replace(QUICK, backoff_s=(0.001, 0.03))))
    await eventually(lambda: recorder.told)
    assert time.perf_counter() - times[0] >= 0.18, "what it asks for, but no more than six of the longest pauses"


async def test_pauses_grow_with_failures(cluster: Cluster, api: FakeApi) -> None:
    times: list[float] = []

    async def hang_up(call: Call, writer: asyncio.StreamWriter) -> None:
        times.append(time.perf_counter())
        writer.close()

    api.once(CONFIG_MAPS, hang_up, watch=False, times=7)
    api.put(CONFIG_MAPS, config_map(in_pool()))
    recorder = await cluster.follow(cluster.source(timings=replace(QUICK, backoff_s=(0.002, 1.0))))
    await eventually(lambda: recorder.told)
    pauses = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    for number, pause_s in enumerate(pauses):
        assert pause_s >= 0.001 * 2**number


async def test_a_server_that_closes_every_watch_at_once_is_not_asked_without_pause(
    cluster: Cluster, api: FakeApi
) -> None:
    async def close(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.once(SLICES, close, watch=True, times=4)
    source = cluster.source(timings=replace(QUICK, brief_s=0.5))
    await cluster.follow(source)
    await eventually(lambda: api.watching(SLICES))
    assert source._contacts["endpointslices"].failures["closed"] == 4


# Credentials


async def test_a_renewed_token_is_used_from_the_next_request_on(cluster: Cluster, api: FakeApi) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    recorder = await cluster.follow()
    await eventually(lambda: api.watching(SLICES) and api.watching(CONFIG_MAPS))
    api.tokens = {"token-2"}
    api.watching(SLICES)[0].end()
    await eventually(lambda: len(api.calls_of(SLICES, watch=True)) >= 3)  # refused with the old one
    (cluster.folder / "token").write_text("token-2")
    api.put(SLICES, endpoint_slice("w-0", 8000))
    await eventually(lambda: names(recorder) == ["w-0"])
    assert api.calls_of(SLICES, watch=True)[-1].token == "token-2"
    api.watching(CONFIG_MAPS)[0].end()
    await eventually(lambda: api.calls_of(CONFIG_MAPS, watch=True)[-1].token == "token-2")


async def test_a_server_that_cannot_prove_itself_gets_no_token(cluster: Cluster, api: FakeApi) -> None:
    """And one whose authority was renewed together with ours is trusted again."""
    api.put(CONFIG_MAPS, config_map(in_pool()))
    source = cluster.source()
    await api.stop()
    stranger = trustme.CA()
    await api.start(stranger)
    recorder = await cluster.follow(source)
    contact = source._contacts["configmaps"]
    await eventually(lambda: contact.failures.get("unreachable", 0) >= 2)
    assert "CERTIFICATE_VERIFY_FAILED" in contact.reason
    assert api.calls == []
    stranger.cert_pem.write_to_path(str(cluster.folder / "ca.crt"))
    await eventually(lambda: recorder.config == in_pool())


async def test_a_token_that_vanished_is_waited_for(cluster: Cluster, api: FakeApi) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    source = cluster.source()
    (cluster.folder / "token").unlink()
    recorder = await cluster.follow(source)
    await eventually(lambda: "token" in source._contacts["configmaps"].reason)
    (cluster.folder / "token").write_text("token-1")
    await eventually(lambda: recorder.config == in_pool())


async def test_an_error_nobody_foresaw_ends_nothing(
    cluster: Cluster, api: FakeApi, caplog: pytest.LogCaptureFixture
) -> None:
    api.put(CONFIG_MAPS, config_map(in_pool()))
    recorder = await cluster.follow()
    await eventually(lambda: api.watching(SLICES))
    true_take, failed = recorder.take_endpoints, []

    def fail_once(pool: str, endpoints: Sequence[WorkerEndpoint]) -> None:
        if not failed:
            failed.append(pool)
            raise ZeroDivisionError("a bug")
        true_take(pool, endpoints)

    recorder.take_endpoints = fail_once  # type: ignore[method-assign]
    api.put(SLICES, endpoint_slice("w-0", 8000))
    await eventually(lambda: failed)
    api.put(SLICES, endpoint_slice("w-1", 8000))
    await eventually(lambda: names(recorder) == ["w-0", "w-1"])
    assert "an error nobody foresaw" in caplog.text
