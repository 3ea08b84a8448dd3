"""Which workers go first when a pool shrinks: those with the least to lose.

Order: those that the routers were told to spare already, then fewest requests in flight, then least cache value (what its cached
tokens would cost to prefill again), then the youngest, then the name. The choice is handed to the ReplicaSet as the annotation
`controller.kubernetes.io/pod-deletion-cost`: among ready pods the lowest goes first; pods that are not ready go before
all others whatever their cost. Kubernetes asks not to update the annotation all the time, so only victims are marked,
right before `replicas` is lowered, and only what differs is written.

The leaders of a LeaderWorkerSet are removed from the highest index down: no annotation can change that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
VICTIM_COST: Final = -1000
"""Below what anybody sets by hand; the first to go has the lowest."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker that could go."""

    pod: str
    ready: bool
    in_flight: int
    cache_value_s: float
    """Seconds of prefill that its cached tokens save."""
    created_at_s: float
    deletion_cost: str | None = None
    """The annotation it has now."""
    spared: bool = False
    """Routers were told to send it nothing new."""


def choose_victims(candidates: Sequence[Candidate], count: int) -> list[str]:
    """The pods to go, first to go first: those not ready, as the ReplicaSet takes them anyway, then the cheapest."""
    order = sorted(
        candidates,
        key=lambda pod: (
            pod.ready, not pod.spared, pod.in_flight, pod.cache_value_s, -pod.created_at_s, pod.pod
        ),
    )  # fmt: skip
    return [candidate.pod for candidate in order[: max(count, 0)]]


def highest_indices(pods: Sequence[str], count: int) -> list[str]:
    """The leaders that a LeaderWorkerSet removes: those with the highest number at the end of their name."""
    numbered = [(int(index), pod) for pod in pods if (index := pod.rpartition("-")[2]).isdecimal()]
    return [pod for _, pod in sorted(numbered, reverse=True)[: max(count, 0)]]


def deletion_costs(candidates: Sequence[Candidate], count: int) -> Mapping[str, str | None]:
    """What to write: pod → the annotation's value, None to remove it. Pods that need no change are left out.

    Annotations that others set (not below 0 by us) are left alone on the pods that stay.
    """
    victims = choose_victims(candidates, count)
    wanted = {pod: str(VICTIM_COST - count + place) for place, pod in enumerate(victims)}
    changes: dict[str, str | None] = {}
    for candidate in candidates:
        cost = wanted.get(candidate.pod)
        if cost == candidate.deletion_cost or (cost is None and not _ours(candidate.deletion_cost)):
            continue
        changes[candidate.pod] = cost
    return changes


def _ours(cost: str | None) -> bool:
    try:
        return cost is not None and int(cost) < VICTIM_COST
    except ValueError:
        return False
