"""What wrong beliefs cost each policy: SLO capacity and figures near it, simulated; writes docs/policy-robustness.md.

    python bench/robustness.py TRACE [TRACE …] [--workers 8] [--seeds 3] [--load 0.8] [--limit N] [--jobs 2]

The fleet is examples/bench8. No router is told how long an answer will be, in any row: the traces' requests carry no limit.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from rich.console import Console

from kvfleet import simulate
from kvfleet.fleet import compile_manifests
from kvfleet.simulate import Experiment, Report, capacities, means
from kvfleet_api.manifests import load
from kvfleet_sim.fleet import Options
from kvfleet_sim.traces import TraceError
from kvfleet_sim.variants import policy_names
from kvfleet_sim.workload import Load, open_load

ROOT = Path(__file__).parents[1]
FLEET = ROOT / "examples" / "bench8"
POLICIES = ["kvfleet", "lmetric", "llmd_default", "llmd_token_load", "sglang_cache_aware"]
CONDITIONS: Final = {
    "as it is": Options(),
    "prefill believed 2 x slower, decoding 2 x faster": Options(calibration_error=2.0),
    "prefill believed 2 x faster, decoding 2 x slower": Options(calibration_error=0.5),
    "KV events, at once": Options(kv_events=True),
    "KV events, 1 s late": Options(kv_events=True, event_delay_s=1.0),
    "2 routers that do not know each other": Options(replicas=2),
    "2 routers that tell each other every 5 ms": Options(replicas=2, share_s=0.005),
}
HEADER = """# What wrong beliefs cost

The fleet and the terms are those of [policy-benchmark.md](policy-benchmark.md), {seeds} draws of arrivals. No router is told how long
answers will be: kvfleet learns their lengths. Routers correct what they believe of workers' speed by what they observe, so a wrong
belief counts while they learn. Written by ({minutes} minutes of CPU, one process):

```
{command}
```
"""


def main() -> None:
    arguments = parse()
    console, started_s = Console(stderr=True), time.process_time()
    sections: list[str] = []
    for path in arguments.traces:
        try:
            source = open_load(str(path), arguments.limit)
        except TraceError as error:
            sys.exit(f"error: {error}")
        reports = {}
        for name, options in CONDITIONS.items():
            console.print(f"[bold]{path.name}[/bold]: {name}", highlight=False)
            reports[name] = run(arguments, source, options, console)
        sections.append("\n".join(section(f"{path.name.split('.')[0]}, {arguments.workers} workers", reports)))
        given = [Path(value).name if Path(value) in arguments.traces else value for value in sys.argv[1:]]
        command = shlex.join(["python", "bench/robustness.py", *given])
        minutes = round((time.process_time() - started_s) / 60)
        head = HEADER.format(seeds=arguments.seeds, minutes=minutes, command=command)
        arguments.page.write_text("\n".join([head, *sections]))


def run(arguments: argparse.Namespace, source: Load, options: Options, console: Console) -> Report:
    manifests = load([FLEET])
    config, model = simulate.fleet_of(compile_manifests(manifests), manifests, None, arguments.workers)
    return simulate.run_experiment(
        Experiment(config, model, source, options),
        policies=arguments.policy,
        loads=[arguments.load],
        seeds=arguments.seeds,
        capacity=arguments.policy,
        jobs=arguments.jobs,
        console=console,
    )


def section(title: str, reports: dict[str, Report]) -> Iterable[str]:
    """A table: conditions down; per policy its SLO capacity, and TTFT and the share inside the SLO at one load."""
    (load_share,) = {at for report in reports.values() for at, _ in means(report.runs)}
    policies = list(dict.fromkeys(policy for report in reports.values() for _, policy in means(report.runs)))
    yield from (f"## {title}", "")
    yield f"SLO capacity in requests/s · mean TTFT in ms and share inside the SLO at load {load_share:g}; bold: best of the row's"
    yield "capacities."
    yield ""
    yield "| | " + " | ".join(policies) + " |"
    yield "| --- |" + " --- |" * len(policies)
    for name, report in reports.items():
        rates, rows = capacities(report), means(report.runs)
        cells = []
        for policy in policies:
            rate, row = rates[policy], rows[load_share, policy]
            shown = f"**{rate:.2f}**" if rate == max(rates.values()) else f"{rate:.2f}"
            cells.append(f"{shown} · {row['ttft_mean_ms']:.0f} · {row['slo_attainment']:.1%}")
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--policy", action="append", choices=policy_names(), help=f"default: {', '.join(POLICIES)}")
    parser.add_argument("--load", type=float, default=0.8, help="share of the saturation rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="requests of each trace")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "policy-robustness.md")
    arguments = parser.parse_args()
    arguments.policy = arguments.policy or POLICIES
    return arguments


if __name__ == "__main__":
    main()
