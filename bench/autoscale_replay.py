"""The autoscaler over a trace of request rates, in virtual time: what it saves, and what late workers cost.

    python bench/autoscale_replay.py --rates RATES.csv[.gz] [--category NAME] [--startup-s 60 180 300] [--from-day 7]

RATES has a header and the columns `t_s` (seconds) and `total_rate_rps`, and `category` where it holds several traces,
such as the sums over clients of ServeGen's traces (github.com/alibaba/ServeGen, Apache-2.0). Rates are scaled so that
the peak needs `--peak-replicas` workers.

The model is a fluid one, meant to compare rules, not to predict latencies: a request is in flight for `--request-s`, a
worker carries its target of `--sequences` and a quarter more, the rest waits in the router's queue. Arrivals vary
around the rate by `--noise` every ten seconds. A request meets the objective if the queue it joins is gone within
`--slo-s`. A worker counts from the moment it is wanted until it is drained. Decisions are those of the operator, every
15 s, by the very code that runs there.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfleet_api.modelpool import AutoscalingSpec, ForecastSpec
from kvfleet_operator.autoscale.autoscaler import Autoscaler, PoolStep
from kvfleet_operator.autoscale.decide import Workers
from kvfleet_operator.autoscale.readings import Quality, Reading

STEP_S = 5
TICK_S = 15
NOISE_S = 10
DAY_S = 86_400
BURST = 1.25
"""A worker carries this much more than its target before requests wait."""


@dataclass(frozen=True, slots=True)
class Load:
    """Arrivals per STEP_S, and what a worker can do."""

    arrivals: Sequence[float]
    request_s: float
    sequences: float
    slo_s: float
    measured_from_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    attainment: float
    replica_hours: float
    largest: int
    changes: int


class Fluid:
    """The pool as a fluid: in flight, queued, ready, starting."""

    def __init__(self, load: Load, ready: int, startup_s: float) -> None:
        self.load, self.startup_s = load, startup_s
        self.in_flight = self.queued = 0.0
        self.ready = ready
        self.starting: deque[tuple[float, int]] = deque()

    @property
    def wanted(self) -> int:
        return self.ready + sum(count for _, count in self.starting)

    def scale(self, wanted: int, now_s: float) -> None:
        """More: they start. Fewer: the latest that still start go first."""
        surplus = self.wanted - wanted
        if surplus < 0:
            self.starting.append((now_s + self.startup_s, -surplus))
        while surplus > 0 and self.starting:
            ready_at_s, count = self.starting.pop()
            if count > surplus:
                self.starting.append((ready_at_s, count - surplus))
            surplus = max(0, surplus - count)
        self.ready -= max(0, surplus)

    def advance(self, arrivals: float, now_s: float) -> bool:
        """One step; whether what arrived meets the objective."""
        while self.starting and self.starting[0][0] <= now_s:
            self.ready += self.starting.popleft()[1]
        room = self.ready * self.load.sequences * BURST
        left = math.exp(-STEP_S / self.load.request_s)
        left_of_entering = (1 - left) * self.load.request_s / STEP_S
        self.in_flight *= left
        waiting = self.queued + arrivals
        entering = min(waiting, max(0.0, room - self.in_flight) / left_of_entering)
        self.in_flight += entering * left_of_entering
        self.queued = waiting - entering
        throughput = room / self.load.request_s
        return self.queued <= self.load.slo_s * throughput

    @property
    def occupied(self) -> float:
        """Workers that exist: wanted, or still draining."""
        return max(self.wanted, self.in_flight / (self.load.sequences * BURST))


Rule = Callable[[Fluid, float], int]


def replay(load: Load, start: int, startup_s: float, rule: Rule) -> Outcome:
    """The whole trace under one rule."""
    pool = Fluid(load, start, startup_s)
    met = arrived = replica_s = 0.0
    largest = changes = 0
    for index, arrivals in enumerate(load.arrivals):
        now_s = float(index * STEP_S)
        if index * STEP_S % TICK_S == 0:
            wanted = rule(pool, now_s)
            changes += wanted != pool.wanted and now_s >= load.measured_from_s
            pool.scale(wanted, now_s)
        in_time = pool.advance(arrivals, now_s)
        if now_s >= load.measured_from_s:
            met += arrivals * in_time
            arrived += arrivals
            replica_s += pool.occupied * STEP_S
            largest = max(largest, pool.wanted)
    return Outcome(met / arrived, replica_s / 3600, largest, changes)


def fixed(replicas: int) -> Rule:
    return lambda pool, now_s: replicas


def autoscaled(spec: AutoscalingSpec, startup_s: float, *, forecasting: bool) -> Rule:
    """The operator's rule, with the readings its routers would give."""
    autoscaler = Autoscaler()
    spec = spec.model_copy(update={"forecast": ForecastSpec(mode="Raise" if forecasting else "Off")})

    def decide(pool: Fluid, now_s: float) -> int:
        demand = pool.in_flight + pool.queued
        reading = Reading("concurrency", "AverageValue", Quality.FRESH, demand, pool.load.sequences)
        busy = Reading("busy", "Value", Quality.FRESH, demand, 1.0)
        step = PoolStep(
            "bench/pool",
            spec,
            Workers(pool.wanted, pool.ready),
            [reading],
            busy,
            busy,
            startup_s=startup_s,
        )
        return autoscaler.step([step], now_s)["bench/pool"].decision.desired

    return decide


