"""Every policy on every trace: TTFT, goodput, SLO capacity and energy, simulated; writes docs/policy-benchmark.md and its plots.

    python bench/policies.py DATA_DIR [--workers 8 --workers 32] [--seeds 3] [--load 0.3 …] [--capacity POLICY …] [--jobs 2]

The fleet is examples/bench8, with other numbers of workers where asked for. Traces are the files of DATA_DIR (and of its
directories) that `kvfleet simulate --trace` reads, and the generated load `shared-prefix`. Nothing is measured on hardware
here: the engines are simulated, the router's core is the real one.

A trace with a number of workers is a section. Each is kept in `--state` when it is done, so that a run that was interrupted
goes on where it was; the page is made of all sections there, whatever command made them. Remove the directory to begin anew.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from policy_targets import targets
from rich.console import Console

from kvfleet import simulate, simulate_plot
from kvfleet.fleet import compile_manifests
from kvfleet.simulate import COLUMNS, Experiment, Report, Result, Task, capacities, means
from kvfleet_api.manifests import load
from kvfleet_sim.outcomes import Figures
from kvfleet_sim.saturation import WANTED_ATTAINMENT
from kvfleet_sim.traces import TraceError
from kvfleet_sim.variants import policy_names
from kvfleet_sim.workload import KINDS, Load, open_load

ROOT = Path(__file__).parents[1]
FLEET = ROOT / "examples" / "bench8"
TRACES = ("mooncake", "lmcache", *KINDS)
"""What a run without --trace takes, by the beginnings of names."""


@dataclass(frozen=True, slots=True)
class Section:
    """One trace on one number of workers."""

    name: str
    workers: int
    requests: int
    seeds: int
    command: str
    cpu_s: float
    report: Report

    @property
    def title(self) -> str:
        return f"{self.name}, {self.workers} workers"

    @property
    def plot(self) -> str:
        return f"policies/{self.name}-{self.workers}.png"


def main() -> None:
    arguments = parse()
    console = Console(stderr=True)
    arguments.state.mkdir(parents=True, exist_ok=True)
    for workers in arguments.workers:
        for name, source in find_loads(arguments.data, arguments.trace, arguments.limit, console).items():
            path = arguments.state / f"{workers:04d}-{name}.json"
            if path.exists():
                console.print(f"[dim]{name}, {workers} workers: done before ({path})[/dim]", highlight=False)
                continue
            console.print(f"[bold]{name}[/bold], {workers} workers")
            path.write_bytes(orjson.dumps(asdict(run(arguments, name, workers, source, console))))
            write(arguments.docs, arguments.state)
    write(arguments.docs, arguments.state)


def run(arguments: argparse.Namespace, name: str, workers: int, source: Load, console: Console) -> Section:
    started_s = time.process_time()
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
    command = shlex.join(["python", "bench/policies.py", "DATA_DIR", *sys.argv[2:]])
    requests = len(source.requests(1.0, 0))
    return Section(name, workers, requests, arguments.seeds, command, time.process_time() - started_s, report)


def read(state: Path) -> list[Section]:
    """The sections of all runs, small fleets first."""
    return [_section(orjson.loads(path.read_bytes())) for path in sorted(state.glob("*.json"))]


def _section(document: dict[str, Any]) -> Section:
    report = document.pop("report")
    runs, found = ([_result(row) for row in report[key]] for key in ("runs", "capacities"))
    return Section(**document, report=Report(report["saturation_rps"], runs, found))


def _result(row: dict[str, Any]) -> Result:
    known = row["figures"]
    return Result(**{**row, "task": Task(**row["task"]), "figures": None if known is None else Figures(**known)})


def write(docs: Path, state: Path) -> None:
    """The page, as far as there are sections: an interrupted run leaves what it has."""
    sections = read(state)
    if not sections:
        return
    (docs / "policies").mkdir(parents=True, exist_ok=True)
    for section in sections:
        simulate_plot.draw(section.report, docs / section.plot, title=section.title)
    text = HEADER.format(
        commands="\n".join(dict.fromkeys(section.command for section in sections)),
        minutes=round(sum(section.cpu_s for section in sections) / 60),
        share=f"{WANTED_ATTAINMENT:.0%}",
        capacity=capacity_table({s.title: capacities(s.report) for s in sections if s.report.capacities}),
        targets=targets([(section.name, section.title, section.report) for section in sections]),
    )
    (docs / "policy-benchmark.md").write_text(text + "\n".join(map(tables, sections)))


HEADER = """# What the policies are worth

