"""The same fleet and the same arrivals, live (processes, HTTP, real time) and in virtual time: how far apart are they?

    python bench/validate_simulator.py [--trace FILE] [--requests 300] [--load 0.7] [--workers 4] [--speed 0.5] [--policy kvfleet …]

Live: `kvfleet worker` processes, `kvfleet router`, clients on connections of their own. `--speed` below 1 stretches virtual time,
so that what the machine itself takes for HTTP (it is not part of the model) weighs less. Virtual: `kvfleet simulate`'s own
code. Prints a table: both, and the difference.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import numpy as np
from live_fleet import FLEET, Measured, Setting, measured, running, send, setting

from kvfleet_sim.fleet import simulate
from kvfleet_sim.outcomes import Slo, inside_slo
from kvfleet_sim.variants import with_policy

ROWS = (
    ("TTFT mean, s", "ttft_mean_s"),
    ("TTFT p50, s", "ttft_p50_s"),
    ("TTFT p90, s", "ttft_p90_s"),
    ("ITL mean, s", "itl_mean_s"),
    ("share in SLO", "slo_attainment"),
    ("prefix hit ratio", "hit_ratio"),
    ("completed", "completed"),
)


def main() -> None:
    arguments = parse()
    made = setting(arguments.trace, arguments.requests, arguments.load, arguments.workers)
    span_s = max(row.arrival_s for row in made.rows)
    print(
        f"{len(made.requests)} requests at {made.rate_rps:.2f} req/s ({arguments.load:g} of saturation) on {arguments.workers} "
        f"workers: {span_s:.0f} s, at {arguments.speed:g} x real time\n"
    )
    print("| policy | | live | virtual | difference |\n| --- | --- | ---: | ---: | ---: |")
    for policy in arguments.policy:
        live = asyncio.run(run_live(made, policy, arguments.speed))
        virtual = run_virtual(made, policy)
        for label, figure in ROWS:
            a, b = getattr(live, figure), getattr(virtual, figure)
            difference = f"{a / b - 1:+.1%}" if b else "–"
            print(f"| {policy} | {label} | {a:.4g} | {b:.4g} | {difference} |", flush=True)


async def run_live(made: Setting, policy: str, speed: float) -> Measured:
    with tempfile.TemporaryDirectory() as directory:
        async with running(made, Path(directory), strategy=policy, speed=speed) as fleet:
            assert fleet.router is not None
            return measured(made, await send(made, fleet.router.url, speed=speed, timeout_s=600.0))


def run_virtual(made: Setting, policy: str) -> Measured:
    config = with_policy(made.config, policy)
    run = simulate(config, made.requests, model=made.model, block_tokens=made.load.block_tokens)
    done = run.completed
    p50, p90, p99 = (float(value) for value in np.percentile(run.ttft_s[done], (50, 90, 99)))
    share = float(inside_slo(run, config, Slo.of(config, made.model)).mean())
    return Measured(
        completed=int(done.sum()),
        failed=int((~done).sum()),
        ttft_mean_s=float(run.ttft_s[done].mean()),
        ttft_p50_s=p50,
        ttft_p90_s=p90,
        ttft_p99_s=p99,
        itl_mean_s=float(run.itl_s[done].mean()),
        slo_attainment=share,
        goodput_rps=share * made.rate_rps,
        hit_ratio=float(run.cached_tokens[done].sum() / run.prompt_tokens[done].sum()),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = FLEET.parent / "traces" / "mooncake_synthetic_300.jsonl"
    parser.add_argument("--trace", default=str(shipped), help="a trace without sessions, or `shared-prefix`")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--load", type=float, default=0.7, help="share of the saturation rate")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--speed", type=float, default=0.5, help="virtual seconds in a real one")
    parser.add_argument("--policy", action="append", help="default: least_request, lmetric, kvfleet")
    arguments = parser.parse_args()
    arguments.policy = arguments.policy or ["least_request", "lmetric", "kvfleet"]
    return arguments


if __name__ == "__main__":
    main()
