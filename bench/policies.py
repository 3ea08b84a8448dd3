"""Every policy on every trace: TTFT, goodput, SLO capacity and energy, simulated; writes docs/policies.md and its plots.

    python bench/policies.py DATA_DIR [--workers 8 --workers 32] [--seeds 3] [--load 0.3 …] [--capacity] [--jobs 2]

The fleet is examples/bench8, with other numbers of workers where asked for. Traces are the files of DATA_DIR that
`kvfleet simulate --trace` reads, and the generated load `shared-prefix`. Nothing is measured on hardware here: the engines
are simulated, the router's core is the real one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from rich.console import Console

from kvfleet import simulate, simulate_plot
from kvfleet.fleet import compile_manifests
from kvfleet.simulate import COLUMNS, Experiment, Report, capacities, means
from kvfleet_api.manifests import load
from kvfleet_sim.saturation import WANTED_ATTAINMENT
from kvfleet_sim.traces import TraceError
from kvfleet_sim.variants import policy_names
from kvfleet_sim.workload import KINDS, Load, open_load

ROOT = Path(__file__).parents[1]
FLEET = ROOT / "examples" / "bench8"


def main() -> None:
    arguments = parse()
    console = Console(stderr=True)
    loads = find_loads(arguments.data, arguments.trace, arguments.limit, console)
    sections: list[str] = []
    found: dict[str, dict[str, float]] = {}
    started = time.monotonic()
    for workers in arguments.workers:
        for name, source in loads.items():
            console.print(f"[bold]{name}[/bold], {workers} workers")
            manifests = load([FLEET])
            config, model = simulate.fleet_of(compile_manifests(manifests), manifests, None, workers)
            report = simulate.run_experiment(
                Experiment(config, model, source),
                policies=arguments.policy,
                loads=arguments.load,
                seeds=arguments.seeds,
                capacity=arguments.capacity,
                jobs=arguments.jobs,
                console=console,
            )
            plot = arguments.docs / "policies" / f"{name}-{workers}.png"
            plot.parent.mkdir(parents=True, exist_ok=True)
            simulate_plot.draw(report, plot, title=f"{name}, {workers} workers")
            sections.append(section(f"{name}, {workers} workers", report, f"policies/{plot.name}"))
            found[f"{name}, {workers}"] = capacities(report)
            write(arguments, sections, found, time.monotonic() - started)


def write(
    arguments: argparse.Namespace, sections: list[str], found: dict[str, dict[str, float]], took_s: float
) -> None:
    """The page as far as it goes: an interrupted run leaves what it has."""
    text = HEADER.format(
        command=" ".join(["python bench/policies.py DATA_DIR", *sys.argv[2:]]),
        minutes=math.ceil(took_s / 60),
        jobs=arguments.jobs,
        share=f"{WANTED_ATTAINMENT:.0%}",
        capacity=capacity_table(found, arguments.policy) if arguments.capacity else "Not searched in this run.",
    )
    (arguments.docs / "policies.md").write_text(text + "\n".join(sections))


HEADER = """# What the policies are worth

Written by `{command}` ({minutes} minutes, {jobs} processes). Simulated engines (one H100 with an 8-billion model each, `examples/bench8`),
the router's own core; [simulate.md](simulate.md) says what that means and what it leaves out. Averages over the seeds. Load is the
share of the fleet's saturation rate. TTFT (mean, p50, p99) in seconds, ITL in milliseconds, shares in percent; bold: best of the load.

## SLO capacity

Requests per second with at least {share} inside their SLO: TTFT ≤ max(1 s, 3 x unloaded), mean time between tokens ≤ 50 ms.

{capacity}

"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory of traces")
    parser.add_argument("--trace", action="append", default=[], help="only traces whose name begins so; repeat")
    parser.add_argument("--workers", type=int, action="append", help="default: 8 and 32")
    parser.add_argument("--policy", action="append", choices=policy_names(), help="default: all")
    parser.add_argument("--load", type=float, action="append", help="default: 0.3, 0.6, 0.8, 0.95")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="requests of each trace")
    parser.add_argument("--capacity", action="store_true", help="search each policy's SLO capacity, too")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the results go")
    arguments = parser.parse_args()
    arguments.workers = arguments.workers or [8, 32]
    arguments.load = arguments.load or [0.3, 0.6, 0.8, 0.95]
    arguments.policy = arguments.policy or [name for name in policy_names() if name != "manifests"]
    if not arguments.data.is_dir():
        parser.error(f"{arguments.data} is not a directory: give the directory of the traces")
    return arguments


def find_loads(directory: Path, wanted: list[str], limit: int | None, console: Console) -> dict[str, Load]:
    """Loads by the name of their file, and the generated kinds."""
    loads: dict[str, Load] = {}
    names = {path.name.split(".")[0]: str(path) for path in sorted(directory.iterdir()) if path.is_file()}
    for name, trace in [*names.items(), *((kind, kind) for kind in KINDS)]:
        if wanted and not any(name.startswith(prefix) for prefix in wanted):
            continue
        try:
            loads[name] = open_load(trace, limit)
        except TraceError as error:
            console.print(f"[dim]left out: {error}[/dim]", highlight=False)
    return loads


def section(title: str, report: Report, plot: str) -> str:
    """One table of all loads, and the plot."""
    rows = means(report.runs)
    lines = [f"## {title}", "", f"Load 1 is {report.saturation_rps:.1f} requests/s.", ""]
    lines += [
        "| load | policy | " + " | ".join(column[0] for column in COLUMNS) + " |",
        "| ---: | --- |" + " ---: |" * len(COLUMNS),
    ]
    for load_share in dict.fromkeys(at for at, _ in rows):
        group = {policy: row for (at, policy), row in rows.items() if at == load_share}
        for policy, row in group.items():
            cells = [simulate.cell(row, list(group.values()), *column[1:], bold="**{}**") for column in COLUMNS]
            lines.append(f"| {load_share:g} | {policy} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![TTFT and goodput of {title}]({plot})", ""])


def capacity_table(found: dict[str, dict[str, float]], policies: list[str]) -> str:
    """Policies down, fleets across, the best of each fleet in bold."""
    best = {name: max(rates.values()) for name, rates in found.items()}
    lines = ["| policy | " + " | ".join(found) + " |", "| --- |" + " ---: |" * len(found)]
    for policy in policies:
        cells = [
            f"**{rates[policy]:.2f}**" if rates[policy] == best[name] else f"{rates[policy]:.2f}"
            for name, rates in found.items()
        ]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
