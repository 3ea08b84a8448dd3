"""power_of_two: of two workers drawn at random, the one with fewer requests in flight.

    candidates = 2 at random;  cost = requests in flight   (argmin; ties at random)

Intent: nearly as even as least_request, without herding where several routers share the workers.
Inputs: requests in flight.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvfleet_router.core.worker import Worker
from kvfleet_router.policies.least_request import LeastRequest


class PowerOfTwo(LeastRequest):
    def shortlist(self, workers: Sequence[Worker], rng: random.Random) -> Sequence[Worker]:
        return rng.sample(workers, 2) if len(workers) > 2 else workers
