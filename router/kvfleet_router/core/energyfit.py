"""Learns a pool's energy coefficients from what its workers drew: recursive least squares with a prior. Pure.

    ΔE = E0·steps + E1·tokens + ep·prefill tokens + P_idle·idle seconds + (Ec·context tokens, taken off first)

over intervals of a few seconds, of all workers of a pool (they are alike). What is estimated are factors on the profile's
figures, so that all four are of the size of 1, and each interval is divided by what was expected of it: what counts is the
relative error. The past fades by 0.5 % an interval; a coefficient that the load says nothing about (no prefill for an
hour) keeps its prior's uncertainty at most, so it neither drifts nor becomes overconfident.

`error` is the mean relative error of the last intervals, before each was learned from: the confidence that decides whether
joules may steer. Wrong coefficients show up there at once, and it falls as they are learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfleet_api.cost import CostModel

Array = npt.NDArray[np.float64]

NAMES = ("StepEnergy", "TokenEnergy", "PrefillTokenEnergy", "IdlePower")
"""The coefficients in their order, as AcceleratorProfile's status names them."""
FADE = 0.995
PRIOR_SD = 0.7
"""A profile's figure may be off by half or double."""
NOISE_SD = 0.05
"""Relative error of an interval where all coefficients are right: work is counted where it ends, power lags."""
FACTOR_BOUNDS = (0.1, 10.0)
OUTLIER = 3.0
"""An interval this many times off is learned from as if it were that far off."""
MIN_EXPECTED_JOULES = 1.0

CONFIDENT_ERROR = 0.25
"""Mean relative error up to which joules may steer."""
MIN_INTERVALS = 8
"""Before, the error says nothing yet."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker did in an interval."""

    steps: float = 0.0
    tokens: float = 0.0
    context_tokens: float = 0.0
    """Sum over steps of the tokens held."""
    prefill_tokens: float = 0.0
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Energy coefficients, SI units, symbols as in CostModel."""

    step_joules: float
    token_joules: float
    context_token_joules: float
    prefill_token_joules: float
    idle_watts: float

    @classmethod
    def of(cls, cost: CostModel) -> Figures:
        return cls(
            cost.step_joules,
            cost.token_joules,
            cost.context_token_joules,
            cost.prefill_token_joules,
            cost.idle_watts,
        )

    def joules(self, work: Work) -> float:
        """What the work takes."""
        return (
            self.step_joules * work.steps
            + self.token_joules * work.tokens
            + self.context_token_joules * work.context_tokens
            + self.prefill_token_joules * work.prefill_tokens
            + self.idle_watts * work.idle_s
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """One coefficient as learned."""

    name: str
    value: float
    standard_error: float
    intervals: int


class EnergyFit:
    """One pool's coefficients."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self._prior = Figures.of(cost)
        self._scale = np.array(
            (cost.step_joules, cost.token_joules, cost.prefill_token_joules, cost.idle_watts), dtype=np.float64
        )
        self._factors: Array = np.ones(4)
        self._covariance: Array = np.eye(4) * PRIOR_SD**2
        self.intervals = 0
        self.error = 0.0
        """Mean relative error of the expectations, fading."""

    def observe(self, work: Work, joules: float) -> None:
        """A worker drew so many joules for this work."""
        parts = self._scale * (work.steps, work.tokens, work.prefill_tokens, work.idle_s)
        context = self._prior.context_token_joules * work.context_tokens
        expected = float(parts @ self._factors) + context
        if expected < MIN_EXPECTED_JOULES:
            return
        joules = min(max(joules, expected / OUTLIER), expected * OUTLIER)
        weight = 0.1 if self.intervals >= 10 else 1.0 / (self.intervals + 1)
        self.error += weight * (abs(joules - expected) / expected - self.error)
        self.intervals += 1
        row = parts / expected
        seen = self._covariance @ row
        gain = seen / (float(row @ seen) + NOISE_SD**2)
        self._factors = np.clip(self._factors + gain * ((joules - expected) / expected), *FACTOR_BOUNDS)
        covariance = self._covariance - np.outer(gain, seen)
        self._covariance = _bounded((covariance + covariance.T) / (2.0 * FADE))

    @property
    def confident(self) -> bool:
        """The coefficients explain what was drawn."""
        return self.intervals < MIN_INTERVALS or self.error <= CONFIDENT_ERROR

    def figures(self) -> Figures:
        """The coefficients as they are known now."""
        step, token, prefill, idle = (float(value) for value in self._factors * self._scale)
        return Figures(step, token, self._prior.context_token_joules, prefill, idle)

    def deviation(self, work: tuple[float, float, float, float]) -> float:
        """Standard error (J) of what so many steps, tokens, prefill tokens and idle seconds take by the coefficients."""
        row = self._scale * work
        return float(np.sqrt(max(float(row @ self._covariance @ row), 0.0)))

    def estimates(self) -> list[Estimate]:
        """Each coefficient with its standard error."""
        errors = np.sqrt(np.diag(self._covariance)) * self._scale
        values = self._factors * self._scale
        return [
            Estimate(name, float(value), float(error), self.intervals)
            for name, value, error in zip(NAMES, values, errors, strict=True)
        ]


def _bounded(covariance: Array) -> Array:
    """No coefficient is less certain than before anything was learned: fading must not wind it up."""
    excess = np.sqrt(np.maximum(np.diag(covariance) / PRIOR_SD**2, 1.0))
    bounded: Array = covariance / np.outer(excess, excess)
    return bounded
