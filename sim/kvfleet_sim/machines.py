"""A simulated worker and the power it draws: on, starting, leaving, or off. Pure.

Every time it is switched on it is a new engine: nothing is cached, and its clock begins then. What the engines before it
drew is kept, so joules and seconds are those of the worker's whole time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

from kvfleet_api.fleetconfig import PoolConfig
from kvfleet_router.core.dispatcher import WorkerEndpoint
from kvfleet_sim.engine import Engine


class Power(Enum):
    ON = "on"
    STARTING = "starting"
    LEAVING = "leaving"
    """Ends what it has, gets nothing new."""
    OFF = "off"


class Machine:
    """An engine, where it stands in the simulation's heap, and whether it runs at all."""

    __slots__ = (
        "_build",
        "_off_watts",
        "_since_s",
        "_spent_joules",
        "_spent_s",
        "begins_s",
        "draining",
        "due_s",
        "endpoint",
        "engine",
        "longest_tokens",
        "name",
        "pool",
        "power",
        "starts",
    )

    def __init__(
        self, endpoint: WorkerEndpoint, pool: PoolConfig, build: Callable[[float], Engine], off_watts: float = 0.0
    ) -> None:
        """`build`: a new engine whose clock begins at the given time."""
        self.name = endpoint.name
        self.endpoint = endpoint
        self.pool = pool.name
        self._build = build
        self._off_watts = off_watts
        self.engine = build(0.0)
        self.longest_tokens = min(self.engine.capacity_tokens, pool.max_context_tokens or self.engine.capacity_tokens)
        self.due_s = math.inf
        self.power = Power.ON
        self.starts = 0
        self.draining = False
        """Routers spare it, for it is likely to be taken away soon."""
        self.begins_s = math.inf
        """When it will be on, while it starts."""
        self._since_s = 0.0  # when its present state began
        self._spent_joules = self._spent_s = 0.0  # in the states before

    # -- changes ---------------------------------------------------------------------------------------------------------

    def start(self, now_s: float, startup_s: float) -> None:
        """Off → starting."""
        self._turn(Power.STARTING, now_s)
        self.begins_s = now_s + startup_s
        self.starts += 1

    def began(self, now_s: float) -> None:
        """Starting → on, with a new engine."""
        self._turn(Power.ON, now_s)
        self.engine = self._build(now_s)
        self.due_s = math.inf

    def leave(self, now_s: float) -> None:
        """On → leaving; starting → off."""
        if self.power is Power.STARTING:
            self._turn(Power.OFF, now_s)
        else:
            self.power = Power.LEAVING

    def stay(self) -> None:
        """Leaving → on: it was not done yet."""
        self.power = Power.ON

    def stop(self, now_s: float) -> None:
        """Leaving → off; everything it had has ended."""
        self._turn(Power.OFF, now_s)

    def _turn(self, power: Power, now_s: float) -> None:
        self._spent_joules, self._spent_s = self.joules_at(now_s), self.seconds_at(now_s)
        self.power, self._since_s = power, now_s

    # -- figures ---------------------------------------------------------------------------------------------------------

    def joules_at(self, now_s: float) -> float:
        """All it drew until now."""
        if self.power is Power.STARTING:
            return self._spent_joules + self.engine.cost.idle_watts * (now_s - self._since_s)
        if self.power is Power.OFF:
            return self._spent_joules + self._off_watts * (now_s - self._since_s)
        return self._spent_joules + self.engine.joules_at(now_s)

    def seconds_at(self, now_s: float) -> float:
        """How long it existed: on, starting or leaving."""
        return self._spent_s if self.power is Power.OFF else self._spent_s + now_s - self._since_s

    def idle_s_at(self, now_s: float) -> float:
        """How long it has had nothing to do."""
        return 0.0 if self.engine.has_work else max(now_s - self.engine.clock_s, 0.0)
