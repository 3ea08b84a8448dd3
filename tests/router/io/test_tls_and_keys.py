"""Who may send requests, and that nobody else reads them."""

import asyncio
import hashlib
import ssl
from pathlib import Path

import httpx
import pytest
from scripted import (
    STREAM_END,
    STREAM_HEAD,
    Bench,
    ScriptedWorker,
    Seen,
    answer_ok,
    chat_body,
    event,
    eventually,
    fleet,
    post,
)

from kvfleet_api.fleetrouter import LimitsSpec
from kvfleet_router.app import RouterApp, run_router
from kvfleet_router.io.auth import ApiKeys, Authenticator, KeysRejected
from kvfleet_router.io.connection import ClientConnection
from kvfleet_router.io.files import WatchedFiles
from kvfleet_router.io.request import Request
from kvfleet_router.io.server import Server
from kvfleet_router.io.tls import Certificate, CertificateRejected

CERTIFICATES = Path(__file__).parent / "certificates"
"""`a` and `b`: self-signed for localhost until 2126, each with its key."""


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def name_of(keys: ApiKeys, key: bytes) -> str | None:
    account = keys.account_of(key)
    return None if account is None else account.name


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who\n\nalice:{digest('key-a')}\n  bob:{digest('key-b').upper()}  \n")
    return path


async def started(bench: Bench, worker: ScriptedWorker, **options: object) -> RouterApp:
    router = RouterApp(fleet([worker]), **options)  # type: ignore[arg-type]
    await router.start()
    bench.on_close(router.stop, 0.0)
    return router


async def test_a_key_lets_in_and_goes_no_further(bench: Bench, keys_file: Path) -> None:
    worker = await bench.worker()
    router = await started(bench, worker, api_keys=ApiKeys(keys_file))
    client = await bench.client(router)
    for header in (b"Authorization: Bearer key-a", b"authorization: bearer  key-b", b"X-API-Key: key-a"):
        await client.send(post(chat_body(), header))
        assert (await client.answer()).status == 200
    for seen in worker.requests:
        assert seen.header("authorization") is None
        assert seen.header("x-api-key") is None


async def test_the_key_names_the_tenant_whatever_the_client_says(bench: Bench, keys_file: Path) -> None:
    tenants = []

    class Spy:
        def handle(self, request: Request, connection: ClientConnection) -> None:
            tenants.append(request.headers[b"x-tenant-id"])
            connection.reply(200, b"")

    server = Server(Authenticator(Spy(), ApiKeys(keys_file)), LimitsSpec())
    port = await server.listen("127.0.0.1", 0)
    bench.on_close(server.drain, 0.0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for key in ("key-a", "key-b"):
            headers = {"authorization": f"Bearer {key}", "x-tenant-id": "mallory"}
            assert (await client.get("/", headers=headers)).status_code == 200
    assert tenants == [b"alice", b"bob"]


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (b"Authorization: Bearer wrong",),
        (b"Authorization: Basic key-a",),
        (b"Authorization: Bearer",),
        (b"X-API-Key:",),
    ],
)
async def test_without_a_key_nothing_is_served(bench: Bench, keys_file: Path, headers: tuple[bytes, ...]) -> None:
    worker = await bench.worker()
    router = await started(bench, worker, api_keys=ApiKeys(keys_file))
    client = await bench.client(router)
    for path in (b"/v1/chat/completions", b"/v1/models", b"/nowhere"):
        await client.send(post(chat_body(), *headers, path=path))
        answer = await client.answer()
        assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.header("www-authenticate") == "Bearer"
    await client.send(b"GET /health HTTP/1.1\r\nHost: r\r\n\r\n")
    assert (await client.answer()).status == 200
    assert not worker.requests
    assert (await bench.metrics(router))['kvfleet_router_bad_requests_total{cause="invalid_api_key"}'] == 3


