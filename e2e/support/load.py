"""Requests that come when they come, whether or not the ones before were answered: the load of many independent users.

`arrivals` turns a rate into times, `offered` sends one streamed request at each of them. The client reads bytes, not
events, so that it costs little beside the fleet it loads.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from support.manifests import MODEL

STEP_S: Final = 0.01
LIMIT_S: Final = 120.0
"""A request that has not ended by then has failed."""


@dataclass(frozen=True)
class Answer:
    """What became of one request. Times are Unix seconds."""

    sent_at: float
    first_byte_s: float | None
    """From sending it to the first byte of its answer's body."""
    wrong: str
    """Why it is no whole stream; empty: it is."""


def arrivals(rate: Callable[[float], float], seconds: float) -> list[float]:
    """Times from 0 to `seconds`, evenly spread for the rate (requests/s) at each of them."""
    found, due = [], 0.0
    for step in range(round(seconds / STEP_S)):
        due += rate(step * STEP_S) * STEP_S
        if due >= 1:
            due -= 1
            found.append(step * STEP_S)
    return found


def offered(url: str, at_s: Sequence[float], tokens: int) -> list[Answer]:
    """Sends a request at each time from now on; returns once all of them have ended."""

    async def send_all() -> list[Answer]:
        began = time.monotonic()
        sending = []
        for number, moment in enumerate(at_s):
            await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
            sending.append(asyncio.create_task(_one(url, number, tokens)))
        return await asyncio.gather(*sending)

    return asyncio.run(send_all())


async def _one(url: str, number: int, tokens: int) -> Answer:
    sent_at, began = time.time(), time.monotonic()
    first_byte_s: float | None = None
    received = b""
    try:
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port or 80)
            try:
                writer.write(_request(url, number, tokens))
                head = await reader.readuntil(b"\r\n\r\n")
                while piece := await reader.read(65_536):
                    first_byte_s = first_byte_s or time.monotonic() - began
                    received = (received + piece)[-4096:]
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        return Answer(sent_at, first_byte_s, repr(error))
    status = head.split(b" ", 2)[1].decode()
    whole = status == "200" and b"data: [DONE]" in received and b'"error"' not in received
    return Answer(sent_at, first_byte_s, "" if whole else f"{status}: {received[-300:].decode(errors='replace')}")


def _request(url: str, number: int, tokens: int) -> bytes:
    messages = [{"role": "user", "content": f"Request number {number}"}]
    fields = {"model": MODEL, "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body = json.dumps(fields).encode()
    place = urlsplit(url)
    head = (
        f"POST {place.path} HTTP/1.1\r\nhost: {place.netloc}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    )
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
