"""What the router learns from finished requests: how fast workers really are, how long prompts and answers are.

    prefill   g = observed / predicted prefill time, sums that fade by 1 % a sample
    decode    W and H of the step time W + H·n, by fading least squares over (sequences in the step, step time)
    prompts   bytes per token of a model, from the engine's reported prompt_tokens
    answers   output lengths of a model: mean per tenant, and how many are short

A pool's workers are alike, so g, W and H are the pool's. A worker is taken to be like its pool until its own samples say
that it is clearly faster or slower (throttled, a noisy neighbour): small differences are noise, and to follow them would
send every request of a quiet fleet to whichever worker looks a little faster.

Every estimate starts from a prior (the AcceleratorProfile's figures) that counts as a few samples, so that one odd request
moves little, and stays within bounds that no real engine leaves.
"""

from __future__ import annotations

from math import expm1
from typing import Final

FADE: Final = 0.99
"""Weight of the past at each sample: the last hundred samples or so count."""

PREFILL_PRIOR_S: Final = 0.5
"""The prior counts as this much observed prefill time."""
PREFILL_FACTOR_BOUNDS = (0.05, 20.0)

STEP_PRIOR_SAMPLES: Final = 2.0
STEP_PRIOR_SPREAD: Final = 512.0
"""Sum of squared deviations of the batch size below which samples teach the level of the step time and not its slope."""
STEP_FACTOR_BOUNDS = (0.1, 10.0)
STEP_SAMPLE_FACTOR: Final = 2.0
"""A single sample moves the fit no further than if it were off by this factor: an outlier is most likely no decode step."""

PUBLISH_CHANGE: Final = 0.02
"""Workers take over the pool's figures when they have changed by this much."""
ALIKE_WITHIN: Final = 0.25
"""A worker is like its pool as long as its times are within this of what the pool's figures predict."""
PREFILL_ALIKE_PRIOR_S: Final = 1.0
STEP_ALIKE_PRIOR_S: Final = 0.1

DEFAULT_BYTES_PER_TOKEN: Final = 4.0
BYTES_PER_TOKEN_BOUNDS = (0.5, 32.0)
TOKEN_PRIOR: Final = 4096.0
"""The prior of bytes per token counts as this many tokens."""

DEFAULT_OUTPUT_TOKENS: Final = 256.0
OUTPUT_PRIOR_SAMPLES: Final = 8.0
OUTPUT_EDGES = tuple(2**power for power in range(13))
"""The distribution of output lengths is known at 1, 2, 4 … 4096 tokens."""
EDGES: Final = len(OUTPUT_EDGES)
MAX_TENANTS: Final = 4096


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


class Calibration:
    """Prefill factor g and decode coefficients W, H of a pool."""

    __slots__ = (
        "_observed_s",
        "_predicted_s",
        "_profile_h",
        "_profile_w",
        "_sums",
        "decode_error",
        "decode_samples",
        "prefill_error",
        "prefill_factor",
        "prefill_samples",
        "step_s",
        "step_s_per_sequence",
    )

    def __init__(self, step_s: float, step_s_per_sequence: float) -> None:
        self._profile_w, self._profile_h = step_s, step_s_per_sequence
        self._observed_s = self._predicted_s = PREFILL_PRIOR_S
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self.prefill_factor = 1.0
        self.step_s, self.step_s_per_sequence = step_s, step_s_per_sequence
        self.prefill_samples = self.decode_samples = 0
        self.prefill_error = self.decode_error = 0.0
        """Mean relative errors of the predicted times, fading: the smaller, the more the predictions can be trusted."""

    def observe_prefill(self, predicted_s: float, observed_s: float) -> None:
        """A prompt predicted (with factor 1) to prefill in `predicted_s` took `observed_s`."""
        expected = self.prefill_factor * predicted_s
        self.prefill_error += 0.05 * (min(abs(observed_s - expected) / max(expected, 1e-9), 1.0) - self.prefill_error)
        self._predicted_s = FADE * self._predicted_s + predicted_s
        self._observed_s = FADE * self._observed_s + max(observed_s, 0.0)
        prior = PREFILL_PRIOR_S
        self.prefill_factor = _within((self._observed_s + prior) / (self._predicted_s + prior), PREFILL_FACTOR_BOUNDS)
        self.prefill_samples += 1

    def observe_steps(self, sequences: float, step_s: float) -> None:
        """Steps with `sequences` on average took `step_s` each, context and prefill time taken off."""
        predicted = self.step_s + self.step_s_per_sequence * sequences
        step_s = _within(step_s, (predicted / STEP_SAMPLE_FACTOR, predicted * STEP_SAMPLE_FACTOR))
        self.decode_error += 0.05 * (abs(step_s - predicted) / predicted - self.decode_error)
        count, n, nn, y, ny = self._sums
        self._sums = count, n, nn, y, ny = (
            FADE * count + 1.0,
            FADE * n + sequences,
            FADE * nn + sequences * sequences,
            FADE * y + step_s,
            FADE * ny + sequences * step_s,
        )
        low, high = STEP_FACTOR_BOUNDS
        spread, covariance = max(nn - n * n / count, 0.0), ny - n * y / count
        slope = (covariance + STEP_PRIOR_SPREAD * self._profile_h) / (spread + STEP_PRIOR_SPREAD)
        self.step_s_per_sequence = h = _within(slope, (low * self._profile_h, high * self._profile_h))
        level = (y - h * n + STEP_PRIOR_SAMPLES * self._profile_w) / (count + STEP_PRIOR_SAMPLES)
        self.step_s = _within(level, (low * self._profile_w, high * self._profile_w))
        self.decode_samples += 1

    def figures(self) -> tuple[float, float, float]:
        """(g, W, H) as learned so far."""
        return self.prefill_factor, self.step_s, self.step_s_per_sequence


