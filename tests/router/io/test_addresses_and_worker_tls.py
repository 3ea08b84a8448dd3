"""Where the router listens (IPv6, Unix sockets), and workers that are spoken to by TLS."""

import asyncio
import socket
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
import pytest
from scripted import (
    STREAM_END,
    STREAM_HEAD,
    Bench,
    ScriptedWorker,
    Seen,
    chat_body,
    completion,
    event,
    eventually,
    fleet,
    json_answer,
    post,
)

from kvfleet_api.compile import static_fleet
from kvfleet_router.app import RouterApp
from kvfleet_router.io.server import addresses_text
from kvfleet_router.io.tls import CertificateRejected, WorkerTrust

CERTIFICATES = Path(__file__).parent / "certificates"
"""`a` and `b`: self-signed for localhost."""


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def started(bench: Bench, *workers: ScriptedWorker, **options: object) -> RouterApp:
    router = RouterApp(fleet(workers), **options)  # type: ignore[arg-type]
    await router.start()
    bench.on_close(router.stop, 0.0)
    return router


# Addresses


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_ipv6(bench: Bench, host: str) -> None:
    router = await started(bench, await bench.worker(), host=host, admin_host="127.0.0.1")
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"http://[::1]:{router.port}/v1/chat/completions", content=chat_body())
    assert answer.json() == completion()


async def test_a_unix_socket_beside_a_port(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "router.sock"
    router = await started(bench, await bench.worker(), host=f"127.0.0.1,unix:{path}", admin_host="127.0.0.1")
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
        assert (await client.post("http://r/v1/chat/completions", content=chat_body())).json() == completion()
    assert (await bench.ask(router, post(chat_body()))).status == 200
    reader, writer = await asyncio.open_unix_connection(path)
    await router.stop(0.0)
    assert await reader.read() == b""
    writer.close()


async def test_a_socket_left_behind_is_taken_over(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "router.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    await started(bench, await bench.worker(), host=f"unix:{path}", admin_host="127.0.0.1")
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
        assert (await client.get("http://r/health")).status_code == 200


def test_an_address_that_cannot_be_had_ends_the_router() -> None:
    command = [
        sys.executable,
        "-m",
        "kvfleet",
        "router",
        "--workers",
        "http://127.0.0.1:1",
        "--admin-host",
        "127.0.0.1",
    ]
    command += ["--host", "unix:/nowhere/router.sock", "--admin-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "cannot listen: [Errno 2] /nowhere/router.sock" in done.stderr


def test_addresses_are_written_as_people_do() -> None:
    assert addresses_text("0.0.0.0,::1,unix:/run/x", 80) == "0.0.0.0:80, [::1]:80, unix:/run/x"


# TLS to workers


@dataclass
class TlsWorker(ScriptedWorker):
    certificate: str = "a"
    host: str = "localhost"

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    async def start(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATES / f"{self.certificate}.crt", CERTIFICATES / f"{self.certificate}.key")
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]


async def tls_worker(bench: Bench, **options: str) -> TlsWorker:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if seen.line.startswith(b"GET"):
            writer.write(json_answer({"object": "list", "data": [{"id": "secret-model", "object": "model"}]}))
        elif b'"stream":true' in seen.body:
            for piece in (STREAM_HEAD, *[event("x" * 50_000)] * 40, STREAM_END):
                writer.write(piece)
                await writer.drain()
        else:
            writer.write(json_answer(completion()))

    worker = TlsWorker(behave, **options)
    await worker.start()
    bench.on_close(worker.stop)
    return worker


async def test_workers_are_spoken_to_by_tls(bench: Bench) -> None:
    worker = await tls_worker(bench)
    router = await started(bench, worker, worker_trust=WorkerTrust(CERTIFICATES / "a.crt"))
    client = await bench.client(router)
    for _ in range(3):
        await client.send(post(chat_body()))
        assert (await client.answer()).json() == completion()
    await client.send(post(chat_body(stream=True)))
    assert (await client.answer()).body.count(b"x" * 50_000) == 40
    assert worker.connections == 1
    assert worker.requests[0].header("host") == f"localhost:{worker.port}".encode()
    models = await bench.ask(router, b"GET /v1/models HTTP/1.1\r\nHost: r\r\n\r\n")
    assert [model["id"] for model in models.json()["data"]] == ["secret-model"]


async def test_a_worker_nobody_vouches_for_is_none(bench: Bench) -> None:
    worker = await tls_worker(bench, certificate="b")
    router = await started(bench, worker, worker_trust=WorkerTrust(CERTIFICATES / "a.crt"))
    answer = await bench.ask(router, post(chat_body()))
    assert (answer.status, answer.json()["error"]["code"]) == (503, "no_worker_available")
    assert not worker.requests


async def test_the_certificate_must_be_for_the_address_or_the_name_given(bench: Bench) -> None:
    worker = await tls_worker(bench, host="127.0.0.1")
    strict = await started(bench, worker, worker_trust=WorkerTrust(CERTIFICATES / "b.crt"))
    assert (await bench.ask(strict, post(chat_body()))).status == 503
    named = await started(bench, worker, worker_trust=WorkerTrust(CERTIFICATES / "a.crt", "localhost"))
    assert (await bench.ask(named, post(chat_body()))).status == 200
    models = await bench.ask(named, b"GET /v1/models HTTP/1.1\r\nHost: r\r\n\r\n")
    assert len(models.json()["data"]) == 1
    other = await started(bench, worker, worker_trust=WorkerTrust(CERTIFICATES / "a.crt", "elsewhere.example"))
    assert (await bench.ask(other, post(chat_body()))).status == 503


async def test_renewed_authorities_are_taken(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "ca.crt"
    file.write_bytes((CERTIFICATES / "b.crt").read_bytes())
    trust = WorkerTrust(file)
    router = await started(bench, await tls_worker(bench), worker_trust=trust)
    assert (await bench.ask(router, post(chat_body()))).status == 503
    file.write_bytes((CERTIFICATES / "a.crt").read_bytes())

    old = trust.context
    await eventually(lambda: trust.context is not old)
    assert (await bench.ask(router, post(chat_body()))).status == 200
    file.write_text("nothing")
    trust.reload()
    assert (await bench.ask(router, post(chat_body()))).status == 200


async def test_a_worker_that_speaks_no_tls_costs_a_try(bench: Bench) -> None:
    plain = await bench.worker()
    good = await tls_worker(bench)
    config = static_fleet([f"https://localhost:{plain.port}", good.url], "round_robin", None)
    router = RouterApp(config, worker_trust=WorkerTrust(CERTIFICATES / "a.crt"))
    await router.start()
    bench.on_close(router.stop, 0.0)
    for _ in range(4):
        assert orjson.loads((await bench.ask(router, post(chat_body()))).body) == completion()
    await eventually(lambda: len(good.requests) == 4)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("nothing")
    for name in ("empty", "missing"):
        with pytest.raises(CertificateRejected, match=name):
            WorkerTrust(tmp_path / name)