Simulated engines (one H100 with an 8-billion model each, `examples/bench8`), the router's own core; [simulate.md](simulate.md)
says what that means and what it leaves out, [policies.md](policies.md) what the policies are. Same arrivals for all of them. Load
is the share of the fleet's saturation rate. Written by these commands ({minutes} minutes of CPU, one process):

```
{commands}
```

## Targets

Against the best deployed router's policy of each figure (all but `kvfleet`, `kvfleet_latency`, `lmetric` and `ttft_min`).

{targets}

## SLO capacity

Requests per second with at least {share} inside their SLO: TTFT ≤ max(1 s, 3 x unloaded), mean time between tokens ≤ 50 ms.

{capacity}

TTFT (mean, p50, p99) below in seconds, ITL in milliseconds, shares in percent; bold: best of the load.

"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory of traces")
    parser.add_argument("--trace", action="append", help=f"only traces whose name begins so; default: {TRACES}")
    parser.add_argument("--workers", type=int, action="append", help="default: 8 and 32")
    parser.add_argument("--policy", action="append", choices=policy_names(), help="default: all, energy modes aside")
    parser.add_argument("--load", type=float, action="append", help="default: 0.3, 0.6, 0.8, 0.95")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="requests of each trace")
    parser.add_argument(
        "--capacity", action="append", choices=policy_names(), help="search this one's SLO capacity, too"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes")
    parser.add_argument("--state", type=Path, default=ROOT / ".bench-policies", help="where finished sections are kept")
    arguments = parser.parse_args()
    arguments.workers = arguments.workers or [8, 32]
    arguments.trace = arguments.trace or list(TRACES)
    arguments.load = arguments.load or [0.3, 0.6, 0.8, 0.95]
    arguments.capacity = arguments.capacity or []
    without = [name for name in policy_names() if name != "manifests" and ":" not in name]
    arguments.policy = arguments.policy or without
    if not arguments.data.is_dir():
        parser.error(f"{arguments.data} is not a directory: give the directory of the traces")
    return arguments


def find_loads(directory: Path, wanted: list[str], limit: int | None, console: Console) -> dict[str, Load]:
    """Loads by the name of their file, and the generated kinds."""
    loads: dict[str, Load] = {}
    names = {path.name.split(".")[0]: str(path) for path in sorted(directory.rglob("*")) if path.is_file()}
    for name, trace in [*names.items(), *((kind, kind) for kind in KINDS)]:
        if not any(name.startswith(prefix) for prefix in wanted):
            continue
        try:
            loads[name] = open_load(trace, limit)
        except TraceError as error:
            console.print(f"[dim]left out: {error}[/dim]", highlight=False)
    return loads


def tables(section: Section) -> str:
    """One table of all loads, and the plot."""
    rows = means(section.report.runs)
    seeds = "1 draw" if section.seeds == 1 else f"{section.seeds} draws"
    lines = [
        f"## {section.title}",
        "",
        f"Load 1 is {section.report.saturation_rps:.1f} requests/s; {section.requests} requests, {seeds} of arrivals.",
        "",
        "| load | policy | " + " | ".join(column[0] for column in COLUMNS) + " |",
        "| ---: | --- |" + " ---: |" * len(COLUMNS),
    ]
    for load_share in dict.fromkeys(at for at, _ in rows):
        group = {policy: row for (at, policy), row in rows.items() if at == load_share}
        for policy, row in group.items():
            cells = [simulate.cell(row, list(group.values()), *column[1:], bold="**{}**") for column in COLUMNS]
            lines.append(f"| {load_share:g} | {policy} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![TTFT and goodput of {section.title}]({section.plot})", ""])


def capacity_table(found: dict[str, dict[str, float]]) -> str:
    """Policies down, fleets across, the best of each fleet in bold."""
    if not found:
        return "Not searched."
    policies = list(dict.fromkeys(policy for rates in found.values() for policy in rates))
    lines = ["| policy | " + " | ".join(found) + " |", "| --- |" + " ---: |" * len(found)]
    for policy in policies:
        cells = []
        for rates in found.values():
            text = f"{rates[policy]:.2f}" if policy in rates else "–"
            cells.append(f"**{text}**" if rates.get(policy) == max(rates.values()) else text)
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
