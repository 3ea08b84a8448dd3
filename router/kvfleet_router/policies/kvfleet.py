"""kvfleet: send each request where it costs least: its own time, the others' time, the SLO, energy.

    cost = TTFT + φ·ρ·own + harm + evict + slo + λ·ΔE                                  seconds, argmin

    ρ      = min(1, .1 + share/.3)                                                     how busy with prefills it is
    TTFT   = backlog + own + step + kv_wait                                            (core/predict.py)
    harm   = aP·own·n_dec + bD·E·[(H + C·(L + E/2))·n1 + H·n1 + C·ctx]                 what it slows, and is slowed
    evict  = gE·max(0, u + E − free)·Pp·exp(−age of the LRU tail / 60 s)               what it pushes out of the cache
    slo    = gI·[v(itl1) + n1·(v(itl1) − v(itl0))] + gT·σ((TTFT − m·slack)/(.05·slack))   marginal goodput
             + gS·Σ [F(l + own/spare) − F(max(a, l))]/(1 − F(a))                           answers this prefill ruins
             over the n_pending (a = l = 1) and the YOUNG that began last to decode; F: share of answers so short
             a: tokens it has by now, l = 1 + (prefill it was and will be stalled by)/spare, spare = SLO − step
             itl0 = step/(1 − share), itl1 = (step + H + C·L)/(1 − share − own/20 s), share = time spent in prefill
             v(x) = σ((x − m·SLO)/(.06·SLO)), m = the margin
    ΔE     = ep·u + E·(E1 + Ec·(L + E/2)) + (E0 − P_idle·W)·E·(1 + B·n1)/(n1 + 1)      joules it adds
    B      = max(v(itl1), σ(…TTFT…)), 1 where the deadline is over: that it breaks an objective

    L prompt tokens, u uncached, E expected output, n_dec decoding, n1 decoding and pending, slack = deadline − now.

Intent. Backlog is measured in time, so a short prompt does not queue behind an 80k one. Own prefill is others' waiting time as
far as others come while it lasts: on a worker that seldom prefills it is not. A router that does not know of the others' requests
cannot tell, and sees what is cached as the best sign of where they are. The SLO term is marginal: a worker
beyond its SLO costs nothing more, so overload is concentrated instead of pushing every worker just over the line. Its stall
term is what means over 20 s miss: an answer of few tokens has no time to recover from one long prefill right behind its own,
and the prompts pending on a worker are exactly those whose answers begin when this prefill does. An answer longer than its
stalls cost in spare time is safe, and one that cannot become so is lost already: neither counts. While the winner's backlog exceeds θ the request stays at the router, where it can still go
elsewhere.

Where candidates' accelerators differ, the SLO's prices are higher (UNLIKE): to a long prompt a fast accelerator is worth seconds, more than
an objective would cost, and the fast ones would get all of them while the slow ones have time. For the same reason a joule costs up to
twice as much there.

With energy, an objective comes first: what a worker would save by sharing its steps does not count as far as it would break one (B),
however much a model's requests take. The SLO weighs more and its margin is earlier (the guard), and joules have a price: load gathers on few
workers. As load rises first the guard, then the price fades out, until the policy is the latency policy again.

Inputs: the router's own accounting, the prefix index, the cost model with its calibration. No engine metrics.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from math import exp
from typing import ClassVar, Final

import numpy as np

from kvfleet_api.fleetconfig import PolicyConfig
from kvfleet_router.core.calibration import OUTPUT_EDGES
from kvfleet_router.core.columns import YOUNG, Array, Columns
from kvfleet_router.core.energy import marginal_joules, marginal_joules_many
from kvfleet_router.core.policy import Policy
from kvfleet_router.core.predict import ttft_parts, ttft_parts_many
from kvfleet_router.core.ticket import Arrival
from kvfleet_router.core.worker import PREFILL_SHARE_WINDOW_S, Worker


@dataclass(frozen=True, slots=True)
class Weights:
    """The policy's constants; symbols in brackets are those of the formula."""

    own_prefill: float  # [φ] own prefill time again, on a worker busy with prefills: it is others' waiting time
    prefill_harm: float  # [aP] seconds of prefill x sequences it interrupts
    decode_harm: float  # [bD] seconds of slower steps, its own and the others'
    eviction: float  # [gE] seconds to prefill again what it evicts
    hold_above_s: float  # [θ] backlog above which a request is held
    itl_slo_s: float  # [gI] price of a sequence beyond its ITL SLO
    ttft_slo_s: float  # [gT] price of a request beyond its TTFT SLO
    stall_s: float  # [gS] price of a short answer that this prefill stalls beyond its ITL SLO
    itl_margin: float = 0.95  # [m] of the SLO
    ttft_margin: float = 0.9  # [m] of the slack


