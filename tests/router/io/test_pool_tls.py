"""Workers of a pool that serve HTTPS: found by their EndpointSlices, trusted by what their pool says."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme
from fake_api import CONFIG_MAPS, SLICES, FakeApi, config_map, endpoint_slice
from followers import Cluster, in_pool, served
from scripted import Bench, ScriptedWorker, Seen, chat_body, completion, eventually, json_answer, post

from kvfleet_api.fleetconfig import FleetConfig, WorkerTLS
from kvfleet_router.core.worker import WorkerEndpoint
from kvfleet_router.io.probing import Prober
from kvfleet_router.io.tls import CertificateRejected, WorkerTrust, WorkerTrusts

NAME = "pool-workers.inference.svc"


@dataclass
class TlsWorker(ScriptedWorker):
    """Serves HTTPS at an address that its certificate does not name."""

    context: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.context)
        self.port = self._server.sockets[0].getsockname()[1]


async def tls_worker(bench: Bench, ca: trustme.CA, name: str = NAME, client: trustme.CA | None = None) -> TlsWorker:
    """`client`: whose certificates it asks for."""

    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json_answer(completion()))

    worker = TlsWorker(behave)
    ca.issue_cert(name).configure_cert(worker.context)
    if client is not None:
        client.configure_trust(worker.context)
        worker.context.verify_mode = ssl.CERT_REQUIRED
    await worker.start()
    bench.on_close(worker.stop)
    return worker


def https_pool(**tls: str | None) -> FleetConfig:
    """`in_pool`, its workers serving HTTPS."""
    config = in_pool()
    pool = config.pools[0].model_copy(update={"tls": WorkerTLS(**{"server_name": NAME, **tls})})  # type: ignore[arg-type]
    return config.model_copy(update={"pools": [pool]})


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.crt"
    ca.cert_pem.write_to_path(str(path))
    return path


async def test_workers_found_by_slices_are_spoken_to_by_tls(
    cluster: Cluster, api: FakeApi, bench: Bench, ca: trustme.CA, ca_file: Path
) -> None:
    worker = await tls_worker(bench, ca)
    api.put(CONFIG_MAPS, config_map(https_pool(ca_path=str(ca_file))))
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    assert [known.url for known in app.dispatcher.workers()] == [f"https://127.0.0.1:{worker.port}"]
    assert await served(bench, app) == "w-0"


async def test_a_pool_turns_to_tls_and_back_while_the_router_runs(
    cluster: Cluster, api: FakeApi, bench: Bench, ca: trustme.CA, ca_file: Path
) -> None:
    secured, plain = await tls_worker(bench, ca), await bench.worker()
    api.put(CONFIG_MAPS, config_map(in_pool()))
    api.put(SLICES, endpoint_slice("w-0", plain.port))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    assert await served(bench, app) == "w-0"
    api.put(SLICES, endpoint_slice("w-0", secured.port))
    api.put(CONFIG_MAPS, config_map(https_pool(ca_path=str(ca_file))))
    await eventually(lambda: [known.url for known in app.dispatcher.workers()] == [f"https://127.0.0.1:{secured.port}"])
    assert await served(bench, app) == "w-0"
    assert len(secured.requests) == 1
    api.put(SLICES, endpoint_slice("w-0", plain.port))
    api.put(CONFIG_MAPS, config_map(in_pool()))
    await eventually(lambda: [known.url for known in app.dispatcher.workers()] == [f"http://127.0.0.1:{plain.port}"])
    assert await served(bench, app) == "w-0"


@pytest.mark.parametrize("fault", ["another authority", "another name", "no file"])
async def test_a_worker_that_cannot_prove_itself_gets_nothing(
    cluster: Cluster,
    api: FakeApi,
    bench: Bench,
    ca: trustme.CA,
    ca_file: Path,
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    issuer = trustme.CA() if fault == "another authority" else ca
    worker = await tls_worker(bench, issuer, "elsewhere.example" if fault == "another name" else NAME)
    path = ca_file.with_name("missing.crt") if fault == "no file" else ca_file
    api.put(CONFIG_MAPS, config_map(https_pool(ca_path=str(path))))
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    answer = await bench.ask(app, post(chat_body()))
    assert (answer.status, answer.json()["error"]["code"]) == (503, "no_worker_available")
    assert not worker.requests
    assert ("missing.crt" if fault == "no file" else "certificate verify failed") in caplog.text


async def test_authorities_that_come_late_or_change_are_taken(
    cluster: Cluster, api: FakeApi, bench: Bench, ca: trustme.CA, tmp_path: Path
) -> None:
    """As the kubelet does it once the ConfigMap is there."""
    file = tmp_path / "late" / "ca.crt"
    worker = await tls_worker(bench, ca)
    api.put(CONFIG_MAPS, config_map(https_pool(ca_path=str(file))))
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    assert (await bench.ask(app, post(chat_body()))).status == 503
    file.parent.mkdir()
    ca.cert_pem.write_to_path(str(file))
    trust = app._trusts.of("static")
    await eventually(lambda: trust._context is not None)
    assert await served(bench, app) == "w-0"


async def test_a_client_certificate_is_shown_where_the_pool_has_one(
    cluster: Cluster, api: FakeApi, bench: Bench, ca: trustme.CA, ca_file: Path, tmp_path: Path
) -> None:
    worker = await tls_worker(bench, ca, client=ca)
    shown = ca.issue_cert("router.inference.svc")
    folder = tmp_path / "client"
    folder.mkdir()
    shown.cert_chain_pems[0].write_to_path(str(folder / "tls.crt"))
    shown.private_key_pem.write_to_path(str(folder / "tls.key"))
    api.put(SLICES, endpoint_slice("w-0", worker.port))
    api.put(CONFIG_MAPS, config_map(https_pool(ca_path=str(ca_file))))
    app = await cluster.router()
    await eventually(lambda: not app.unready)
    assert (await bench.ask(app, post(chat_body()))).status >= 500
    api.put(CONFIG_MAPS, config_map(https_pool(ca_path=str(ca_file), client_certificate_path=str(folder))))
    await eventually(lambda: app.dispatcher.config.pools[0].tls.client_certificate_path is not None)
    assert await served(bench, app) == "w-0"


async def test_probes_trust_the_pool_too(bench: Bench, ca: trustme.CA, ca_file: Path) -> None:
    worker = await tls_worker(bench, ca)
    app = await bench.router(worker)
    app.take_config(https_pool(ca_path=str(ca_file)))
    app.take_endpoints("static", [WorkerEndpoint("w-0", f"https://127.0.0.1:{worker.port}")])
    (known,) = app.dispatcher.workers()
    for _ in range(3):
        app.dispatcher._circuits.failed(known, app.clock(), app.dispatcher.config.policies[0].resilience)
    assert known.state == "ejected"
    known.breaker.open_until = 0.0
    await eventually(lambda: known.breaker.on_probation)
    assert isinstance(app.prober, Prober)
    assert known.breaker.probe_told == "status 200"


def test_a_pool_whose_tls_is_as_it_was_keeps_its_authorities(ca_file: Path) -> None:
    trusts = WorkerTrusts(WorkerTrust())
    pools = https_pool(ca_path=str(ca_file)).pools
    trusts.configure(pools)
    first = trusts.of("static")
    assert first.context is first.context
    trusts.configure(pools)
    assert trusts.of("static") is first
    trusts.configure(https_pool(ca_path=str(ca_file), server_name="other.svc").pools)
    assert trusts.of("static").server_name == "other.svc"
    trusts.configure([])
    assert trusts.of("static").server_name is None


def test_files_that_cannot_be_used_are_named(ca_file: Path, tmp_path: Path) -> None:
    trust = WorkerTrust(ca_file, NAME, (tmp_path / "tls.crt", tmp_path / "tls.key"), later=True)
    with pytest.raises(CertificateRejected, match=r"tls\.crt and .*tls\.key: No such file"):
        _ = trust.context
