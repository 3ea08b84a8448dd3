"""Adapters of running workers: real simulated workers, a world that names them, and a clock that a test turns."""

import asyncio
import json

import httpx
import pytest
from operator_running import poll
from operator_workers import models_of, worker

from kvfleet_operator.adapters import CALM_S, LAST_RETRY_S, SILENCES, AdapterLoader
from kvfleet_operator.api import NotLeader
from kvfleet_operator.reconcile.adapters import WORKER, WorkerAdapters
from kvfleet_operator.reconcile.dependents import Key
from kvfleet_operator.world import World

SQL, LAW = {"name": "sql", "uri": "my-org/sql"}, {"name": "law", "uri": "my-org/law"}
POOL = Key("ModelPool", "default", "llama")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


async def no_config_map(namespace, name):
    return None


class Fleet:
    """A pool, its workers' pods, and the loader at work on them."""

    def __init__(self, make, metrics, port):
        self.world, self.clock, self.port = World(), Clock(), port
        self.make, self.metrics = make, metrics
        self.told = []
        self.loader = self.new_loader()
        self._version = 0

    def new_loader(self, **options):
        values = {"eager_s": 0.005, "clock": self.clock, **options}
        return AdapterLoader(self.world, self.told.append, self.metrics, no_config_map, **values)

    def put(self, manifest):
        self._version += 1
        uid = f"{manifest['kind']} {manifest['metadata']['name']}"
        manifest["metadata"] |= {"resourceVersion": str(self._version), "uid": uid, "generation": self._version}
        self.world.put(manifest)

    def pool(self, *adapters, **engine):
        self.put(self.make.pool(adapters=list(adapters), engine={"port": self.port, **engine}))

    def pod(self, name="w1", ip="127.0.0.1", **more):
        self.put(self.make.worker_pod(name, ip, **more))

    def known(self, name="w1"):
        return self.world.adapters.get(("default", name))


@pytest.fixture
async def fleet(make, metrics, unused_tcp_port):
    return Fleet(make, metrics, unused_tcp_port)


@pytest.fixture
async def loading(fleet):
    """The fleet with its loader running."""
    task = asyncio.create_task(fleet.loader.run())
    yield fleet
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def count(metrics, action, result):
    labels = {"action": action, "result": result}
    return metrics.registry.get_sample_value("kvfleet_operator_adapter_calls_total", labels) or 0


async def test_every_ready_worker_gets_the_adapters_and_loses_them_again(loading, metrics):
    port = loading.port
    async with worker(port=port) as first, worker(host="127.0.0.2", port=port) as second:
        loading.pool(SQL)
        loading.pod("w1")
        loading.pod("w2", "127.0.0.2")
        await poll(lambda: loading.known("w1") and loading.known("w2"))
        assert await models_of(first) == await models_of(second, "127.0.0.2") == {"sql": "my-org/sql"}
        loading.pool(SQL, LAW)
        await poll(lambda: "law" in loading.known("w1").loaded and "law" in loading.known("w2").loaded)
        loading.pool(LAW)
        await poll(lambda: "sql" not in loading.known("w1").loaded and "sql" not in loading.known("w2").loaded)
        assert await models_of(first) == await models_of(second, "127.0.0.2") == {"law": "my-org/law"}
    assert set(loading.told) == {POOL}
    assert (count(metrics, "load", "done"), count(metrics, "unload", "done")) == (4, 2)


async def test_a_worker_that_has_everything_is_only_asked_now_and_then(loading, metrics):
    async with worker("--lora-modules", "sql=my-org/sql", port=loading.port):
        loading.pool(SQL)
        loading.pod()
        await poll(lambda: loading.known() == WorkerAdapters({"sql": "my-org/sql"}))
        loading.told.clear()
        loading.clock.now += CALM_S
        loading.pod("w2", "127.0.0.9", ready=False)  # is not asked at all
        await poll(lambda: loading.loader._turns["default", "w1"].due > CALM_S)
    assert loading.told == []
    assert count(metrics, "load", "done") == 0


async def test_an_adapter_that_somebody_took_away_comes_back(loading):
    async with worker(port=loading.port) as server:
        loading.pool(SQL)
        loading.pod()
        await poll(lambda: loading.known())
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"http://127.0.0.1:{loading.port}/v1/unload_lora_adapter"
            assert (await client.post(url, json={"lora_name": "sql"})).status_code == 200
        assert await models_of(server) == {}
        loading.clock.now += CALM_S
        await poll(lambda: loading.loader._turns["default", "w1"].due > CALM_S)
        assert await models_of(server) == {"sql": "my-org/sql"}


async def test_a_restarted_engine_is_asked_at_once(loading, metrics):
    async with worker(port=loading.port):
        loading.pool(SQL)
        loading.pod(since="2026-01-01T00:00:00Z")
        await poll(lambda: loading.known())
    async with worker(port=loading.port) as restarted:
        loading.pod(ready=False)
        loading.pod(since="2026-01-01T00:01:00Z")
        await poll(lambda: count(metrics, "load", "done") == 2)
        assert await models_of(restarted) == {"sql": "my-org/sql"}


