"""One HTTP answer, bounded in time and size. Every way it can go wrong becomes a FetchError that says what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import httpx

HEADERS: Final = {"accept-encoding": "identity", "user-agent": "kvfleet-autoscaler"}
"""No compression: a few kilobytes could unpack to gigabytes."""

ERROR_BYTES: Final = 4096
"""As much of an error's body is read as its message may need."""


class FetchError(Exception):
    """No usable answer. `status` where there was one, with the first bytes of its `body`."""

    def __init__(self, message: str, status: int | None = None, body: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.body = body


async def fetch(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    timeout_s: float,
    max_bytes: int,
    headers: Mapping[str, str] | None = None,
    form: Mapping[str, str] | None = None,
    extensions: Mapping[str, Any] | None = None,
) -> bytes:
    """The body of a 2xx answer. `timeout_s` covers everything from connecting to the last byte. `extensions`: httpx's."""
    try:
        async with asyncio.timeout(timeout_s):
            sent = {**HEADERS, **(headers or {})}
            request = client.stream(method, url, headers=sent, data=form, extensions=dict(extensions or {}))
            async with request as response:
                body = await _read(response, max_bytes)
    except TimeoutError as error:
        raise FetchError(f"{url} did not answer within {timeout_s:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchError(f"{url}: {error or type(error).__name__}") from error
    if response.is_redirect:
        raise FetchError(
            f"{url} redirects to {response.headers.get('location', '')[:200]!r}: use that URL", response.status_code
        )
    if not response.is_success:
        raise FetchError(f"{url} answered {response.status_code}", response.status_code, body)
    return body


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    """The body; of an answer that is no success only its beginning."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise FetchError(f"{response.url} answered compressed although it was asked not to", response.status_code)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if not response.is_success and len(body) >= ERROR_BYTES:
            return bytes(body[:ERROR_BYTES])
        if len(body) > max_bytes:
            raise FetchError(f"{response.url} answered more than {max_bytes} bytes", response.status_code)
    return bytes(body)
