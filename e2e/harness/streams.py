"""Streamed chat completions that go on in the background while a test changes the cluster, and what became of each.

A stream counts as whole only if it was answered with 200, brought every token it was asked for, said so in its usage, gave
`length` as the reason of its end, and ended with `[DONE]`: an answer that a leaving worker cut short is a failure.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

PAUSE_S = 0.02
SILENCE_S = 30
"""A stream without a byte for so long has failed."""


@dataclass(frozen=True)
class Stream:
    """A whole one. Times are of time.monotonic()."""

    worker: str
    started: float
    ended: float


@dataclass
class Streams:
    """Grows while its `with` block lasts."""

    whole: list[Stream] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def since(self, moment: float) -> list[Stream]:
        return [stream for stream in self.whole if stream.started >= moment]

    def workers_since(self, moment: float) -> set[str]:
        return {stream.worker for stream in self.since(moment)}

    def _send(self, url: str, model: str, tokens: int, number: int) -> None:
        with httpx.Client(timeout=SILENCE_S) as client:
            for turn in count():
                if self._stop.wait(PAUSE_S):
                    return
                try:
                    self.whole.append(_stream(client, url, model, tokens, f"sender {number}, request {turn}"))
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self.failures.append(f"{tokens} tokens, after {time.monotonic():.2f}: {error!r}")


@contextmanager
def streams(url: str, model: str, tokens: tuple[int, ...]) -> Iterator[Streams]:
    """One sender for each number of tokens, one request after another in each, until the block ends."""
    result = Streams()
    threads = [
        threading.Thread(target=result._send, args=(url, model, length, number)) for number, length in enumerate(tokens)
    ]
    for thread in threads:
        thread.start()
    try:
        yield result
    finally:
        result._stop.set()
        for thread in threads:
            thread.join()


def _stream(client: httpx.Client, url: str, model: str, tokens: int, text: str) -> Stream:
    """Raises ValueError or httpx.HTTPError for what is not whole."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    with client.stream("POST", url, json=body) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code}: {answer.read().decode(errors='replace')[:300]}")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        worker = answer.headers["x-kvfleet-worker"]
    if not events or events.pop() != "[DONE]":
        raise ValueError(f"{worker}: the stream ended without [DONE]")
    chunks = [json.loads(event) for event in events]
    ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    told = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    if ends != ["length"] or told[-1:] != [tokens]:
        raise ValueError(f"{worker}: ended with {ends} after {told} of {tokens} tokens, {len(chunks)} events")
    return Stream(worker, started, time.monotonic())