async def test_adapters_of_the_command_line_are_left_alone(loading):
    async with worker("--lora-modules", "mine=my-org/mine", "theirs=my-org/theirs", port=loading.port) as server:
        loading.pool(SQL, args=["--lora-modules", "mine=my-org/mine"])
        loading.pod()
        await poll(lambda: loading.known())
        assert (await models_of(server)).keys() == {"mine", "sql"}


async def test_what_fails_is_told_and_tried_again_ever_more_seldom(loading, metrics, caplog):
    broken = {"name": "broken", "uri": "/no/such/dir"}
    async with worker(port=loading.port) as server:
        loading.pool(broken, SQL)
        loading.pod()
        await poll(lambda: loading.known())
        known = loading.known()
        assert known.loaded == {"sql": "my-org/sql"}
        assert known.failures.keys() == {"broken"} and "No adapter found for /no/such/dir" in known.failures["broken"]
        turn = loading.loader._turns["default", "w1"]
        for tries in range(2, 30):
            await poll(lambda: not turn.busy)
            assert 0 < turn.due - loading.clock.now <= LAST_RETRY_S
            loading.clock.now = turn.due
            await poll(lambda tries=tries: count(metrics, "load", "failed") == tries)
        await poll(lambda: not turn.busy)
        assert turn.due == loading.clock.now + LAST_RETRY_S
        assert len(caplog.messages) == 1  # said once
        loading.pool({**broken, "uri": "my-org/right"}, SQL)  # the remedy needs no patience
        await poll(lambda: not loading.known().failures)
        assert (await models_of(server)).keys() == {"broken", "sql"}


async def test_an_engine_without_the_endpoint_is_told_apart(loading):
    async with worker(port=loading.port, with_lora=False):
        loading.pool(SQL)
        loading.pod()
        await poll(lambda: loading.known())
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in loading.known().failures["sql"]


async def test_silence_is_told_only_when_it_lasts(loading):
    async with worker(port=loading.port):
        loading.pool(SQL)
        loading.pod()
        await poll(lambda: loading.known())
    for tries in range(1, SILENCES + 1):
        assert loading.known().failures == {}
        loading.clock.now += LAST_RETRY_S
        await poll(lambda tries=tries: loading.loader._turns["default", "w1"].failures == tries)
    assert loading.known().failures.keys() == {WORKER}
    assert loading.known().loaded == {"sql": "my-org/sql"}  # what is known of it


async def test_a_slow_load_keeps_nobody_waiting(loading, make):
    release = asyncio.Event()
    loaded = []

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("POST"):
            await release.wait()
            loaded.append("sql")
        body = json.dumps({"data": [{"id": name, "root": "my-org/sql", "parent": "x"} for name in loaded]}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    async with (
        await asyncio.start_server(serve, "127.0.0.1", loading.port),
        worker(host="127.0.0.2", port=loading.port),
    ):
        loading.pool(SQL)
        loading.pod("slow")
        loading.pod("quick", "127.0.0.2")
        await poll(lambda: loading.known("quick"))
        assert loading.known("slow") is None
        release.set()
        await poll(lambda: loading.known("slow"))
        assert loading.known("slow").loaded == {"sql": "my-org/sql"}
        assert loaded == ["sql"]  # once


async def test_a_start_looks_and_changes_nothing(fleet, metrics):
    async with worker("--lora-modules", "old=my-org/old", port=fleet.port) as server:
        fleet.pool(SQL)
        fleet.pod()
        fleet.pod("silent", "127.0.0.9")
        await fleet.loader.first()
        assert fleet.known() == WorkerAdapters({"old": "my-org/old"})
        assert fleet.known("silent") is None
        assert (await models_of(server)).keys() == {"old"}
        running = asyncio.create_task(fleet.loader.run())
        await poll(lambda: running.done() or "sql" in fleet.known().loaded)
        assert (await models_of(server)).keys() == {"sql"}
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_who_is_no_leader_any_more_changes_nothing(fleet, make):
    from kvfleet_operator.metrics import Metrics

    def fence():
        raise NotLeader("lost")

    loader = AdapterLoader(fleet.world, fleet.told.append, Metrics(), no_config_map, fence=fence, eager_s=0.005)
    async with worker(port=fleet.port) as server:
        fleet.pool(SQL)
        fleet.pod()
        with pytest.raises(BaseExceptionGroup) as ended:
            await asyncio.wait_for(loader.run(), 10)
        assert ended.value.subgroup(NotLeader) is not None
        assert await models_of(server) == {}


async def test_a_fault_in_one_worker_ends_nothing(fleet, caplog):
    async with worker(port=fleet.port):
        fleet.pool(SQL)
        fleet.pod()
        broken = [True]

        def tell(pool):
            if broken:
                broken.pop()
                raise RuntimeError("a bug")

        from kvfleet_operator.metrics import Metrics

        loader = AdapterLoader(fleet.world, tell, Metrics(), no_config_map, eager_s=0.005)
        task = asyncio.create_task(loader.run())
        await poll(lambda: not broken and loader._turns["default", "w1"].failures == 0 and fleet.known())
        assert "a bug" in caplog.text
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_pods_that_are_gone_are_forgotten(loading, make):
    async with worker(port=loading.port):
        loading.pool(SQL)
        loading.pod()
        await poll(lambda: loading.known())
        loading.world.remove(loading.world.get(Key("Pod", "default", "w1")))
        assert loading.known() is None
        await poll(lambda: not loading.loader._turns)
