"""What energy mode saves: J/token and SLO attainment of Prefer beside Off and two baselines; writes tables for docs/energy.md.

    python bench/energy.py DATA_DIR [--limit 2000] [--write]

DATA_DIR holds the traces (docs/simulate.md says which are read). Fleets are those of examples/bench8 (one kind of accelerator)
and examples/mixed (two kinds). Load is the share of the fleet's saturation rate. Every joule of every worker counts, idling
included. `static N` is the honest baseline: `lmetric` over the smallest number of workers, picked by trying all, that loses at
most one point of attainment; the others idle. `parked`: workers idle for a minute are stopped, and take a minute to start;
their devices are given back (0 W) or `kept` (75 W: an H100 without a process, docs/gpu-energy.md). Simulated, with the bundled
profiles; `E0 halved` is the same fleet with half the energy of a step, believed and true.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kvfleet import simulate
from kvfleet.fleet import compile_manifests
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_api.manifests import load as load_manifests
from kvfleet_sim.elastic import Elastic, Parking
from kvfleet_sim.fleet import simulate as run_fleet
from kvfleet_sim.outcomes import Figures, Slo, figures
from kvfleet_sim.saturation import saturation_rps
from kvfleet_sim.variants import with_policy
from kvfleet_sim.workload import SHARED_PREFIX, Load, open_load

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "energy.md"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
PARK_S = STARTUP_S = 60.0
KEPT_WATTS = 75.0
WANTED_LOSS = 0.01
SHARED_PREFIX_FACTOR = 2
"""Requests of the generated load, as a multiple of the limit: they are short."""
LOADS = (0.3, 0.6, 0.8, 0.95)
TRACES = ("mooncake_conversation_first_half.jsonl.gz", "mooncake_synthetic.jsonl.gz", SHARED_PREFIX)


@dataclass(frozen=True, slots=True)
class Case:
    """A fleet under a load."""

    name: str
    config: FleetConfig
    model: str
    load: Load
    saturation_rps: float

    def run(
        self, policy: str, share: float, *, parked_watts: float | None = None, config: FleetConfig | None = None
    ) -> Figures:
        chosen = with_policy(config or self.config, policy)
        rate_rps = share * self.saturation_rps
        result = run_fleet(
            chosen,
            self.load.requests(rate_rps, 0),
            model=self.model,
            block_tokens=self.load.block_tokens,
            elastic=None
            if parked_watts is None
            else Elastic(Parking(PARK_S), startup_s=STARTUP_S, off_watts=parked_watts),
        )
        # By the whole fleet's promise: a smaller one has no slower "unloaded" TTFT.
        return figures(result, self.config, Slo.of(self.config, self.model), rate_rps)

    def static(self, share: float, reference: Figures) -> tuple[int, Figures]:
        """The fewest workers that do, of the kinds listed first; those left out draw idle power."""
        endpoints = [(pool.name, endpoint) for pool in self.config.pools for endpoint in pool.endpoints]
        for count in range(1, len(endpoints) + 1):
            kept = {endpoint.name for _, endpoint in endpoints[:count]}
            if count < share * len(endpoints):
                continue  # cannot do
            pools = [
                pool.model_copy(update={"endpoints": [e for e in pool.endpoints if e.name in kept]})
                for pool in self.config.pools
            ]
            left = [pool for pool in pools if pool.endpoints]
            names = {pool.name for pool in left}
            policies = [
                policy.model_copy(update={"pools": [ref for ref in policy.pools if ref.name in names]})
                for policy in self.config.policies
            ]
            config = self.config.model_copy(update={"pools": left, "policies": policies})
            found = self.run("lmetric", share, config=config)
            if found.slo_attainment >= reference.slo_attainment - WANTED_LOSS:
                seconds = found.worker_hours * 3600 / count
                idle_watts = sum(
                    pool.cost.idle_watts for pool in self.config.pools for e in pool.endpoints if e.name not in kept
                )
                joules = found.joules + idle_watts * seconds
                return count, replace(found, joules_per_token=found.joules_per_token * joules / found.joules)
        return len(endpoints), reference


def case(fleet: str, data: Path, trace: str, limit: int, workers: int | None, *, e0: float = 1.0) -> Case:
    manifests = load_manifests([ROOT / "examples" / fleet])
    config, model = simulate.fleet_of(compile_manifests(manifests), manifests, None, workers)
    pools = [
        pool.model_copy(update={"cost": replace(pool.cost, step_joules=pool.cost.step_joules * e0)})
        for pool in config.pools
    ]
    config = config.model_copy(update={"pools": pools})
    source = open_load(trace if trace == SHARED_PREFIX else str(data / trace), limit)
    name = trace.split("_first")[0].removesuffix(".jsonl.gz")
    return Case(name, config, model, source, saturation_rps(config, source, model))


def rows(found: Case, share: float, *, parked: bool, static: bool) -> Iterator[tuple[str, Figures, float]]:
    """(policy, figures, change of J/token against lmetric)"""
    base = found.run("lmetric", share)
    named = [("least_request", found.run("least_request", share)), ("lmetric", base)]
    if static:
        count, figure = found.static(share, base)
        named.append((f"static {count}", figure))
    named.append(("kvfleet", found.run("kvfleet", share)))
    named.append(("kvfleet:energy", found.run("kvfleet:energy", share)))
    if parked:
        for label, off_watts in (("parked", 0.0), ("parked, kept", KEPT_WATTS)):
            named.append((f"kvfleet:energy, {label}", found.run("kvfleet:energy", share, parked_watts=off_watts)))
    for name, figure in named:
        yield name, figure, figure.joules_per_token / base.joules_per_token - 1


def table(title: str, found: list[tuple[Case, tuple[float, ...]]], *, parked: bool, static: bool) -> str:
    lines = [
        f"### {title}\n",
        "| trace | load | policy | J/token | against lmetric | in SLO | TTFT mean s | starts |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for item, shares in found:
        for share in shares:
            for number, (policy, figure, change) in enumerate(rows(item, share, parked=parked, static=static)):
                first = (item.name, f"{share:g}") if not number else ("", "")
                lines.append(
                    f"| {first[0]} | {first[1]} | {policy} | {figure.joules_per_token:.3f} | {change:+.0%} "
                    f"| {figure.slo_attainment:.1%} | {figure.ttft_mean_ms / 1000:.3f} | {figure.starts or ''} |"
                )
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=2000, help="requests of a trace")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    arguments = parser.parse_args()
    data, limit = arguments.data, arguments.limit

    def each(
        fleet: str, workers: int | None, shares: tuple[float, ...], size: int = 1, **options: float
    ) -> list[tuple[Case, tuple[float, ...]]]:
        """`workers`: of each pool; `size`: how many times a fleet of eight."""
        return [
            (
                case(
                    fleet,
                    data,
                    trace,
                    limit * size * (SHARED_PREFIX_FACTOR if trace == SHARED_PREFIX else 1),
                    workers,
                    **options,
                ),
                shares,
            )
            for trace in TRACES
        ]

    sections = [
        table("Eight workers of one kind", each("bench8", 8, LOADS), parked=True, static=True),
        table("Mixed: four H100 and four A100", each("mixed", None, LOADS), parked=False, static=False),
        table("E0 halved, eight workers of one kind", each("bench8", 8, LOADS[:2], e0=0.5), parked=False, static=True),
        table("32 workers of one kind", each("bench8", 32, LOADS, 4), parked=False, static=False),
        table("Mixed: 16 H100 and 16 A100", each("mixed", 16, LOADS, 4), parked=False, static=False),
    ]
    text = f"Written by `python bench/energy.py DATA_DIR --limit {limit} --write`.\n\n" + "\n".join(sections)
    print(text)
    if arguments.write:
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
