"""Streamed chat completions that go on in the background while a test changes the cluster, and what became of each.

A stream counts as whole only if it was answered with 200, brought every token it was asked for (each is a word of the
simulated model), said so in its usage, gave `length` as the reason of its end, and ended with `[DONE]`: an answer that a
leaving worker cut short is a failure.
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


@dataclass(frozen=True)
class Failure:
    """One that is not whole, and how its end looked to the client."""

    started: float
    told: str
    """The message of the error event that ended it; empty: it ended without one."""
    events: int
    """That came before."""
    what: str


class BrokenStreamError(ValueError):
    """A stream that is not whole."""

    def __init__(self, what: str, events: int = 0, told: str = "") -> None:
        super().__init__(what)
        self.events, self.told = events, told


@dataclass
class Streams:
    """Grows while its `with` block lasts."""

    whole: list[Stream] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
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
                started = time.monotonic()
                try:
                    self.whole.append(_stream(client, url, model, tokens, f"sender {number}, request {turn}"))
                except BrokenStreamError as error:
                    self.failures.append(Failure(started, error.told, error.events, f"{tokens} tokens: {error}"))
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self.failures.append(Failure(started, "", 0, f"{tokens} tokens: {error!r}"))


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
    """Raises BrokenStreamError for what is not whole, httpx.HTTPError where the connection fails."""
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
            raise BrokenStreamError(f"{answer.status_code}: {answer.read().decode(errors='replace')[:300]}")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        worker = answer.headers["x-kvfleet-worker"]
    if not events or events.pop() != "[DONE]":
        raise BrokenStreamError(f"{worker}: the stream ended without [DONE]", len(events))
    chunks = [json.loads(event) for event in events]
    if "error" in chunks[-1]:
        told = str(chunks[-1]["error"]["message"])
        raise BrokenStreamError(f"{worker}: an error event: {told}", len(chunks) - 1, told)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    words = len("".join(choice["delta"].get("content") or "" for choice in choices).split())
    counted = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    if ends != ["length"] or counted[-1:] != [tokens] or words != tokens:
        what = f"{worker}: ended with {ends} after {words} of {tokens} words, its usage says {counted}"
        raise BrokenStreamError(what, len(chunks))
    return Stream(worker, started, time.monotonic())
