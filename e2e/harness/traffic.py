"""Requests that go on in the background while a test changes the cluster, and what became of each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

PAUSE_S = 0.01
TIMEOUT_S = 10


@dataclass
class Traffic:
    """Answers and failures so far; grows while its `with` block lasts."""

    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def _send(self, url: str, keep_connection: bool) -> None:
        with httpx.Client(timeout=TIMEOUT_S) as client:
            headers = {} if keep_connection else {"Connection": "close"}
            while not self._stop.wait(PAUSE_S):
                try:
                    answer = client.get(url, headers=headers)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                (self.answers if answer.is_success else self.failures).append(answer.text)


@contextmanager
def traffic(url: str, senders: int = 2, keep_connection: bool = False) -> Iterator[Traffic]:
    """GETs from several threads, one after another in each, until the block ends."""
    result = Traffic()
    threads = [threading.Thread(target=result._send, args=(url, keep_connection)) for _ in range(senders)]
    for thread in threads:
        thread.start()
    try:
        yield result
    finally:
        result._stop.set()
        for thread in threads:
            thread.join()
