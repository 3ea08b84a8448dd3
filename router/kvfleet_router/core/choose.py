"""Chooses a worker: look the prompt up, score every candidate, take the least cost, let chance decide between equals.

Few candidates are scored one by one in Python; many at once in numpy, with the same formulas and the same choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from struct import pack

import numpy as np

from kvfleet_router.core.columns import Array, Table, spread
from kvfleet_router.core.decisions import MAX_CANDIDATES, Scores
from kvfleet_router.core.exact import look_up, overlay
from kvfleet_router.core.index import Match, PrefixIndex
from kvfleet_router.core.policy import Policy
from kvfleet_router.core.routes import Candidates
from kvfleet_router.core.savings import Rival
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker


class Choice:
    __slots__ = ("cached_blocks", "cached_tokens", "candidate_count", "cost", "rival", "scored", "worker")

    def __init__(
        self,
        worker: Worker,
        cached_tokens: float,
        cached_blocks: int,
        cost: float,
        scored: Scores,
        candidate_count: int,
        rival: Rival | None,
    ) -> None:
        self.worker = worker
        self.cached_tokens = cached_tokens
        self.cached_blocks = cached_blocks
        self.cost = cost
        self.scored = scored
        """The best candidates, in no order."""
        self.candidate_count = candidate_count
        self.rival = rival
        """Where least_request would go, for what that saves; None: nobody asks."""

    def instead_of(self, other: Choice, scored: Scores | None = None) -> Choice:
        """This one, made among fewer candidates, in the place of the first choice."""
        self.candidate_count, self.rival = other.candidate_count, other.rival
        if scored is not None:
            self.scored = scored
        return self


def choose(
    arrival: Arrival,
    candidates: Candidates,
    index: PrefixIndex,
    table: Table,
    rng: random.Random,
    now: float,
    *,
    near: float = 0.0,
) -> Choice:
    """The worker that costs least for this request; `candidates` must not be empty.

    `near` above 0: other routers choose among the same workers, and nothing is known of what they choose. Then all whose cost is
    at most this share above the least may be had, and the better of two of them, drawn at random, is taken: not all at once the
    one that looks best to all.
    """
    policy = arrival.lane.policy
    match = index.match(arrival.blocks) if arrival.blocks else []
    if arrival.asked:
        look_up(arrival, now)
    if policy.columns_from is not None and len(candidates.workers) >= policy.columns_from:
        return _choose_by_columns(arrival, policy, candidates, match, table, rng, now, near)
    workers = list(policy.shortlist(candidates.workers, rng))  # a list: compiled code walks over it without asking
    return _choose_one_by_one(arrival, policy, workers, match, rng, now, near)


def _choose_one_by_one(
    arrival: Arrival,
    policy: Policy,
    workers: list[Worker],
    match: Match,
    rng: random.Random,
    now: float,
    near: float,
) -> Choice:
    cached, depths = [0.0] * len(workers), [0] * len(workers)
    if match:
        block_tokens, most = arrival.block_tokens, arrival.prompt_tokens - 1.0
        for place, worker in enumerate(workers):
            bit = worker.cache.bit
            for mask, blocks in match:
                if mask & bit:
                    depths[place] = blocks
                    cached[place] = min(blocks * block_tokens, most)  # the engine computes the last token in any case
                    break
    if arrival.received_tokens:
        cached = [arrival.received_tokens] * len(workers)  # wherever it goes, they come along
    elif arrival.asked:
        overlay(arrival, workers, cached)
    scores = policy.score_all(arrival, workers, cached, now)
    costs = [_sum(parts) for parts in scores]
    least = min(costs)
    equals = [place for place, cost in enumerate(costs) if cost <= least + policy.tie]
    winner = equals[0] if len(equals) == 1 else equals[int(rng.random() * len(equals))]
    if near:
        winner = _better_of_two(
            [place for place, cost in enumerate(costs) if cost <= least + near * abs(least)], costs, rng, winner
        )
    kept = list(range(len(workers)))
    if len(workers) > MAX_CANDIDATES:
        kept = sorted(kept, key=costs.__getitem__)[:MAX_CANDIDATES]
    figures: list[float] = []
    for place in kept:
        figures.append(cached[place])
        figures += scores[place]
    scored = Scores(tuple([workers[place].name for place in kept]), pack(f"{len(figures)}d", *figures))
    rival = _rival(workers, cached, winner) if arrival.lane.priced else None
    return Choice(workers[winner], cached[winner], depths[winner], costs[winner], scored, len(workers), rival)


def _choose_by_columns(
    arrival: Arrival,
    policy: Policy,
    candidates: Candidates,
    match: Match,
    table: Table,
    rng: random.Random,
    now: float,
    near: float,
) -> Choice:
    workers, slots = candidates.workers, candidates.slots
    most = arrival.prompt_tokens - 1.0
    depths = spread(match, slots, candidates.mask.bit_length())
    cached = np.minimum(depths * arrival.block_tokens, most)
    if arrival.received_tokens:
        cached = np.full(len(workers), arrival.received_tokens)
    elif arrival.asked:
        told = cached.tolist()
        overlay(arrival, workers, told)
        cached = np.array(told)
    parts = np.array(policy.score_many(arrival, table.columns(slots), cached, now))
    costs = parts.sum(axis=0)
    equals = np.flatnonzero(costs <= costs.min() + policy.tie)
    winner = int(equals[0] if len(equals) == 1 else equals[int(rng.random() * len(equals))])
    if near:
        least = float(costs.min())
        nearly = np.flatnonzero(costs <= least + near * abs(least)).tolist()
        winner = _better_of_two(nearly, costs.tolist(), rng, winner)
    kept = (
        np.argpartition(costs, MAX_CANDIDATES - 1)[:MAX_CANDIDATES]
        if len(workers) > MAX_CANDIDATES
        else np.arange(len(workers))
    )
    names = tuple([workers[place].name for place in kept.tolist()])
    scored = Scores(names, np.vstack((cached[kept], parts[:, kept])).T.tobytes())
    rival = _rival(list(workers), cached, winner) if arrival.lane.priced else None
    return Choice(
        workers[winner], float(cached[winner]), int(depths[winner]), float(costs[winner]), scored, len(workers), rival
    )


def _sum(parts: tuple[float, ...]) -> float:
    """Without an object for each step."""
    total = 0.0
    for part in parts:
        total += part
    return total


def _rival(workers: list[Worker], cached: Sequence[float] | Array, winner: int) -> Rival:
    """The worker with the fewest in flight; of several the next one after the winner, so that it is not always the same."""
    least = workers[0].in_flight
    for worker in workers:
        if worker.in_flight < least:
            least = worker.in_flight
    ties, first, after = 0, -1, -1
    for place, worker in enumerate(workers):
        if worker.in_flight == least:
            ties += 1
            if first < 0:
                first = place
            if after < 0 and place > winner:
                after = place
    chosen = after if after >= 0 else first
    return Rival(workers[chosen], float(cached[chosen]), least, ties)


def _better_of_two(places: list[int], costs: list[float], rng: random.Random, best: int) -> int:
    """The better of two places drawn at random; `best` where there are no two."""
    return min(rng.sample(places, 2), key=costs.__getitem__) if len(places) > 1 else best
