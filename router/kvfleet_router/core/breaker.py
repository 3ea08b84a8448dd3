"""A worker's circuit breaker: closed → open after consecutive failures → probation after a pause → closed or open again.

On probation one request at a time is let through; its success closes the circuit, its failure opens it for twice as long.
"""

from __future__ import annotations

MAX_CONSECUTIVE_FAILURES = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class Breaker:
    __slots__ = ("_failures", "_pause_s", "on_probation", "open_until")

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self.open_until: float | None = None
        """While open: when probation begins."""
        self.on_probation = False

    def failure(self, now: float) -> bool:
        """A request failed by the worker's fault. True: the circuit has just opened."""
        self._failures += 1
        if self.open_until is not None or (self._failures < MAX_CONSECUTIVE_FAILURES and not self.on_probation):
            return False
        self.open_until = now + self._pause_s
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        self.on_probation = False
        return True

    def success(self) -> bool:
        """A request was answered. True: the circuit has just closed."""
        closed = self.on_probation or self.open_until is not None
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self.open_until = None
        self.on_probation = False
        return closed

    def elapsed(self, now: float) -> bool:
        """Let probation begin if the pause is over. True: it has just begun."""
        if self.open_until is None or now < self.open_until:
            return False
        self.open_until = None
        self.on_probation = True
        return True
