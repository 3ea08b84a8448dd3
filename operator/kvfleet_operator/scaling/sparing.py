"""Which workers the routers should send nothing new, for the autoscaler is about to take them away. Pure but for its memory.

Told as an annotation of each router's ConfigMap (`DRAINING_ANNOTATION`), which routers watch anyway. It does not flap: workers are
named once every recommendation of half a scale-down window could do without them, and a single higher one takes all of it
back. It does not outlive its reason: it ends by itself unless it is renewed, so a leader that is gone binds nobody. Who is
named stays named while as many are to go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

LASTS_S: Final = 150.0
RENEW_BEFORE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Told:
    until_s: float
    workers: tuple[str, ...]


class Spared:
    """What was told of each pool."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], _Told] = {}

    def of(self, namespace: str, pool: str, now_s: float) -> frozenset[str]:
        """The pool's workers that routers spare at Unix time `now_s`."""
        told = self._told.get((namespace, pool))
        return frozenset(told.workers) if told is not None and now_s < told.until_s else frozenset()

    def want(self, namespace: str, pool: str, workers: Sequence[str], now_s: float) -> bool:
        """These should be spared from now on, and no others. True: routers are to be told."""
        key, wanted = (namespace, pool), tuple(sorted(workers))
        told = self._told.get(key)
        if not wanted:
            return self._told.pop(key, None) is not None
        if told is not None and told.workers == wanted and now_s < told.until_s - RENEW_BEFORE_S:
            return False
        self._told[key] = _Told(now_s + LASTS_S, wanted)
        return True

    def forget(self, namespace: str, pool: str) -> None:
        """Routers could not be told."""
        self._told.pop((namespace, pool), None)

    def annotation(self, namespace: str, now_s: float) -> str | None:
        """For the routers of the namespace; None: there is nothing to tell."""
        pools: Mapping[str, object] = {
            pool: {"until": round(told.until_s), "workers": list(told.workers)}
            for (where, pool), told in sorted(self._told.items())
            if where == namespace and now_s < told.until_s
        }
        return json.dumps(pools, separators=(",", ":")) if pools else None
