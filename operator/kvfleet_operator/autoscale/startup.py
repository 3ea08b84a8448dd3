"""How long a pool's workers take from their creation until they are ready: what a forecast must look ahead.

Measured from the pods themselves, once each: when the API server made it, and when it was first seen to be ready. Kubernetes
tells the latter to the second, and anew whenever a pod becomes ready again. A time beyond what the engine is allowed to
take is therefore of a pod that was ready before this operator looked, and is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

SAMPLES: Final = 32
"""The last so many workers count."""


@dataclass(frozen=True, slots=True)
class Start:
    """Of one worker, in Unix seconds."""

    uid: str
    created_at_s: float
    ready_at_s: float | None
    """None: it is not ready."""


@dataclass(slots=True)
class StartupTimes:
    """Of one pool."""

    _seen: set[str] = field(default_factory=set)
    _took_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))

    def see(self, workers: Iterable[Start], limit_s: float) -> None:
        """Take note of the workers that exist now. `limit_s`: longer than this no start can take."""
        there = list(workers)
        for worker in there:
            if worker.ready_at_s is None or worker.uid in self._seen:
                continue
            self._seen.add(worker.uid)
            took_s = worker.ready_at_s - worker.created_at_s
            if 0 <= took_s <= limit_s:
                self._took_s.append(took_s)
        self._seen &= {worker.uid for worker in there}

    @property
    def usual_s(self) -> float | None:
        """The 90th percentile; None while no start was seen."""
        return float(np.percentile(list(self._took_s), 90)) if self._took_s else None
