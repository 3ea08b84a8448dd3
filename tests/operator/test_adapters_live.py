"""Adapters through the whole operator: a changed list reaches running workers, the status follows, nothing restarts."""

import pytest
from operator_running import poll, reason, rounds, running
from operator_workers import models_of, worker

SQL, LAW = {"name": "sql", "uri": "my-org/sql"}, {"name": "law", "uri": "my-org/law"}


@pytest.fixture
async def operator(cluster, login):
    async with running(login, adapters_s=0.02) as found:
        yield found


@pytest.fixture
async def server(unused_tcp_port):
    async with worker(port=unused_tcp_port) as found:
        yield found


async def pool_of_one(cluster, make, port, *adapters):
    """A pool whose one worker runs."""
    cluster.put(make.profile())
    cluster.put(make.pool(replicas=1, adapters=list(adapters), engine={"port": port}))
    await cluster.until(lambda: cluster.get("Deployment", "llama-workers"))
    labels = cluster.get("Deployment", "llama-workers")["spec"]["template"]["metadata"]["labels"]
    pod = make.worker_pod()
    pod["metadata"]["labels"] = labels  # as its Deployment gives it
    cluster.roll_out("llama-workers")
    cluster.put(pod)


def loaded(cluster):
    return cluster.get("ModelPool", "llama").get("status", {}).get("adapters", [])


def notes(cluster):
    return [event["note"] for event in cluster.all("Event") if event["action"] == "AdaptersLoaded"]


async def test_a_changed_list_reaches_the_workers_and_restarts_none(operator, server, cluster, make):
    await pool_of_one(cluster, make, server.port, SQL)
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "AdaptersLoaded") == "Loaded")
    template = cluster.get("Deployment", "llama-workers")["spec"]["template"]
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(adapters=[SQL, LAW]))
    await cluster.until(lambda: loaded(cluster) == ["sql", "law"])
    assert await models_of(server) == {"sql": "my-org/sql", "law": "my-org/law"}
    assert "law" in cluster.get("ConfigMap", "llama-adapters")["data"]["adapters.json"]  # for those that start
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(adapters=[]))
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "AdaptersLoaded") == "NoAdapters")
    await poll(lambda: not operator.world.adapters["default", "w1"].loaded)
    assert await models_of(server) == {}
    assert cluster.get("Deployment", "llama-workers")["spec"]["template"] == template
    assert cluster.get("Deployment", "llama-workers")["metadata"]["generation"] == 1


async def test_what_does_not_load_is_told_in_condition_and_event_and_heals(operator, server, cluster, make):
    await pool_of_one(cluster, make, server.port, {"name": "sql", "uri": "/no/such/dir"})
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "AdaptersLoaded") == "LoadFailed")
    condition = cluster.conditions("ModelPool", "llama")["AdaptersLoaded"]
    assert "sql: Loading lora sql failed: No adapter found for /no/such/dir" in condition["message"]
    assert "(w1)" in condition["message"]
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "Ready") == "LoadFailed")
    await cluster.until(lambda: [note.partition(":")[0] for note in notes(cluster)] == ["AdaptersLoaded=False"])
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(adapters=[SQL]))
    await cluster.until(lambda: loaded(cluster) == ["sql"])
    await cluster.until(lambda: cluster.conditions("ModelPool", "llama")["Ready"]["status"] == "True")
    await cluster.until(lambda: len(notes(cluster)) == 2)
    assert [note.partition(":")[0] for note in notes(cluster)] == ["AdaptersLoaded=False", "AdaptersLoaded=True"]


async def test_a_new_operator_knows_what_is_loaded_before_it_judges(cluster, login, server, make):
    async with running(login, adapters_s=0.02):
        await pool_of_one(cluster, make, server.port, SQL)
        await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "Ready") == "Ready")
    cluster.writes.clear()
    async with running(login, adapters_s=0.02, resync_s=0.05) as operator:
        assert operator.world.adapters["default", "w1"].loaded == {"sql": "my-org/sql"}
        await rounds(cluster, 2)
        await poll(lambda: operator.queue.idle)
    assert operator.code == 0
    assert {write[1] for write in cluster.writes} == {"leases"}


async def test_workers_without_lora_are_left_to_the_rollout(operator, server, cluster, make):
    await pool_of_one(cluster, make, server.port)
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(adapters=[SQL]))
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "AdaptersLoaded") == "RollingOut")
    template = cluster.get("Deployment", "llama-workers")["spec"]["template"]
    assert template["metadata"]["labels"]["kvfleet.io/lora"] == "enabled"
    assert await models_of(server) == {}
    new = make.worker_pod("w2")
    new["metadata"]["labels"] = template["metadata"]["labels"]
    cluster.put(new)
    cluster.remove("Pod", "w1")
    await cluster.until(lambda: loaded(cluster) == ["sql"])
