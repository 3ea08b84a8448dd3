"""A worker's circuit breaker: closed → open after consecutive failures → probation after a pause → closed or open again.

It opens as well for a worker that fails too large a share of its latest requests, though never so many in a row (an outlier);
such a one is not forgiven by a single success: the next failure opens it again, for longer.
On probation one request at a time is let through; its success closes the circuit, its failure opens it for twice as long.
Where the worker can be asked whether it is well (`probe_path`), probation begins when it says so and not by time alone.
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
    __slots__ = ("_failures", "_pause_s", "_share", "on_probation", "open_until", "probe_path", "probe_told", "probing")

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._share = 0.0
        """Of its latest requests, those that failed."""
        self.open_until: float | None = None
        """While open: when probation, or the next probe, may begin."""
        self.on_probation = False
        self.probe_path = ""
        """Where to ask whether it is well, before a request is risked; empty: nobody asks."""
        self.probing = False
        """It is being asked."""
        self.probe_told = ""
        """What it said last since it was ejected."""

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
        self.on_probation = self.probing = False
        self.probe_told = ""
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

    def begin_probe(self, now: float) -> bool:
        """True: it is to be asked now; `probed` has to follow."""
        if self.probing or self.open_until is None or now < self.open_until:
            return False
        self.probing = True
        return True

    def probed(self, now: float, healthy: bool, pause_s: float, told: str) -> bool:
        """It was asked; not healthy: it is asked again after `pause_s`. True: probation has just begun."""
        if not self.probing:  # it has been ejected anew since: this says nothing of that
            return False
        self.probing = False
        self.probe_told = told
        if healthy:
            return self.elapsed(float("inf"))
        if self.open_until is not None:  # else a request was answered meanwhile: that counts more
            self.open_until = now + pause_s
        return False

    def elapsed(self, now: float) -> bool:
        """Let probation begin if the pause is over. True: it has just begun."""
        if self.open_until is None or now < self.open_until:
            return False
        self.open_until = None
        self.on_probation = True
        return True
