"""Several pools under one budget of GPUs or watts.

Nothing is taken from what a pool already has, as streams run there; only growth is rationed. Order of giving:
1. what a pool already runs and still wants;
2. its lower bound (minReplicas, schedule), higher priority first;
3. one worker at a time to the pool with the smallest granted share of its wish: within a priority, then by the share,
   then by joules per token, then by name.
Equal input gives equal output, and every pool that gets less than it wanted is told which limit it met.

Where the running pools themselves exceed the budget (it was lowered, or workers were added by hand), no pool grows, and
the excess is reported; `shrink=True` takes it back, from the lowest priority and the largest granted share first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit; None: no limit of that kind."""

    gpus: int | None = None
    watts: float | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """What one pool wants."""

    pool: str
    current: int
    wanted: int
    least: int = 0
    """Its lower bound."""
    gpus_per_worker: int = 1
    watts_per_worker: float = 0.0
    joules_per_token: float = 0.0
    priority: int = 0
    """Larger goes first."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What it gets."""

    pool: str
    replicas: int
    held_back_by: str | None
    """The limit it met; None where it gets what it wants."""


def allocate(claims: Sequence[Claim], budget: Budget, *, shrink: bool = False) -> list[Grant]:
    """A grant for each claim, in the order of the claims. Names of pools must differ."""
    by_name = {claim.pool: claim for claim in claims}
    if len(by_name) != len(claims):
        raise ValueError("two claims have the same pool: name each pool once")
    purse = _Purse(budget)
    granted = {claim.pool: min(claim.current, claim.wanted) for claim in claims}
    for claim in claims:
        purse.take(claim, granted[claim.pool])
    if shrink:
        _take_back(by_name, granted, purse)
    _give(by_name, granted, purse, {claim.pool: min(claim.least, claim.wanted) for claim in claims})
    _give(by_name, granted, purse, {claim.pool: claim.wanted for claim in claims})
    return [Grant(c.pool, granted[c.pool], purse.why(c) if granted[c.pool] < c.wanted else None) for c in claims]


class _Purse:
    """What is left of the budget; negative where it is exceeded."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.gpus = 0
        self.watts = 0.0

    def take(self, claim: Claim, workers: int) -> None:
        self.gpus += workers * claim.gpus_per_worker
        self.watts += workers * claim.watts_per_worker

    def affords(self, claim: Claim) -> bool:
        return self._most(claim) >= 1

    def _most(self, claim: Claim) -> float:
        """Workers of the claim's pool that can still be paid."""
        most = float("inf")
        if self.budget.gpus is not None and claim.gpus_per_worker > 0:
            most = min(most, (self.budget.gpus - self.gpus) // claim.gpus_per_worker)
        if self.budget.watts is not None and claim.watts_per_worker > 0:
            most = min(most, floor((self.budget.watts - self.watts) / claim.watts_per_worker + ROUNDING))
        return most

    @property
    def exceeded(self) -> bool:
        gpus = self.budget.gpus is not None and self.gpus > self.budget.gpus
        return gpus or (self.budget.watts is not None and self.watts > self.budget.watts * (1 + ROUNDING))

    def why(self, claim: Claim) -> str:
        """Which limit keeps one more worker of the claim's pool away."""
        limit = self.budget.gpus
        if limit is not None and limit - self.gpus < claim.gpus_per_worker:
            return f"GPU budget: {self.gpus} of {limit} are used and a worker needs {claim.gpus_per_worker}"
        drawn = f"{self.watts:.0f} of {self.budget.watts or 0:.0f} W"
        return f"power budget: {drawn} are used and a worker draws {claim.watts_per_worker:.0f}"


def _share(claim: Claim, granted: int) -> float:
    return granted / claim.wanted if claim.wanted else 1.0


def _give(claims: dict[str, Claim], granted: dict[str, int], purse: _Purse, goals: dict[str, int]) -> None:
    """One worker at a time towards the goals, as far as the purse goes."""

    def place(claim: Claim) -> tuple[int, float, float, str]:
        return (-claim.priority, _share(claim, granted[claim.pool]), claim.joules_per_token, claim.pool)

    waiting = [place(claim) for claim in claims.values() if granted[claim.pool] < goals[claim.pool]]
    heapq.heapify(waiting)
    while waiting:
        claim = claims[heapq.heappop(waiting)[-1]]
        if not purse.affords(claim):
            continue  # and never again: the purse only empties
        purse.take(claim, 1)
        granted[claim.pool] += 1
        if granted[claim.pool] < goals[claim.pool]:
            heapq.heappush(waiting, place(claim))


def _take_back(claims: dict[str, Claim], granted: dict[str, int], purse: _Purse) -> None:
    """One worker at a time until the budget holds; lower bounds go last."""
    while purse.exceeded:
        holders = [claim for claim in claims.values() if granted[claim.pool] > 0 and _costs(claim, purse)]
        if not holders:
            return
        above = [claim for claim in holders if granted[claim.pool] > claim.least] or holders
        loser = min(above, key=lambda c: (c.priority, -_share(c, granted[c.pool]), -c.joules_per_token, c.pool))
        purse.take(loser, -1)
        granted[loser.pool] -= 1


def _costs(claim: Claim, purse: _Purse) -> bool:
    """Whether taking a worker of this pool helps with a limit that is exceeded."""
    budget = purse.budget
    gpus = budget.gpus is not None and purse.gpus > budget.gpus and claim.gpus_per_worker > 0
    return gpus or (
        budget.watts is not None and purse.watts > budget.watts * (1 + ROUNDING) and claim.watts_per_worker > 0
    )
