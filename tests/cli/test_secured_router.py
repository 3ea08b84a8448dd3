"""`kvfleet router` with TLS and API keys, as the operator starts it."""

import asyncio
import hashlib
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

import httpx

CERTIFICATES = Path(__file__).parents[1] / "router/io/certificates"


async def test_clients_are_served_by_tls_and_asked_for_a_key(
    tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    port, admin_port = unused_tcp_port_factory(), unused_tcp_port_factory()
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{hashlib.sha256(b'secret').hexdigest()}\n")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvfleet", "router", "--workers", "http://127.0.0.1:1", "--host", "127.0.0.1",
        "--port", str(port), "--admin-port", str(admin_port), "--api-keys-file", str(keys),
        "--tls-cert", str(CERTIFICATES / "a.crt"), "--tls-key", str(CERTIFICATES / "a.key"),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            while b"serving on" not in (line := await process.stderr.readline()):
                assert line, "it ended before it served"
        trusted = ssl.create_default_context(cafile=str(CERTIFICATES / "a.crt"))
        async with httpx.AsyncClient(verify=trusted, trust_env=False) as client:
            url = f"https://localhost:{port}/v1/models"
            assert (await client.get(url)).status_code == 401
            assert (await client.get(url, headers={"authorization": "Bearer secret"})).status_code == 200
    finally:
        process.terminate()
        await process.communicate()
