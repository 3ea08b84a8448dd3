"""Watching the API server, however it fails: nothing is missed, nothing is lost, nothing is asked without pause."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
import trustme
from fake_api import CONFIG_MAPS, QUICK, SLICES, Call, FakeApi, answering, config_map, endpoint_slice, saying
from followers import Cluster, in_pool, names, served
from scripted import Bench, eventually

from kvfleet_router.core.dispatcher import WorkerEndpoint
from kvfleet_router.io import kubernetes_watch

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
    connected = [
        f'kvfleet_router_kubernetes_connected{{resource="{name}"}}' for name in ("configmaps", "endpointslices")
    ]
    age = 'kvfleet_router_kubernetes_last_contact_age_seconds{resource="endpointslices"}'
    samples = await bench.metrics(app)
    assert [samples[name] for name in connected] == [1, 1]
    assert samples['kvfleet_router_kubernetes_lists_total{resource="endpointslices"}'] == 1
    await api.stop()
    failures = 'kvfleet_router_kubernetes_failures_total{cause="unreachable",resource="endpointslices"}'
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
    assert source.contacts["endpointslices"].failures["stalled"] >= 1


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
    await eventually(lambda: source.contacts["endpointslices"].failures.get("bad_answer", 0) >= 2)
    assert len(names(recorder)) == 3
    api.delete(SLICES, "pool-workers-w-0")
    await eventually(lambda: names(recorder) == ["w-1", "w-2", "w-3"])


async def test_long_lists_come_in_pages(cluster: Cluster, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
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
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
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
    assert source.contacts["endpointslices"].failures["closed"] == 4


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
    contact = source.contacts["configmaps"]
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
    await eventually(lambda: "token" in source.contacts["configmaps"].reason)
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
