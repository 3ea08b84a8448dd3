"""The configuration changes under the router's feet, and no request notices."""

import asyncio
import os
from pathlib import Path

import pytest
from scripted import STREAM_END, STREAM_HEAD, Bench, ScriptedWorker, Seen, chat_body, event, eventually, fleet, post

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.app import RouterApp
from kvfleet_router.core.dispatcher import ConfigError, WorkerEndpoint
from kvfleet_router.io.config_source import ConfigRejected, FileSource, read_config


def write(path: Path, text: str) -> None:
    """As kubelets and editors do: a new file in place of the old."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


async def started(bench: Bench, path: Path, config: FleetConfig) -> RouterApp:
    write(path, config.to_json())
    router = RouterApp(config, source=FileSource(path, poll_s=0.005))
    await router.start()
    bench.on_close(router.stop, 0.0)
    return router


async def test_a_new_file_is_taken(bench: Bench, tmp_path: Path) -> None:
    first, second = await bench.worker(), await bench.worker()
    path = tmp_path / "fleet.json"
    router = await started(bench, path, fleet([first]))
    assert (await bench.ask(router, post(chat_body()))).status == 200
    changed = fleet([second], max_body_bytes=2048)
    write(path, changed.to_json())
    await eventually(lambda: router.dispatcher.config.revision == changed.revision)
    assert (await bench.ask(router, post(chat_body()))).status == 200
    assert (len(first.requests), len(second.requests)) == (1, 1)
    assert (await bench.ask(router, post(chat_body(filler="x" * 3000)))).status == 413
    await eventually(lambda: first.lost == 1), "idle connections to a worker that left are closed"
    assert (await bench.metrics(router))[f'kvfleet_router_config_info{{revision="{changed.revision}"}}'] == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"pools": 1}', '{"pools": [], "policies": [], "unknown": 1}'],
    ids=["empty", "no JSON", "a list", "a wrong type", "an unknown field"],
)
async def test_a_bad_file_changes_nothing_but_a_metric(
    bench: Bench, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "fleet.json"
    config = fleet([await bench.worker()])
    router = await started(bench, path, config)
    write(path, text)
    await eventually(lambda: router.loaded.errors == 1)
    assert (await bench.ask(router, post(chat_body()))).status == 200
    assert router.dispatcher.config.revision == config.revision
    assert str(path) in caplog.text
    write(path, config.model_copy(update={"drain_s": 1.0}).to_json())
    await eventually(lambda: router.dispatcher.config.drain_s == 1.0)
    assert (await bench.metrics(router))["kvfleet_router_config_errors_total"] == 1


async def test_a_config_that_cannot_be_served_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    config = fleet([await bench.worker()])
    router = await started(bench, path, config)
    policy = config.policies[0].model_copy(update={"strategy": "no_such_strategy"})
    write(path, config.model_copy(update={"policies": [policy]}).to_json())
    await eventually(lambda: router.loaded.errors == 1)
    assert (await bench.ask(router, post(chat_body()))).status == 200


async def test_a_file_that_vanishes_for_a_while_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    config = fleet([await bench.worker()])
    router = await started(bench, path, config)
    path.unlink()
    await eventually(lambda: router.loaded.errors == 1)
    assert (await bench.ask(router, post(chat_body()))).status == 200
    changed = config.model_copy(update={"drain_s": 2.0})
    write(path, changed.to_json())
    await eventually(lambda: router.dispatcher.config.revision == changed.revision)


async def test_a_mounted_config_map_is_followed_through_its_symlink(bench: Bench, tmp_path: Path) -> None:
    """A kubelet writes a new directory and turns `..data` to it."""
    config = fleet([await bench.worker()])
    changed = config.model_copy(update={"drain_s": 3.0})
    for name, content in (("a", config), ("b", changed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fleet.json").write_text(content.to_json())
    (tmp_path / "..data").symlink_to("a")
    path = tmp_path / "fleet.json"
    path.symlink_to("..data/fleet.json")
    router = RouterApp(config, source=FileSource(path, poll_s=0.005))
    await router.start()
    bench.on_close(router.stop, 0.0)
    (tmp_path / "..data_tmp").symlink_to("b")
    os.replace(tmp_path / "..data_tmp", tmp_path / "..data")  # noqa: PTH105 - a rename over a symlink
    await eventually(lambda: router.dispatcher.config.revision == changed.revision)


async def test_reloading_under_load_loses_no_request(bench: Bench) -> None:
    workers = [await bench.worker() for _ in range(4)]
    router = await bench.router(config=fleet(workers[:2]))
    statuses: list[int] = []

    async def load() -> None:
        client = await bench.client(router)
        while not reloaded:
            await client.send(post(chat_body()))
            statuses.append((await client.answer()).status)

    reloaded = False
    loads = [asyncio.create_task(load()) for _ in range(6)]
    for number in range(30):
        seen = len(statuses)
        await eventually(lambda: len(statuses) > seen + 5)  # noqa: B023
        chosen: list[ScriptedWorker] = workers[:2] if number % 2 else workers[2:]
        router.take_config(fleet(chosen, strategy=("round_robin", "least_request", "kvfleet")[number % 3]))
    reloaded = True
    await asyncio.gather(*loads)
    assert set(statuses) == {200}
    assert all(worker.requests for worker in workers)


async def test_a_stream_outlives_its_workers_departure(bench: Bench) -> None:
    may_end = asyncio.Event()

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + event("a"))
        await may_end.wait()
        writer.write(STREAM_END)

    old, new = await bench.worker(behave), await bench.worker()
    router = await bench.router(old)
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await client.answer(head_only=True)
    router.take_config(fleet([new]))
    assert (await bench.ask(router, post(chat_body()))).status == 200
    may_end.set()
    assert (await client.reader.readuntil(STREAM_END)) == event("a") + STREAM_END


async def test_endpoints_from_a_source_are_used_and_drained(bench: Bench) -> None:
    first, second = await bench.worker(), await bench.worker()
    config = fleet([], model="m")
    pool = config.pools[0].model_copy(update={"endpoints": [], "service": "workers"})
    router = await bench.router(config=config.model_copy(update={"pools": [pool]}))
    router.take_endpoints(
        "static", [WorkerEndpoint("pod-1", first.url), WorkerEndpoint("pod-2", second.url, ready=False)]
    )
    for _ in range(3):
        assert (await bench.ask(router, post(chat_body()))).header("x-kvfleet-worker") == "pod-1"
    router.take_endpoints(
        "static", [WorkerEndpoint("pod-1", first.url, terminating=True), WorkerEndpoint("pod-2", second.url)]
    )
    for _ in range(3):
        assert (await bench.ask(router, post(chat_body()))).header("x-kvfleet-worker") == "pod-2"


def test_reading_a_config_names_the_field(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    path.write_text('{"pools": [{"name": "p"}], "policies": []}')
    with pytest.raises(ConfigRejected, match=r"pools\.0\.model"):
        read_config(path)
    with pytest.raises(ConfigRejected, match="cannot be read"):
        read_config(tmp_path / "missing.json")


async def test_a_router_refuses_to_start_with_what_it_cannot_serve() -> None:
    config = fleet([])
    policy = config.policies[0].model_copy(update={"strategy": "no_such_strategy"})
    with pytest.raises(ConfigError, match="no_such_strategy"):
        RouterApp(config.model_copy(update={"policies": [policy]}))