LATENCY = Weights(
    own_prefill=1.5,
    prefill_harm=0.02,
    decode_harm=0.03,
    eviction=1.0,
    hold_above_s=0.2,
    itl_slo_s=0.0,
    ttft_slo_s=0.0,
    stall_s=0.0,
)
"""LAT: least mean TTFT, indifferent to SLOs."""
GOODPUT = Weights(
    own_prefill=1.5,
    prefill_harm=0.0,
    decode_harm=0.03,
    eviction=1.0,
    hold_above_s=0.1,
    itl_slo_s=0.3,
    ttft_slo_s=0.3,
    stall_s=3.0,
)
"""GP: most requests inside their SLO; the default."""
UNLIKE = replace(GOODPUT, own_prefill=0.0, itl_slo_s=3.0, stall_s=6.0)
"""GP where accelerators differ: the fast ones are worth seconds to a long prompt, and with the prices above would get all of them,
beyond the SLO, while the slow ones have time."""
UNLIKE_LATENCY = replace(LATENCY, own_prefill=0.0, prefill_harm=0.005, itl_slo_s=0.3, stall_s=3.0)
"""LAT where accelerators differ: the mean, too, is worse where all long prompts gather on the fast ones."""
GUARD = replace(
    GOODPUT, own_prefill=0.5, decode_harm=0.01, itl_slo_s=1.0, ttft_slo_s=1.0, itl_margin=0.6, ttft_margin=0.6
)
"""GP while energy has its full price: the SLO weighs more, and from 60 % on; seconds that keep within it weigh less."""

GUARD_FADES: tuple[float, float] = (0.45, 0.6)  # not Final: compiled by mypyc, a Final pair of floats is never set
PRICE_FADES: tuple[float, float] = (0.6, 0.75)
"""Load of the pools (0 idle, 1 at the edge of the SLO) between which the guard and the price of energy fade out. It swings by some
0.1 around the share of the capacity that is asked for: at 0.8 of it the policy is the latency policy nearly all the time. The guard
goes first: among busy workers keeping to 60 % of the SLO would scatter over the dear ones what the price gathers."""
FADING_STEPS: Final = 20
_EDGES: Final = np.array(OUTPUT_EDGES, dtype=np.float64)

BUSY_PREFILL_SHARE: Final = 0.3
"""[ρ] Share of its time in prefill from which on a worker's prefills are taken to delay others. With φ in full on short prompts,
cached prefixes weigh too much: mean TTFT is 5 % above that of lmetric."""
LEAST_BUSY: Final = 0.1
"""[ρ] of an idle worker: enough for what it caches to count among equals."""
EVICTION_AGE_S: Final = 60.0
ITL_SHARPNESS: Final = 0.06
TTFT_SHARPNESS: Final = 0.05
MIN_SPARE_ITL: Final = 0.1
"""Part of the ITL SLO that is counted as spare even where there is none: beyond the SLO, what comes costs no more."""
MIN_DECODE_SHARE: Final = 0.02
"""Decoding never starves entirely, whatever the prefill share says."""


