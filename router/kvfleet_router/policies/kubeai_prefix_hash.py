"""kubeai_prefix_hash: KubeAI's PrefixHash: consistent hashing with bounded loads (CHWBL).

    Every worker stands at 256 points of a ring. From the hash of the prompt's beginning on, the first worker with
        load + 1 ≤ 1.25 · (total load + 1) / workers        (or total load = 0)
    gets the request; if there is none, the first of all.
    cost = workers met before it on the ring   (argmin; a worker over the bound is ruled out, as are those not reached)

Intent: affinity without any index: equal beginnings meet, and a worker that comes or goes moves only its share of them.
Inputs: requests in flight (load), names of the workers, the hash of the prompt's first block.

Differs from the original: the key is the prompt's first block (`prefix.blockBytes`, with model and cache salt) instead of
the first 100 characters of its first message; a prompt shorter than a block has no key and goes to the least load. The
ring is that of the candidates, a pure function of their names; it is memoised, not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvfleet_router.core.policy import RULED_OUT, RelativePolicy
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import Worker

VIRTUAL_NODES = 256
LOAD_FACTOR = 1.25

Points = npt.NDArray[np.uint64]


class KubeAIPrefixHash(RelativePolicy):
    parts = ("ring", "overload", "in_flight")
    uses_prefix = True
    measures_cost = True

    def score_all(
        self, arrival: Arrival, workers: Sequence[Worker], cached_tokens: Sequence[float], now: float
    ) -> list[tuple[float, ...]]:
        loads = [worker.in_flight for worker in workers]
        if not arrival.blocks:
            return [(0.0, 0.0, float(load)) for load in loads]
        total = sum(loads)
        bound = LOAD_FACTOR * (total + 1) / len(loads) if total else 1.0
        met = _walk(tuple([worker.name for worker in workers]), arrival.blocks[0], loads, bound)
        return [
            (float(met.get(place, len(loads))), RULED_OUT if place not in met or load + 1 > bound else 0.0, 0.0)
            for place, load in enumerate(loads)
        ]


def _walk(names: tuple[str, ...], block: int, loads: Sequence[int], bound: float) -> dict[int, int]:
    """The workers met on the ring, in order, up to the first within the bound: place among the names -> rank."""
    points, owners = _ring(names)
    start = int(np.searchsorted(points, np.uint64(xxh3_64_intdigest(b"%d" % block))))
    met: dict[int, int] = {}
    for step in range(len(owners)):
        place = owners[(start + step) % len(owners)]
        if place not in met:
            met[place] = len(met)
            if loads[place] + 1 <= bound or len(met) == len(names):
                break
    return met


@lru_cache(maxsize=8)
def _ring(names: tuple[str, ...]) -> tuple[Points, list[int]]:
    """All points in order, and whose each is."""
    points = np.concatenate([_points(name) for name in names])
    order = np.argsort(points, kind="stable")
    return points[order], (order // VIRTUAL_NODES).tolist()


@lru_cache(maxsize=4096)
def _points(name: str) -> Points:
    return np.array([xxh3_64_intdigest(f"{name}{node}".encode()) for node in range(VIRTUAL_NODES)], dtype=np.uint64)
