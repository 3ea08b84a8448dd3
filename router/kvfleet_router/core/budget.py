"""How many tries on other workers a policy may add to its requests: a share of them, so that a failing fleet is not hit by a storm.

Requests and retries are counted in two slots of time, the one at hand and the one before; retries are allowed while there are
fewer of them than the share of the requests, plus RESERVE. A worker that dies with all it had in flight stays within a budget
of 100 %: each of its requests was counted once. (Envoy and Finagle have budgets alike; those shares are of what is active, or 20 %.)
"""

from __future__ import annotations

SLOT_S = 30.0
RESERVE = 100
"""Retries in two slots that need no requests: where there are few, a share of them is nothing."""


class RetryBudget:
    __slots__ = ("_before", "_requests", "_retries", "_share", "_until")

    def __init__(self, share: float) -> None:
        self._share = share
        self._requests = self._retries = 0
        self._before = (0, 0)
        """(requests, retries) of the slot before."""
        self._until = 0.0
        """When the slot at hand ends."""

    def request(self, now: float) -> None:
        if now >= self._until:
            self._next_slot(now)
        self._requests += 1

    def allows(self, now: float) -> bool:
        """Whether one more retry may be made."""
        if now >= self._until:
            self._next_slot(now)
        requests, retries = self._before
        return retries + self._retries < self._share * (requests + self._requests) + RESERVE

    def retry(self) -> None:
        self._retries += 1

    def _next_slot(self, now: float) -> None:
        recent = now < self._until + SLOT_S
        self._before = (self._requests, self._retries) if recent else (0, 0)
        self._requests = self._retries = 0
        self._until = now + SLOT_S