class Deviation:
    """How much slower one worker is than its pool's figures say, for prefill or for decode: 1 while it is alike."""

    __slots__ = ("_expected_s", "_observed_s", "factor")

    def __init__(self, prior_s: float) -> None:
        """Being alike counts as `prior_s` of observed time."""
        self._observed_s = self._expected_s = prior_s
        self.factor = 1.0

    def observe(self, expected_s: float, observed_s: float) -> None:
        self._expected_s = FADE * self._expected_s + expected_s
        self._observed_s = FADE * self._observed_s + max(observed_s, 0.0)
        ratio = self._observed_s / self._expected_s
        self.factor = 1.0 if abs(ratio - 1.0) <= ALIKE_WITHIN else _within(ratio, STEP_FACTOR_BOUNDS)


class TokenRatio:
    """Bytes per token of one model's prompts."""

    __slots__ = ("_bytes", "_tokens", "bytes_per_token")

    def __init__(self) -> None:
        self._bytes = self._tokens = 0.0
        self.bytes_per_token = DEFAULT_BYTES_PER_TOKEN

    def observe(self, prompt_bytes: int, prompt_tokens: int) -> None:
        self._bytes = FADE * self._bytes + prompt_bytes
        self._tokens = FADE * self._tokens + prompt_tokens
        ratio = (self._bytes + TOKEN_PRIOR * DEFAULT_BYTES_PER_TOKEN) / (self._tokens + TOKEN_PRIOR)
        self.bytes_per_token = _within(ratio, BYTES_PER_TOKEN_BOUNDS)


class OutputLengths:
    """Output tokens of one model's answers: the mean overall and per tenant, and the share of short ones."""

    __slots__ = ("_counts", "_samples", "_tenants", "_total", "mean")

    def __init__(self) -> None:
        self._samples = OUTPUT_PRIOR_SAMPLES
        self._total = OUTPUT_PRIOR_SAMPLES * DEFAULT_OUTPUT_TOKENS
        self._counts = [OUTPUT_PRIOR_SAMPLES * -expm1(-tokens / DEFAULT_OUTPUT_TOKENS) for tokens in OUTPUT_EDGES]
        self._tenants: dict[str, tuple[float, float]] = {}  # tenant -> (samples, sum of tokens), fading; oldest first
        self.mean = self._total / self._samples

    def observe(self, tenant: str, tokens: int) -> None:
        self._samples = FADE * self._samples + 1.0
        self._total = FADE * self._total + tokens
        counts, edge = self._counts, 1  # once a request: a plain loop takes a fifth of a list built anew
        for place in range(EDGES):
            counts[place] = FADE * counts[place] + (1.0 if tokens <= edge else 0.0)
            edge *= 2
        if tenant not in self._tenants and len(self._tenants) >= MAX_TENANTS:
            del self._tenants[next(iter(self._tenants))]
        samples, total = self._tenants.get(tenant, (0.0, 0.0))
        self._tenants[tenant] = (FADE * samples + 1.0, FADE * total + tokens)
        self.mean = self._total / self._samples

    @property
    def shares(self) -> list[float]:
        """Share of answers with at most OUTPUT_EDGES[i] tokens."""
        return [count / self._samples for count in self._counts]

    def expect(self, tenant: str, limit: int | None) -> float:
        """Tokens the next answer for this tenant will have, most likely."""
        samples, total = self._tenants.get(tenant, (0.0, 0.0))
        mean = (total + OUTPUT_PRIOR_SAMPLES * self.mean) / (samples + OUTPUT_PRIOR_SAMPLES)
        return max(mean if limit is None else min(mean, float(limit)), 1.0)

    def share_up_to(self, tokens: float) -> float:
        """Share of answers with at most so many tokens, linear between the edges."""
        counts, place, edge = self._counts, 0, 1.0
        while tokens >= edge:  # the edges are powers of two; mostly one of the first
            place += 1
            if place == EDGES:
                return counts[EDGES - 1] / self._samples
            edge *= 2.0
        if not place:
            return counts[0] * tokens / self._samples
        low = counts[place - 1]
        return (low + (counts[place] - low) * (2.0 * tokens / edge - 1.0)) / self._samples
