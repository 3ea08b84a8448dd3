"""From measured runs of one engine to the coefficients of an AcceleratorProfile, with their standard errors. Pure.

    prefill   seconds = s0 + Pp·u + Pq·u²/2           joules = j0 + ep·u             u uncached tokens, alone on the engine
    decode    seconds/step = W + H·b + C·c            joules/step = E0 + E1·b + Ec·c   b sequences, c tokens they hold together
    idle      watts

Weighted least squares by the relative error (each row is divided by what was measured), coefficients not below 0: one that
would be is left out and the others are fitted again. With fewer rows than coefficients there is no standard error, and the
coefficient says so by being infinitely uncertain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
SHORT_PREFILL_STEPS = 2.0


@dataclass(frozen=True, slots=True)
class Prefill:
    tokens: int
    seconds: float
    joules: float | None = None


@dataclass(frozen=True, slots=True)
class Decode:
    sequences: int
    context_tokens: float
    """Held by all of them together, on average."""
    steps: float
    seconds: float
    joules: float | None = None


@dataclass(frozen=True, slots=True)
class Coefficient:
    value: float
    standard_error: float

    def scaled(self, factor: float) -> int:
        """In a profile's unit."""
        return round(self.value * factor)


@dataclass(frozen=True, slots=True)
class Fitted:
    """SI units; energy is None where no counter was read."""

    step_s: Coefficient
    step_s_per_sequence: Coefficient
    step_s_per_context_token: Coefficient
    prefill_s_per_token: Coefficient
    prefill_s_per_token_pair: Coefficient
    step_joules: Coefficient | None
    token_joules: Coefficient | None
    context_token_joules: Coefficient | None
    prefill_token_joules: Coefficient | None
    step_error: float
    """Median relative error of the step time."""
    energy_error: float | None


def least_squares(rows: Sequence[Sequence[float]], measured: Sequence[float]) -> tuple[list[Coefficient], float]:
    """Coefficients not below 0, and the median relative error. Raises ValueError where there is nothing to fit."""
    if not rows or any(value <= 0 for value in measured):
        raise ValueError("a measured run took no time or no energy: run it longer")
    y = np.array(measured, dtype=np.float64)
    x = np.array(rows, dtype=np.float64) / y[:, None]
    used = [column for column in range(x.shape[1]) if np.any(x[:, column])]
    while True:
        part = x[:, used]
        values, *_ = np.linalg.lstsq(part, np.ones(len(y)), rcond=None)
        if len(used) > 1 and values.min() < 0:
            used = [column for place, column in enumerate(used) if place != int(values.argmin())]
            continue
        break
    residual = part @ values - 1.0
    spare = len(y) - len(used)
    errors = [inf] * len(used)
    if spare > 0:
        covariance = np.linalg.pinv(part.T @ part) * float(residual @ residual) / spare
        errors = [float(value) for value in np.sqrt(np.maximum(np.diag(covariance), 0.0))]
    found = [Coefficient(0.0, inf) for _ in range(x.shape[1])]
    for place, column in enumerate(used):
        found[column] = Coefficient(float(values[place]), errors[place])
    return found, float(np.median(np.abs(residual)))


def fit(prefills: Sequence[Prefill], decodes: Sequence[Decode]) -> Fitted:
    """All coefficients. Raises ValueError naming what is missing."""
    if len({run.sequences for run in decodes}) < 2 or len({run.tokens for run in prefills}) < 2:
        raise ValueError("at least two batch sizes and two prompt lengths are needed: give the calibration more time")
    shapes = [(1.0, float(run.sequences), run.context_tokens) for run in decodes]
    times, step_error = least_squares(shapes, [run.seconds / run.steps for run in decodes])
    # An engine takes as long as a decode step for the shortest prompt: those say nothing about its length.
    long = [run for run in prefills if run.seconds >= SHORT_PREFILL_STEPS * times[0].value]
    prefills = long if len(long) > 1 else prefills
    prefill, _ = least_squares(
        [(1.0, float(run.tokens), run.tokens**2 / 2) for run in prefills], [run.seconds for run in prefills]
    )
    energy: list[Coefficient | None] = [None] * 4
    energy_error = None
    metered = [run for run in decodes if run.joules]
    if len(metered) > 1:
        found, energy_error = least_squares(
            [(1.0, float(run.sequences), run.context_tokens) for run in metered],
            [(run.joules or 0.0) / run.steps for run in metered],
        )
        energy[:3] = found
    filled = [run for run in prefills if run.joules]
    if len(filled) > 1:
        energy[3] = least_squares([(1.0, float(run.tokens)) for run in filled], [run.joules or 0.0 for run in filled])[
            0
        ][1]
    return Fitted(
        step_s=times[0],
        step_s_per_sequence=times[1],
        step_s_per_context_token=times[2],
        prefill_s_per_token=prefill[1],
        prefill_s_per_token_pair=prefill[2],
        step_joules=energy[0],
        token_joules=energy[1],
        context_token_joules=energy[2],
        prefill_token_joules=energy[3],
        step_error=step_error,
        energy_error=energy_error,
    )
