"""Energy in one place: telemetry in, coefficients and joules per request out, and whether joules may steer. Pure.

    reading ──► Meter (telemetry.py) ──► interval ──► Ledger.close ──► EnergyFit.observe ──► the pool's coefficients
    tick    ──► intervals of workers without telemetry, by the coefficients; and which pools can be trusted

A pool with telemetry is trusted while no more than half of its ready workers' is bad and the fit explains what they draw. A pool
without has the profile's figures. What is not trusted is priced at nothing: the policy is the latency policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_router.core.energyfit import EnergyFit, Estimate
from kvfleet_router.core.ledger import Ledger
from kvfleet_router.core.pool import Fleet, Pool
from kvfleet_router.core.telemetry import DeviceReading, Meter, State
from kvfleet_router.core.worker import Worker

MODEL_INTERVAL_S = 5.0
"""How often workers without telemetry are booked."""
BAD = (State.STALE, State.FROZEN, State.ABSURD)
MOVED = 0.02
"""Workers take over coefficients that changed by this much."""


@dataclass(frozen=True, slots=True)
class PoolEnergy:
    """What there is to say of a pool."""

    pool: str
    source: str
    """Profile, Learning, Measured, LowConfidence, Stale, Frozen or Absurd."""
    trusted: bool
    message: str
    error: float
    intervals: int
    estimates: list[Estimate]

    def document(self) -> dict[str, Any]:
        """As `/loaded` tells it."""
        return {
            "source": self.source,
            "trusted": self.trusted,
            "message": self.message,
            "error": self.error,
            "intervals": self.intervals,
            "estimates": {
                estimate.name: {"value": estimate.value, "standard_error": estimate.standard_error}
                for estimate in self.estimates
            },
        }


class EnergyBook:
    """Of one router. Without a TelemetrySpec it does nothing."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._spec: TelemetrySpec | None = None
        self._meters: dict[Worker, Meter] = {}
        self._fits: dict[Pool, EnergyFit] = {}
        self._due = 0.0
        self.ledger: Ledger | None = None

    def configure(self, spec: TelemetrySpec | None) -> None:
        """Books are kept from now on, or no more."""
        self._spec = spec
        if spec is None:
            self.ledger, self._meters, self._fits = None, {}, {}
            for worker in self._fleet.workers():
                worker.ledger = None
            for pool in self._fleet.pools.values():
                pool.joules_trusted = True
        elif self.ledger is None:
            self.ledger = Ledger()

    @property
    def measured(self) -> bool:
        """There is telemetry to be had."""
        return self._spec is not None and bool(self._spec.dcgm_urls or self._spec.prometheus_url)

    def meters(self) -> list[Meter]:
        """One a worker."""
        return list(self._meters.values())

    def reading(self, worker: Worker, devices: Mapping[str, DeviceReading], now: float) -> None:
        """A worker's devices as they were just read."""
        spec, ledger = self._spec, self.ledger
        if spec is None or ledger is None or worker.removed:
            return
        meter = self._meters.get(worker)
        if meter is None:
            meter = self._meters[worker] = Meter(now, stale_s=spec.stale_seconds)
        interval = meter.observe(devices, now)
        worker.catch_up(now)
        if worker.ledger is None:
            ledger.open(worker, worker.pool_state.joules)
        elif interval is None and meter.begun_at == now:
            ledger.skip(worker)  # the counter was lost meanwhile
        elif interval is not None:
            work, joules = ledger.close(worker, interval.joules)
            if not interval.resets:  # of what was drawn before a reset nothing is known
                fit = self._fit(worker.pool_state)
                fit.observe(work, joules)
                self._publish(worker.pool_state, fit)

    def tick(self, now: float) -> None:
        """Call a few times a second."""
        if self._spec is None or now < self._due:
            return
        self._due = now + (MODEL_INTERVAL_S if not self.measured else 1.0)
        ledger = self.ledger
        assert ledger is not None
        for gone in [worker for worker in ledger.workers() if worker.removed]:
            ledger.forget(gone)
            self._meters.pop(gone, None)
        if not self.measured:
            for worker in self._fleet.workers():
                worker.catch_up(now)
                if worker.ledger is not None:
                    ledger.close(worker, None)
                else:
                    ledger.open(worker, worker.pool_state.joules)
        for pool in self._fleet.pools.values():
            pool.joules_trusted = self.of(pool, now).trusted

    def of(self, pool: Pool, now: float) -> PoolEnergy:
        """The pool's state."""
        if not self.measured:
            return PoolEnergy(pool.name, "Profile", True, "no telemetry: the profile's figures", 0.0, 0, [])
        fit = self._fit(pool)
        ready = [worker for worker in pool.workers.values() if worker.assignable]
        states = [self._state(worker, now) for worker in ready]
        bad = [state for state in states if state in BAD]
        told = (fit.error, fit.intervals, fit.estimates())
        if len(bad) * 2 > len(ready):
            worst = max(set(bad), key=bad.count)
            problem = next(
                (meter.problem for worker in ready if (meter := self._meters.get(worker)) and meter.problem), ""
            )
            message = f"telemetry of {len(bad)} of {len(ready)} workers is {worst.lower()}" + (
                f": {problem}" if problem else ""
            )
            return PoolEnergy(pool.name, worst, False, message, *told)
        if not fit.confident:
            message = f"measured joules differ from the model's by {fit.error:.0%} on average"
            return PoolEnergy(pool.name, "LowConfidence", False, message, *told)
        source = State.MEASURED if State.MEASURED in states else State.LEARNING
        return PoolEnergy(
            pool.name, source, True, f"{fit.intervals} intervals, off by {fit.error:.0%} on average", *told
        )

    def deviation(self, pool: Pool, work: tuple[float, float, float, float]) -> float:
        """Standard error of what the work takes on the pool's workers: of what was learned, or of the profile."""
        return self._fit(pool).deviation(work)

    def _state(self, worker: Worker, now: float) -> State:
        meter = self._meters.get(worker)
        if meter is None:
            meter = self._meters[worker] = Meter(now, stale_s=self._spec.stale_seconds if self._spec else 60.0)
        return meter.state(now)

    def _fit(self, pool: Pool) -> EnergyFit:
        fit = self._fits.get(pool)
        if fit is None or fit.cost is not pool.cost:
            self._fits = {known: kept for known, kept in self._fits.items() if known in self._fleet.pools.values()}
            fit = self._fits[pool] = EnergyFit(pool.cost)
        return fit

    def _publish(self, pool: Pool, fit: EnergyFit) -> None:
        """Let workers and books go by what was learned, once it has moved noticeably."""
        learned, used = fit.figures(), pool.joules
        pairs = (
            (learned.step_joules, used.step_joules),
            (learned.token_joules, used.token_joules),
            (learned.prefill_token_joules, used.prefill_token_joules),
            (learned.idle_watts, used.idle_watts),
        )
        if any(abs(new - old) > MOVED * old for new, old in pairs):
            pool.learned_joules(learned)
            if self.ledger is not None:
                for worker in pool.workers.values():
                    if worker.ledger is not None:
                        self.ledger.open(worker, learned)