class KVFleet(Policy):
    parts = ("backlog", "prefill", "step", "kv_wait", "prefill_weight", "harm", "evict", "slo", "energy")
    uses_prefix = True
    measures_cost = True
    in_seconds = True
    columns_from = 40
    tie = 0.0005

    latency: ClassVar[Weights] = GOODPUT
    unlike: ClassVar[Weights] = UNLIKE

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.hold_above_s = self.latency.hold_above_s
        self._itl_slo_s = config.itl_slo_s
        self._prices_energy = config.energy_mode != "Off"
        self._built: dict[float, list[Weights]] = {}

    def _weights(self, arrival: Arrival) -> tuple[Weights, float]:
        """The constants and, with energy, the price of a joule (s/J) at this load."""
        fading = self._built.get(arrival.unlike)
        if fading is None:
            fading = self._built[arrival.unlike] = self._fading(arrival.unlike)
        price = _left(arrival.load, PRICE_FADES) if self._prices_energy else 0.0
        if not price:
            return fading[0], 0.0
        guard = _left(arrival.load, GUARD_FADES)
        price *= (1.0 + arrival.unlike) * self.config.energy_s_per_joule
        return fading[round(guard * FADING_STEPS)], price

    def _fading(self, unlike: float) -> list[Weights]:
        """From those without the guard to the guard's, in FADING_STEPS."""
        plain = _between(self.latency, self.unlike, unlike)
        return [_between(plain, GUARD, step / FADING_STEPS) for step in range(FADING_STEPS + 1)]

    def score(self, arrival: Arrival, worker: Worker, cached_tokens: float, now: float) -> tuple[float, ...]:
        weights, price = self._weights(arrival)
        backlog, own, step, kv_wait = ttft_parts(arrival, worker, cached_tokens, now)
        ttft = backlog + own + step + kv_wait
        prompt, expected = arrival.prompt_tokens, arrival.expected_output_tokens
        uncached = prompt - cached_tokens
        pending, decoding = worker.pending, worker.decoding
        sequences = pending + decoding
        per_sequence, per_token = worker.step_s_per_sequence, worker.step_s_per_context_token

        share = worker.prefill_share
        if share:
            share *= exp((worker.prefill_share_at - now) / PREFILL_SHARE_WINDOW_S)

        harm = slo = 0.0
        if sequences:
            added = per_sequence * 2.0 + per_token * (prompt + expected / 2)
            harm = weights.decode_harm * expected * (added * sequences + per_token * worker.context_tokens)
            harm += weights.prefill_harm * own * decoding

        evict = 0.0
        overflow = uncached + arrival.received_tokens + expected - worker.kv_free_tokens
        if overflow > 0.0:
            age = max(now - worker.tail_used_at, 0.0)
            evict = weights.eviction * overflow * worker.prefill_s_per_token * exp(-age / EVICTION_AGE_S)

        breach = 0.0
        if weights.itl_slo_s:
            target = self._itl_slo_s
            middle, width = weights.itl_margin * target, ITL_SHARPNESS * target
            free = 1.0 - share
            left = free - own / PREFILL_SHARE_WINDOW_S
            step_with = step + per_sequence + per_token * prompt
            itl_with = step_with / (left if left > MIN_DECODE_SHARE else MIN_DECODE_SHARE)
            after = breach = _sigmoid((itl_with - middle) / width)
            slo = weights.itl_slo_s * after
            if sequences:
                itl = step / (free if free > MIN_DECODE_SHARE else MIN_DECODE_SHARE)
                slo += weights.itl_slo_s * sequences * (after - _sigmoid((itl - middle) / width))
                spare, least = target - step, MIN_SPARE_ITL * target
                slo += weights.stall_s * _stalled(arrival, own, spare if spare > least else least, worker, now)
        slack = arrival.deadline - now
        if weights.ttft_slo_s:
            late = 1.0
            if slack > 0.0:
                late = _sigmoid((ttft - weights.ttft_margin * slack) / (TTFT_SHARPNESS * slack))
                slo += weights.ttft_slo_s * late
            if late > breach:
                breach = late

        energy = price * marginal_joules(arrival, worker, uncached, breach) if price else 0.0
        busy = LEAST_BUSY + share / BUSY_PREFILL_SHARE
        own_weight = weights.own_prefill * own * (busy if busy < 1.0 and not arrival.blind else 1.0)
        return backlog, own, step, kv_wait, own_weight, harm, evict, slo, energy

    def score_many(self, arrival: Arrival, workers: Columns, cached_tokens: Array, now: float) -> tuple[Array, ...]:
        weights, price = self._weights(arrival)
        backlog, own, step, kv_wait = ttft_parts_many(arrival, workers, cached_tokens, now)
        ttft = backlog + own + step + kv_wait
        prompt, expected = arrival.prompt_tokens, arrival.expected_output_tokens
        uncached = prompt - cached_tokens
        pending, decoding = workers.pending, workers.decoding
        sequences = pending + decoding
        per_sequence, per_token = workers.step_s_per_sequence, workers.step_s_per_context_token

        share = workers.prefill_share * np.exp((workers.prefill_share_at - now) / PREFILL_SHARE_WINDOW_S)

        added = per_sequence * 2.0 + per_token * (prompt + expected / 2)
        harm = weights.decode_harm * expected * (added * sequences + per_token * workers.context_tokens)
        if weights.prefill_harm:
            harm += weights.prefill_harm * own * decoding

        evict = np.zeros_like(own)
        overflow = uncached + arrival.received_tokens + expected - workers.kv_free_tokens
        if overflow.max() > 0.0:
            age = np.maximum(now - workers.tail_used_at, 0.0)
            tokens = np.maximum(overflow, 0.0)
            evict = weights.eviction * tokens * workers.prefill_s_per_token * np.exp(-age / EVICTION_AGE_S)

        slo = np.zeros_like(own)
        breach = np.zeros_like(own)
        if weights.itl_slo_s:
            target = self._itl_slo_s
            middle, width = weights.itl_margin * target, ITL_SHARPNESS * target
            free = 1.0 - share
            step_with = step + per_sequence + per_token * prompt
            itl_with = step_with / np.maximum(free - own / PREFILL_SHARE_WINDOW_S, MIN_DECODE_SHARE)
            after = breach = _sigmoids((itl_with - middle) / width)
            itl = step / np.maximum(free, MIN_DECODE_SHARE)
            slo = weights.itl_slo_s * (after + sequences * (after - _sigmoids((itl - middle) / width)))
            spare = np.maximum(target - step, MIN_SPARE_ITL * target)
            slo += weights.stall_s * _stalled_many(arrival, own, spare, workers, now)
        slack = arrival.deadline - now
        if weights.ttft_slo_s:
            late = np.ones_like(own)
            if slack > 0.0:
                late = _sigmoids((ttft - weights.ttft_margin * slack) / (TTFT_SHARPNESS * slack))
                slo = slo + weights.ttft_slo_s * late
            breach = np.maximum(breach, late)

        energy = price * marginal_joules_many(arrival, workers, uncached, breach) if price else np.zeros_like(own)
        busy = 1.0 if arrival.blind else np.minimum(LEAST_BUSY + share / BUSY_PREFILL_SHARE, 1.0)
        own_weight = weights.own_prefill * own * busy
        return backlog, own, step, kv_wait, own_weight, harm, evict, slo, energy


