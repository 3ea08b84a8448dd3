"""A running operator for tests, and the words to wait for what it brings about."""

import asyncio
import contextlib

import kmock

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_operator.main import Operator, OperatorOptions
from kvfleet_operator.resources import WATCHED
from kvfleet_router.io.loaded import Loaded


@contextlib.asynccontextmanager
async def running(login, **options):
    """An operator that leads and knows the world, stopped in an orderly way in the end."""
    values = {
        "lease_namespace": "default",
        "debounce_s": 0.005,
        "metrics_host": "127.0.0.1",
        "metrics_port": 0,
        "report_s": 0.05,
    }
    operator = Operator(OperatorOptions(**{**values, **options}), login)
    stop = asyncio.Event()
    task = asyncio.create_task(operator.run(stop))
    try:
        await asyncio.wait(
            {task, started := asyncio.create_task(operator.started.wait())}, return_when="FIRST_COMPLETED"
        )
        started.cancel()
        assert not task.done(), task.result()
        yield operator
    finally:
        stop.set()
        operator.code = await asyncio.wait_for(task, 20)


def ready(cluster, kind, name):
    condition = cluster.conditions(kind, name).get("Ready", {})
    return (
        condition.get("status") == "True"
        and condition["observedGeneration"] == cluster.get(kind, name)["metadata"]["generation"]
    )


def reason(cluster, kind, name, type_):
    return cluster.conditions(kind, name).get(type_, {}).get("reason")


async def settled_pool(operator, cluster, make, **spec):
    """A pool with its profile, rolled out and ready."""
    cluster.put(make.profile())
    cluster.put(make.pool(replicas=2, **spec))
    await cluster.until(lambda: cluster.get("Deployment", "llama-workers"))
    cluster.roll_out("llama-workers")
    await cluster.until(lambda: ready(cluster, "ModelPool", "llama"))


async def rounds(cluster, count):
    """Wait for `count` more rounds of listings, each followed by a look at every object."""
    path = "get /api/v1/services"
    before = len(cluster[path])
    await poll(lambda: len(cluster[path]) >= before + count)


async def watching(cluster):
    """Wait until all watches are open."""
    watched = {resource.plural for resource in WATCHED}

    def opened():
        return {request.resource.plural for request in cluster[kmock.action.WATCH] if request.resource}

    await poll(lambda: watched <= opened())


async def poll(check):
    """For what no stored object tells: look again whenever the loop has turned a little."""
    async with asyncio.timeout(30):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def replica(port, cluster, pools=dict):
    """A router replica's admin port; the replica serves with whatever its ConfigMap holds, and says so as a real one does.

    `pools()`: what it says of pools.
    """

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        text = cluster.get("ConfigMap", "router")["data"]["fleet.json"]
        body = Loaded(FleetConfig.model_validate_json(text), pools).to_json()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        yield
