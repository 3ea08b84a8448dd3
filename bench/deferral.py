"""What it is worth to keep requests that may wait for hours of lower carbon intensity; prints a table.

    python bench/deferral.py RATES [--workers 2] [--hours 24] [--load 0.3] [--share 0.3] [--wait-hours 8] [--seed 0]

RATES is a trace of client rates (ServeGen), whose first hours start at midnight. The fleet is examples/day; of the requests a share,
drawn at random, may begin up to so many hours late. Electricity is clean (210 g/kWh) from 10:00 to 18:00 and not (420) otherwise.
Simulated: the router's own code, every joule of every worker, idling included. TTFT and attainment are of the requests that may
not wait, latencies of the others count from when they were let go.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from kvfleet.fleet import compile_manifests
from kvfleet.simulate import fleet_of
from kvfleet.simulate_autoscale import elastic
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_api.manifests import load as load_manifests
from kvfleet_api.routingpolicy import DeferSpec
from kvfleet_router.core.carbon import HOUR_S, grams_by_hour
from kvfleet_sim.elastic import Elastic
from kvfleet_sim.fleet import Run, simulate
from kvfleet_sim.outcomes import Slo, inside_slo
from kvfleet_sim.rates import read_rates
from kvfleet_sim.saturation import saturation_rps
from kvfleet_sim.variants import with_policy
from kvfleet_sim.workload import LoadRequest, RateLoad

FLEET = Path(__file__).parents[1] / "examples" / "day"
DAY = TelemetrySpec.model_validate(
    {"carbonByHour": [{"hour": 10, "gramsPerKilowattHour": 210}, {"hour": 18, "gramsPerKilowattHour": 420}]}
)
DEFER = DeferSpec.model_validate({"maxSeconds": 86_400, "maxRequests": 100_000})
JOULES_PER_KWH = 3.6e6
ANSWER_TOKENS = 1000.0
STARTUP_S = 180.0


def main() -> None:
    arguments = parse()
    manifests = load_manifests([FLEET])
    compiled = compile_manifests(manifests)
    config, model = fleet_of(compiled, manifests, None, arguments.workers)
    config = config.model_copy(update={"telemetry": DAY})
    source = RateLoad(read_rates(arguments.rates), 2000, output_tokens=ANSWER_TOKENS)
    rate_rps = arguments.load * saturation_rps(config, source, model)
    requests = source.of(round(rate_rps * arguments.hours * HOUR_S)).requests(rate_rps, arguments.seed)
    draw = random.Random(arguments.seed)
    wait_s = arguments.wait_hours * HOUR_S
    marked = [replace(one, defer_s=wait_s) if draw.random() < arguments.share else one for one in requests]
    slo = Slo.of(config, model)
    total = arguments.workers
    sizes: dict[str, Callable[[], Elastic] | None] = {
        f"{total} workers": None,
        "autoscaled": partial(elastic, total, slo.ttft_s, None, STARTUP_S),
    }
    print(
        f"{len(marked)} requests, {sum(one.defer_s > 0 for one in marked)} of them may begin {arguments.wait_hours:g} h late\n"
    )
    print(
        "| fleet | kept | in SLO | TTFT mean s | p99 s | mean wait h | MJ | kg CO2 | | g/1,000 tokens | completed | failed |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size, made in sizes.items():
        base = None
        for kept in (False, True):
            run = simulate(
                deferring(with_policy(config, "kvfleet:energy"), kept),
                marked,
                model=model,
                block_tokens=source.block_tokens,
                seed=arguments.seed,
                elastic=made() if made is not None else None,
            )
            grams = grams_of(run)
            base = base or grams
            print(row(size, kept, run, config, marked, slo, grams, base), flush=True)


def deferring(config: FleetConfig, kept: bool) -> FleetConfig:
    policies = [policy.model_copy(update={"defer": DEFER if kept else None}) for policy in config.policies]
    return config.model_copy(update={"policies": policies})


def grams_of(run: Run) -> float:
    hours = grams_by_hour(DAY)
    intensities = np.array([hours[hour % 24] for hour in range(len(run.joules_by_hour))])
    return float(run.joules_by_hour @ intensities) / JOULES_PER_KWH


def row(
    size: str, kept: bool, run: Run, config: FleetConfig, marked: list[LoadRequest], slo: Slo, grams: float, base: float
) -> str:
    may_wait = np.array([one.defer_s > 0 for one in marked])
    urgent = ~may_wait & run.completed
    attained = float(np.mean(inside_slo(run, config, slo)[urgent]))
    tokens = float(np.nansum(run.output_tokens))
    waited_h = float(np.nanmean(run.deferred_s[may_wait])) / HOUR_S
    cells = [
        size,
        "yes" if kept else "no",
        f"{100 * attained:.1f}%",
        f"{np.mean(run.ttft_s[urgent]):.3f}",
        f"{np.quantile(run.ttft_s[urgent], 0.99):.2f}",
        f"{waited_h:.1f}" if kept else "",
        f"{run.joules / 1e6:.1f}",
        f"{grams / 1000:.2f}",
        f"{100 * (grams / base - 1):+.0f}%" if kept else "",
        f"{1000 * grams / tokens:.3f}",
        f"{int(run.completed.sum())}",
        f"{sum(run.failures.values())}",
    ]
    return f"| {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rates", type=Path, metavar="RATES")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--load", type=float, default=0.3, help="mean share of the saturation rate")
    parser.add_argument("--share", type=float, default=0.3, help="of requests that may wait")
    parser.add_argument("--wait-hours", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
