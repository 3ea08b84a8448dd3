"""The operator asks workers that serve HTTPS: real TLS servers, and ConfigMaps that come, change and are wrong."""

import asyncio
import contextlib
import json
import ssl

import httpx
import pytest
import trustme
from operator_running import poll

from kvfleet_operator.adapters import AdapterLoader
from kvfleet_operator.api import ApiError
from kvfleet_operator.autoscale.readers.fetch import FetchError
from kvfleet_operator.autoscale.readers.routers import RouterReader
from kvfleet_operator.reconcile.adapters import WorkerAdapters
from kvfleet_operator.workertls import KEEP_S, RETRY_S, Identity, WorkerClients, identity_of
from kvfleet_operator.world import World

NAME = "llama-workers.default.svc"
AUTHORITIES = ("default", "llama-ca", "ca.crt")
TLS = {"caConfigMapRef": {"name": "llama-ca"}}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class ConfigMaps:
    """(namespace, name) → data, as the API server gives it."""

    def __init__(self, **data):
        self.data, self.reads, self.error = data, 0, None

    async def __call__(self, namespace, name):
        self.reads += 1
        if self.error:
            raise self.error
        return {"data": self.data} if (namespace, name) == AUTHORITIES[:2] and self.data else None

    def trust(self, ca):
        self.data = {"ca.crt": ca.cert_pem.bytes().decode()}


@contextlib.asynccontextmanager
async def https_worker(ca, name=NAME):
    """Answers like an engine with LoRA; `asked` has the paths."""
    loaded = {}
    asked = []

    async def serve(reader, writer):
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split()[1]
            asked.append(path)
            length = [line.split(":")[1] for line in head.lower().split("\r\n") if line.startswith("content-length:")]
            sent = await reader.readexactly(int(length[0])) if length else b""
            body = b"vllm:num_requests_running 3.0\n"
            if path == "/v1/load_lora_adapter":
                loaded[json.loads(sent)["lora_name"]] = json.loads(sent)["lora_path"]
                body = b"Success"
            elif path == "/v1/models":
                cards = [{"id": "llama-8b", "root": "x", "parent": None}]
                cards += [{"id": each, "root": uri, "parent": "llama-8b"} for each, uri in loaded.items()]
                body = json.dumps({"object": "list", "data": cards}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            await writer.drain()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    server.port, server.asked = server.sockets[0].getsockname()[1], asked
    async with server:
        yield server


@pytest.fixture
def ca():
    return trustme.CA()


@pytest.fixture
async def asking():
    """Clients, the ConfigMaps they read, and their clock."""
    maps, clock = ConfigMaps(), Clock()
    clients = WorkerClients(maps, clock=clock)
    yield clients, maps, clock
    await clients.aclose()


async def status(clients, port, identity=Identity(NAME, AUTHORITIES)):
    """Of GET /v1/models; 0: the worker was not believed."""
    client = await clients.of(identity)
    try:
        return (
            await client.http.get(f"https://127.0.0.1:{port}/v1/models", extensions=dict(client.extensions))
        ).status_code
    except httpx.ConnectError as error:
        assert "CERTIFICATE_VERIFY_FAILED" in str(error)
        return 0


def test_who_workers_must_prove_to_be(make):
    assert identity_of(make.parse(make.pool())) is None
    pool = make.parse(make.pool(engine={"tls": TLS}))
    assert identity_of(pool) == Identity(NAME, AUTHORITIES)
    named = make.parse(make.pool(engine={"tls": {"serverName": "vllm.example"}}))
    assert identity_of(named) == Identity("vllm.example", None)


async def test_workers_are_believed_by_the_authorities_of_the_config_map(asking, ca):
    clients, maps, _ = asking
    maps.trust(ca)
    async with (
        https_worker(ca) as server,
        https_worker(ca, "other.svc") as misnamed,
        https_worker(trustme.CA()) as stranger,
    ):
        assert await status(clients, server.port) == 200
        assert await status(clients, misnamed.port) == 0
        assert await status(clients, stranger.port) == 0
        assert await status(clients, server.port, Identity(NAME, None)) == 0  # the system does not know this authority
        assert misnamed.asked == stranger.asked == []
    assert maps.reads == 1


async def test_nobody_is_believed_until_the_config_map_is_there(asking, ca, caplog):
    clients, maps, clock = asking
    async with https_worker(ca) as server:
        assert await status(clients, server.port) == 0
        assert "ConfigMap default/llama-ca has no key ca.crt" in caplog.text
        maps.trust(ca)
        assert await status(clients, server.port) == 0  # not asked for at every question
        clock.now += RETRY_S
        assert await status(clients, server.port) == 200


async def test_renewed_authorities_are_taken_and_faults_leave_the_old_ones(asking, ca, caplog):
    clients, maps, clock = asking
    newer = trustme.CA()
    maps.trust(ca)
    async with https_worker(ca) as server, https_worker(newer) as renewed:
        assert await status(clients, server.port) == 200
        for fault in ({"ca.crt": "nothing"}, {"other": "x"}):
            maps.data = fault
            clock.now += KEEP_S
            assert await status(clients, server.port) == 200
        maps.error = ApiError(503, "", "away")
        clock.now += KEEP_S
        assert await status(clients, server.port) == 200
        maps.error = None
        maps.trust(newer)
        clock.now += RETRY_S
        assert await status(clients, renewed.port) == 200
        assert await status(clients, server.port) == 0
    assert "no PEM certificates" in caplog.text
    assert "cannot be read" in caplog.text


async def test_adapters_get_into_workers_that_serve_https(make, metrics, ca):
    world, maps = World(), ConfigMaps()
    maps.trust(ca)
    async with https_worker(ca) as server:
        pool = make.pool(adapters=[{"name": "sql", "uri": "my-org/sql"}], engine={"port": server.port, "tls": TLS})
        for version, manifest in enumerate((pool, make.worker_pod("w1", "127.0.0.1"))):
            manifest["metadata"] |= {"resourceVersion": str(version), "uid": f"u{version}", "generation": version}
            world.put(manifest)
        loader = AdapterLoader(world, lambda key: None, metrics, maps, eager_s=0.005)
        task = asyncio.create_task(loader.run())
        try:
            await poll(lambda: world.adapters.get(("default", "w1")) == WorkerAdapters({"sql": "my-org/sql"}))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert "/v1/load_lora_adapter" in server.asked


async def test_metrics_of_workers_are_scraped_over_https(asking, ca):
    clients, maps, _ = asking
    maps.trust(ca)
    reader = RouterReader()
    async with https_worker(ca) as server:
        url = f"https://127.0.0.1:{server.port}"
        client = await clients.of(Identity(NAME, AUTHORITIES))
        page = await reader._scrape(url, {"vllm:num_requests_running"}, client)
        assert page == {"vllm:num_requests_running": [({}, 3.0)]}
        unasked = await reader._scrape(url, {"vllm:num_requests_running"})
        assert isinstance(unasked, FetchError)
    await reader.aclose()