async def test_changed_keys_are_taken_and_bad_ones_are_not(
    bench: Bench, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(keys_file)
    following = asyncio.create_task(WatchedFiles(keys_file).follow(keys.reload, poll_s=0.005))
    write(keys_file, f"carol:{digest('key-c')}\n")
    await eventually(lambda: name_of(keys, b"key-c") == "carol")
    assert name_of(keys, b"key-a") is None
    write(keys_file, "carol key-c\n")
    await eventually(lambda: "line 1" in caplog.text)
    assert name_of(keys, b"key-c") == "carol"
    assert "key-c" not in caplog.text
    following.cancel()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no key"),
        ("# none\n", "holds no key"),
        ("a:b\n", "line 1"),
        ("a b:" + "0" * 64, "line 1"),
        ("\xff", "keys"),
    ],
)
def test_bad_key_files_are_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(KeysRejected, match=problem):
        ApiKeys(path)
    with pytest.raises(KeysRejected, match="No such file"):
        ApiKeys(tmp_path / "missing")


def trusting(name: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=CERTIFICATES / f"{name}.crt")


def copy_certificate(name: str, to: Path) -> tuple[Path, Path]:
    for kind in ("crt", "key"):
        (to / f"tls.{kind}").write_bytes((CERTIFICATES / f"{name}.{kind}").read_bytes())
    return to / "tls.crt", to / "tls.key"


async def get_health(router: RouterApp, trusted: str) -> int:
    async with httpx.AsyncClient(verify=trusting(trusted)) as client:
        return (await client.get(f"https://localhost:{router.port}/health")).status_code


async def test_clients_are_served_by_tls(bench: Bench, tmp_path: Path) -> None:
    async def behave(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b'"stream":true' not in seen.body:
            await answer_ok(seen, reader, writer)
            return
        for piece in (STREAM_HEAD, *[event("x" * 50_000)] * 100, STREAM_END):
            writer.write(piece)
            await writer.drain()

    router = await started(bench, await bench.worker(behave), certificate=Certificate(*copy_certificate("a", tmp_path)))
    async with httpx.AsyncClient(verify=trusting("a"), base_url=f"https://localhost:{router.port}") as client:
        for _ in range(2):
            assert (await client.post("/v1/chat/completions", content=chat_body())).json()["choices"]
        answer = await client.post("/v1/chat/completions", content=chat_body(stream=True))
        assert answer.content.count(b"x" * 50_000) == 100
        too_large = await client.post("/v1/chat/completions", content=b"x" * 40_000_000)
        assert too_large.status_code == 413
    assert await bench.ask(router, b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n", admin=True), (
        "the admin port stays as it is"
    )


async def test_without_tls_a_tls_port_answers_nothing(bench: Bench, tmp_path: Path) -> None:
    router = await started(bench, await bench.worker(), certificate=Certificate(*copy_certificate("a", tmp_path)))
    client = await bench.client(router)
    await client.send(post(chat_body()))
    assert b"HTTP/1.1" not in await client.closed()


async def test_a_renewed_certificate_is_taken_and_a_mismatched_one_is_not(tmp_path: Path, bench: Bench) -> None:
    certificate = Certificate(*copy_certificate("a", tmp_path))
    router = await started(bench, await bench.worker(), certificate=certificate)
    assert await get_health(router, "a") == 200
    (tmp_path / "tls.crt").write_bytes((CERTIFICATES / "b.crt").read_bytes())  # a renewal seen half-way
    certificate.reload()
    assert await get_health(router, "a") == 200
    copy_certificate("b", tmp_path)
    certificate.reload()
    assert await get_health(router, "b") == 200
    with pytest.raises(httpx.ConnectError):
        await get_health(router, "a")


def test_bad_certificates_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(CertificateRejected, match="missing"):
        Certificate(tmp_path / "missing.crt", tmp_path / "missing.key")
    with pytest.raises(CertificateRejected, match="give a PEM chain"):
        Certificate(tmp_path / "empty", tmp_path / "empty")


def test_a_router_with_unusable_files_ends_with_code_2(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"host": "127.0.0.1", "port": 0, "admin_host": "127.0.0.1", "admin_port": 0}
    for files in (
        {"api_keys_file": tmp_path / "none"},
        {"tls_cert": tmp_path / "none", "tls_key": tmp_path / "none"},
        {"tls_cert": tmp_path},
    ):
        assert run_router(fleet([]), **options, **files) == 2  # type: ignore[arg-type]
    assert caplog.text.count("cannot be started") == 3