def read_rates(path: Path, category: str | None) -> tuple[list[float], list[float]]:
    """Times and rates of one category, in order of time."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = list(csv.DictReader(file))
    names = sorted({row.get("category", "") for row in rows})
    chosen = category or names[0]
    if chosen not in names:
        raise SystemExit(f"--category {chosen!r} is not in {path}: choose one of {', '.join(names)}")
    points = sorted(
        (float(row["t_s"]), float(row["total_rate_rps"])) for row in rows if row.get("category", "") == chosen
    )
    return [at_s for at_s, _ in points], [rate for _, rate in points]


def arrivals_of(times: Sequence[float], rates: Sequence[float], noise: float, seed: int) -> list[float]:
    """Requests per STEP_S: rates interpolated between their windows' starts, with gamma noise of mean 1."""
    draw = random.Random(seed)
    arrivals, window, factor = [], 0, 1.0
    for index in range(int(times[-1] // STEP_S)):
        at_s = index * STEP_S
        while times[window + 1] < at_s:
            window += 1
        along = (at_s - times[window]) / (times[window + 1] - times[window])
        rate = rates[window] + (rates[window + 1] - rates[window]) * along
        if noise and at_s % NOISE_S == 0:
            factor = draw.gammavariate(1 / noise**2, noise**2)
        arrivals.append(rate * factor * STEP_S)
    return arrivals


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rates", type=Path, required=True, help="CSV of t_s,total_rate_rps[,category], may be gzip")
    parser.add_argument("--category", help="which of several traces; default: the first by name")
    parser.add_argument("--startup-s", type=float, nargs="+", default=[60.0, 180.0, 300.0])
    parser.add_argument("--peak-replicas", type=int, default=20)
    parser.add_argument("--sequences", type=float, default=48.0, help="target of a worker")
    parser.add_argument("--request-s", type=float, default=12.0, help="mean time in flight")
    parser.add_argument("--slo-s", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=0.15)
    parser.add_argument("--from-day", type=float, default=7.0, help="measure from here; forecasts learn before")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    times, rates = read_rates(args.rates, args.category)
    per_worker_rps = args.sequences / args.request_s
    factor = args.peak_replicas * per_worker_rps / max(rates)
    rates = [rate * factor for rate in rates]
    arrivals = arrivals_of(times, rates, args.noise, args.seed)
    load = Load(arrivals, args.request_s, args.sequences, args.slo_s, args.from_day * DAY_S)
    mean = math.ceil(sum(rates) / len(rates) / per_worker_rps)
    spec = AutoscalingSpec.model_validate({"minReplicas": 1, "maxReplicas": 2 * args.peak_replicas})
    print(
        f"{'rule':<22}{'start-up s':>11}{'in SLO':>9}{'replica-h':>11}{'of peak':>9}{'largest':>9}{'changes':>9}{'wall s':>8}"
    )
    reference = replay(load, args.peak_replicas, 0.0, fixed(args.peak_replicas))
    report("fixed at the peak", 0.0, reference, reference)
    report("fixed at the mean", 0.0, replay(load, mean, 0.0, fixed(mean)), reference)
    for startup_s in args.startup_s:
        for forecasting in (False, True):
            begun = time.perf_counter()
            rule = autoscaled(spec, startup_s, forecasting=forecasting)
            outcome = replay(load, mean, startup_s, rule)
            name = "autoscaled, forecast" if forecasting else "autoscaled"
            report(name, startup_s, outcome, reference, time.perf_counter() - begun)


def report(name: str, startup_s: float, outcome: Outcome, reference: Outcome, wall_s: float = 0.0) -> None:
    share = outcome.replica_hours / reference.replica_hours
    print(
        f"{name:<22}{startup_s:>11.0f}{outcome.attainment:>9.2%}{outcome.replica_hours:>11.0f}{share:>9.1%}"
        f"{outcome.largest:>9}{outcome.changes:>9}{wall_s:>8.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
