"""A keyed queue: each key at most once in it, at most one worker on a key, bursts gathered, failures retried later.

`add` while a key waits changes nothing but may bring it forward; `add` while it is worked on brings it back once that is
done. Failures of a key are retried with doubling, jittered delays until a success, or at once when it changed meanwhile.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_RETRY_S: Final = 0.5
LAST_RETRY_S: Final = 300.0


class WorkQueue(Generic[K]):
    def __init__(self, *, debounce_s: float = 0.1, rng: random.Random | None = None) -> None:
        self._debounce_s = debounce_s
        self._rng = rng or random.Random()
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = 0
        self._active: set[K] = set()
        self._again: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is worked on."""
        return not self._due and not self._active

    def add(self, key: K, delay_s: float | None = None) -> None:
        """Have `key` handled after `delay_s` (default: the debounce time), or earlier if it waits already."""
        due = asyncio.get_running_loop().time() + (self._debounce_s if delay_s is None else delay_s)
        if key in self._active:
            self._again[key] = min(due, self._again.get(key, due))
            return
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._order += 1
            heapq.heappush(self._heap, (due, self._order, key))
            self._changed.set()

    async def get(self) -> K:
        """The next key that is due. `done` must follow."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            wait_s = self._wait_s(loop.time())
            if wait_s is not None and wait_s <= 0:
                return self._take()
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def done(self, key: K, *, failed: bool = False) -> None:
        """The worker is through with `key`."""
        self._active.discard(key)
        again = self._again.pop(key, None)
        if failed:
            count = self._failures.get(key, 0)
            self._failures[key] = count + 1
            delay_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(count, 20)) * self._rng.uniform(0.75, 1.25)
            self.add(key, delay_s)
        else:
            self._failures.pop(key, None)
        if again is not None:
            self.add(key, max(0.0, again - asyncio.get_running_loop().time()))

    def _wait_s(self, now: float) -> float | None:
        """Seconds until the next key is due; drops heap entries that were brought forward since."""
        while self._heap:
            due, _order, key = self._heap[0]
            if self._due.get(key) == due:
                return due - now
            heapq.heappop(self._heap)
        return None

    def _take(self) -> K:
        _due, _order, key = heapq.heappop(self._heap)
        del self._due[key]
        self._active.add(key)
        if self._heap:
            self._changed.set()  # another worker may wait for the next one
        return key
