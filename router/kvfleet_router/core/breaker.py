"""A worker's circuit breaker: closed → open after consecutive failures → probation after a pause → closed or open again.

It opens as well for a worker that fails too large a share of its latest requests, though never so many in a row (an outlier);
such a one is not forgiven by a single success: the next failure opens it again, for longer.
On probation one request at a time is let through; its success closes the circuit, its failure opens it for twice as long.
"""

from __future__ import annotations

from typing import Final

MAX_CONSECUTIVE_FAILURES: Final = 3
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
SHARE_WEIGHT: Final = 0.1
"""Of the latest request in the share of failures: about the last ten count."""
RECOVERED_SHARE: Final = 0.25
"""Below it, past pauses are forgotten."""


class Breaker:
    __slots__ = ("_failures", "_pause_s", "_share", "on_probation", "open_until")

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._share = 0.0
        """Of its latest requests, those that failed."""
        self.open_until: float | None = None
        """While open: when probation begins."""
        self.on_probation = False

    def failure(self, now: float, eject_at: float = 1.0) -> bool:
        """A request failed by the worker's fault. `eject_at`: share of failures to open at. True: the circuit has just opened."""
        self._failures += 1
        self._share += SHARE_WEIGHT * (1.0 - self._share)
        if self.open_until is not None:
            return False
        if self._failures < MAX_CONSECUTIVE_FAILURES and not self.on_probation and self._share < eject_at:
            return False
        self.open_until = now + self._pause_s
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        self.on_probation = False
        return True

    def success(self, whole: bool = True) -> bool:
        """A request was answered; not `whole`: so far, it began. True: the circuit has just closed."""
        closed = self.on_probation or self.open_until is not None
        self._failures = 0
        if whole:
            self._share *= 1.0 - SHARE_WEIGHT
        if self._share < RECOVERED_SHARE:
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
