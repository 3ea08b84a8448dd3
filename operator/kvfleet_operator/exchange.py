"""One HTTP request to a pod of ours, its answer bounded in time and size."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import httpx

MAX_BYTES: Final = 4 * 2**20


class NoAnswer(Exception):
    """The pod did not answer, or with more than can be meant."""


async def exchange(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    timeout_s: float,
    json: Mapping[str, str] | None = None,
    max_bytes: int = MAX_BYTES,
    extensions: Mapping[str, Any] | None = None,
) -> tuple[int, bytes]:
    """(status, body). `timeout_s` covers everything from connecting to the last byte. `extensions`: httpx's. Raises NoAnswer."""
    body = bytearray()
    try:
        request = client.stream(method, url, json=json, timeout=None, extensions=dict(extensions or {}))
        async with asyncio.timeout(timeout_s), request as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > max_bytes:
                    raise NoAnswer(f"{url} answered more than {max_bytes} bytes")
    except TimeoutError as error:
        raise NoAnswer(f"{url} did not answer within {timeout_s:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoAnswer(f"{url}: {error or type(error).__name__}") from error
    return response.status_code, bytes(body)


def base_url(ip: str, port: int, *, tls: bool = False) -> str:
    scheme = "https" if tls else "http"
    return f"{scheme}://[{ip}]:{port}" if ":" in ip else f"{scheme}://{ip}:{port}"
