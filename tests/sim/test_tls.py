"""`--ssl-certfile` and its like, as vLLM has them: HTTPS, and certificates of clients where they are demanded."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from kvfleet_sim.config import ConfigError, parse
from kvfleet_sim.server import Server, main


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def files(authority: trustme.CA, directory: Path) -> list[str]:
    """What the worker is started with; `ca.pem` lies beside."""
    served = authority.issue_cert("llama-workers.default.svc")
    served.cert_chain_pems[0].write_to_path(str(directory / "tls.crt"))
    served.private_key_pem.write_to_path(str(directory / "tls.key"))
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    return [
        "--ssl-certfile",
        str(directory / "tls.crt"),
        "--ssl-keyfile",
        str(directory / "tls.key"),
        "--enable-ssl-refresh",
    ]


async def get(port: int, directory: Path, client: trustme.LeafCert | None = None) -> int:
    context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    if client is not None:
        client.configure_cert(context)
    extensions = {"sni_hostname": "llama-workers.default.svc"}
    async with httpx.AsyncClient(verify=context, trust_env=False) as http:
        return (await http.get(f"https://127.0.0.1:{port}/v1/models", extensions=extensions)).status_code


async def serve(*args: str) -> Server:
    server = Server(parse(["llama-8b", "--host", "127.0.0.1", "--port", "0", *args]))
    await server.start()
    return server


async def test_it_serves_https_and_no_http(authority: trustme.CA, tmp_path: Path) -> None:
    server = await serve(*files(authority, tmp_path))
    try:
        assert await get(server.port, tmp_path) == 200
        with pytest.raises(httpx.HTTPError):
            async with httpx.AsyncClient(trust_env=False) as http:
                await http.get(f"http://127.0.0.1:{server.port}/v1/models")
    finally:
        await server.close()


async def test_clients_must_show_a_certificate_where_it_is_demanded(authority: trustme.CA, tmp_path: Path) -> None:
    demanded = ["--ssl-ca-certs", str(tmp_path / "ca.pem"), "--ssl-cert-reqs", "2"]
    server = await serve(*files(authority, tmp_path), *demanded)
    try:
        assert await get(server.port, tmp_path, authority.issue_cert("router")) == 200
        with pytest.raises(httpx.HTTPError):
            await get(server.port, tmp_path)
    finally:
        await server.close()


def test_a_key_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ssl-keyfile and --ssl-ca-certs need --ssl-certfile"):
        parse(["--ssl-keyfile", "tls.key"])


def test_a_certificate_that_is_none_ends_the_worker_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tls.crt").write_text("nothing")
    argv = ["llama-8b", "--host", "127.0.0.1", "--port", "0", "--ssl-certfile", str(tmp_path / "tls.crt")]
    assert main(argv) != 0
    assert "tls.crt" in caplog.text
    assert "give readable PEM files" in caplog.text