class KVFleetLatency(KVFleet):
    """The same with the LAT constants."""

    latency = LATENCY
    unlike = UNLIKE_LATENCY


def _left(load: float, fades: tuple[float, float]) -> float:
    """1 below the span, 0 above it, a line between."""
    full_below, off_above = fades
    return min(max((off_above - load) / (off_above - full_below), 0.0), 1.0)


def _between(low: Weights, high: Weights, share: float) -> Weights:
    return Weights(*((1.0 - share) * a + share * b for a, b in zip(astuple(low), astuple(high), strict=True)))


def _stalled(arrival: Arrival, own: float, spare: float, worker: Worker, now: float) -> float:
    """Answers on the worker expected to end beyond their ITL SLO because of this prefill, and not otherwise.

    `spare`: seconds a token may take beyond a step. An answer that was in prefills' way for so long needs 1 + (what it
    suffered)/spare tokens to be inside the SLO on average: it is ruined if it ends between that length without this prefill
    and that with it.
    """
    outputs = arrival.outputs
    more = own / spare
    stalled = worker.pending * (outputs.share_up_to(1.0 + more) - outputs.share_up_to(1.0)) if worker.pending else 0.0
    backlog, prefill_seconds, step = worker.backlog_s, worker.prefill_seconds, worker.step_now_s
    running = min(now - worker.head_since, worker.head_prefill_s) if backlog else 0.0
    # A decision's innermost loop: locals, no min and max.
    for since, prefilled in worker.decoding_since[: -YOUNG - 1 : -1]:
        suffered = prefill_seconds - prefilled
        safe = 1.0 + (suffered + backlog) / spare
        decoded = now - since - suffered - running
        age = 1.0 + decoded / step if decoded > 0.0 else 1.0
        if age < safe + more:
            past = outputs.share_up_to(age)
            if past < 1.0:
                until = outputs.share_up_to(safe + more)
                stalled += (until - (past if age > safe else outputs.share_up_to(safe))) / (1.0 - past)
    return stalled


def _stalled_many(arrival: Arrival, own: Array, spare: Array, workers: Columns, now: float) -> Array:
    """`_stalled` for every worker of the columns. Only answers that may be ruined are looked at closely: of many workers few."""
    shares = np.array(arrival.outputs.shares)
    more = own / spare
    stalled: Array = workers.pending * (np.interp(1.0 + more, _EDGES, shares) - shares[0])
    rows = min(int(workers.decoding.max()), YOUNG)  # none has more of them
    if not rows:
        return stalled
    running = np.where(workers.backlog_s > 0.0, np.minimum(now - workers.head_since, workers.head_prefill_s), 0.0)
    since, prefilled = workers.youngest[:rows], workers.youngest[YOUNG : YOUNG + rows]
    suffered = workers.prefill_seconds - prefilled
    safe = 1.0 + (suffered + workers.backlog_s) / spare
    age = 1.0 + np.maximum(now - since - suffered - running, 0.0) / workers.step_now_s
    until = safe + more
    open_at = np.flatnonzero(age < until)
    if not len(open_at):
        return stalled
    safe, age, until = safe.ravel()[open_at], age.ravel()[open_at], until.ravel()[open_at]
    past = np.minimum(np.interp(age, _EDGES, shares), 1.0 - 1e-12)
    ruined = np.interp(until, _EDGES, shares) - np.interp(np.maximum(age, safe), _EDGES, shares)
    stalled += np.bincount(open_at % len(own), ruined / (1.0 - past), len(own))
    return stalled


def _sigmoid(x: float) -> float:
    """[σ] Flat beyond ±30, where it is 0 or 1 to 13 digits."""
    if x < -30.0:
        return 0.0
    if x > 30.0:
        return 1.0
    return 1.0 / (1.0 + exp(-x))


def _sigmoids(x: Array) -> Array:
    result: Array = 1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0)))
    return result
