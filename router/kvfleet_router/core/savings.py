"""Joules saved against least_request: each request's worker and the one least_request would have chosen, priced alike. Pure.

    saved = ΔE(rival) − ΔE(chosen)      ΔE as in energy.py; rival: of the same candidates, fewest requests in flight

Where several are equally idle, least_request draws one: where the chosen worker is among them, only the others' share counts.
What would have come of later requests under least_request nobody knows: each decision is judged from the state it met, the answer's length
is the one expected.

A sum over many decisions is not better known than the coefficients it is priced with. So the work itself is added up (decode
steps, tokens, prompt tokens, idle seconds), by whose coefficients price it, and its standard error follows from theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

from kvfleet_router.core.energy import marginal_joules

if TYPE_CHECKING:
    from kvfleet_router.core.pool import Pool
    from kvfleet_router.core.ticket import Arrival
    from kvfleet_router.core.worker import Worker

Difference = tuple[float, float, float, float]
"""Decode steps, tokens, prefill tokens, idle seconds: what was done instead, less what was done."""


class Rival:
    """Where least_request would have sent the request."""

    __slots__ = ("cached_tokens", "in_flight", "ties", "worker")

    def __init__(self, worker: Worker, cached_tokens: float, in_flight: int, ties: int) -> None:
        self.worker = worker
        self.cached_tokens = cached_tokens
        self.in_flight = in_flight
        self.ties = ties
        """Candidates with so few in flight."""


class _Sums:
    __slots__ = ("lost", "saved", "work")

    def __init__(self) -> None:
        self.saved = self.lost = 0.0
        self.work: dict[Pool, list[float]] = {}
        """By the pool whose coefficients price it, as in `Difference`."""


class Saved(NamedTuple):
    """Of one pool's requests, since the router began."""

    pool: str
    saved_joules: float
    """By decisions that took less than least_request's."""
    lost_joules: float
    """By those that took more."""
    standard_error: float
    """Of the difference of the two."""


class Savings:
    """What one router's decisions were worth."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def price(self, arrival: Arrival, worker: Worker, uncached_tokens: float, joules: float, rival: Rival) -> float:
        """Count the decision for `worker`, which adds `joules`. Returns the joules saved. To be called before it is sent."""
        other, ties = rival.worker, rival.ties
        if other is worker:
            return 0.0
        share = 1.0 - 1.0 / ties if worker.in_flight == rival.in_flight else 1.0
        other_uncached = arrival.prompt_tokens - rival.cached_tokens
        saved = share * (marginal_joules(arrival, other, other_uncached) - joules)
        sums = self._sums.get(worker.pool)
        if sums is None:
            sums = self._sums[worker.pool] = _Sums()
        if saved >= 0.0:
            sums.saved += saved
        else:
            sums.lost -= saved
        _add(sums.work, arrival, other, other_uncached, share)
        _add(sums.work, arrival, worker, uncached_tokens, -share)
        return saved

    def keep(self, pools: Iterable[Pool]) -> None:
        """These are the pools now; nothing is kept of others."""
        known = set(pools)
        names = {pool.name for pool in known}
        self._sums = {name: sums for name, sums in self._sums.items() if name in names}
        for sums in self._sums.values():
            sums.work = {pool: work for pool, work in sums.work.items() if pool in known}

    def of(self, deviation: Callable[[Pool, Difference], float]) -> Iterator[Saved]:
        """By pool. `deviation`: the standard error of what this work takes on the pool's workers."""
        for name, sums in self._sums.items():
            errors = [deviation(pool, (work[0], work[1], work[2], work[3])) for pool, work in sums.work.items()]
            yield Saved(name, sums.saved, sums.lost, sqrt(sum(error * error for error in errors)))


def _add(work: dict[Pool, list[float]], arrival: Arrival, worker: Worker, uncached_tokens: float, share: float) -> None:
    """The parts of `marginal_joules`: a new sequence's share of steps, and the idling that they replace."""
    parts = work.get(worker.pool_state)
    if parts is None:
        parts = work[worker.pool_state] = [0.0, 0.0, 0.0, 0.0]
    tokens = share * arrival.expected_output_tokens
    steps = tokens / (worker.decoding + worker.pending + 1)
    parts[0] += steps
    parts[1] += tokens
    parts[2] += share * uncached_tokens
    parts[3] -= steps * worker.step_s
