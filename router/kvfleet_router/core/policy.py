"""What a routing policy is: a cost for a request on a worker, in named parts. The worker with the least sum gets it.

A policy does no I/O and keeps nothing between decisions: all it sees is the Arrival, the Worker's figures, how many of
the prompt's tokens the worker has cached, and the time. So a decision record can show every part, and any policy can be
replayed against any other.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final

from kvfleet_api.fleetconfig import PolicyConfig
from kvfleet_router.core.columns import Array, Columns
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker

RULED_OUT: Final = 1e9
"""A part of this size takes a candidate out of the choice while others are left, and shows in the record why."""


class Policy(ABC):
    """One RoutingPolicy's strategy. One file each; the header says formula, intent and inputs."""

    parts: ClassVar[tuple[str, ...]]
    """Names of the cost's parts."""
    uses_prefix: ClassVar[bool] = False
    """Wants cached tokens: else prompts are not even hashed."""
    measures_cost: ClassVar[bool] = False
    """Compares workers of different pools by itself: else a pool is drawn by weight first."""
    in_seconds: ClassVar[bool] = False
    """Costs are seconds: what a preference is worth (affinity.py) can be compared with them."""
    columns_from: ClassVar[int | None] = None
    """Number of candidates from which `score_many` is faster; none: there is no `score_many`."""

    hold_above_s: float | None = None
    """Hold the request in the router's queue while the winner's backlog is longer; none: never."""
    tie: float = 0.0
    """Costs this close to the least are equal; among equals, chance decides."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config

    def shortlist(self, workers: Sequence[Worker], rng: random.Random) -> Sequence[Worker]:
        """The workers worth scoring."""
        return workers

    @abstractmethod
    def score(self, arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, ...]:
        """The cost of this request on this worker, by part."""

    def score_all(
        self, arrival: Arrival, workers: Sequence[Worker], cached_tokens: Sequence[float], now: float
    ) -> list[tuple[float, ...]]:
        """`score` for each of the candidates."""
        return [self.score(arrival, worker, cached_tokens[place], now) for place, worker in enumerate(workers)]

    def score_many(self, arrival: Arrival, workers: Columns, cached_tokens: Array, now: float) -> tuple[Array, ...]:
        """`score` over columns of workers: one array per part."""
        raise NotImplementedError(f"{type(self).__name__} scores worker by worker")


class RelativePolicy(Policy):
    """A policy whose costs depend on the other candidates: filters, normalised scores, switches on imbalance."""

    @abstractmethod
    def score_all(
        self, arrival: Arrival, workers: Sequence[Worker], cached_tokens: Sequence[float], now: float
    ) -> list[tuple[float, ...]]:
        """The cost of this request on each of the candidates, by part."""

    def score(self, arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, ...]:
        """Its cost were it the only candidate."""
        return self.score_all(arrival, (worker,), (cached_tokens,), now)[0]
