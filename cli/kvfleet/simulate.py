"""`kvfleet simulate`: what a policy would do to a fleet, before it is applied: the router's own core in virtual time.

Each run is one policy, one load, one seed; all policies get the same requests. Runs are independent of each other, so they
are spread over processes, and any number of processes gives the same figures.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import orjson
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_api.manifests import Manifests
from kvfleet_sim.elastic import Elastic, Parking
from kvfleet_sim.fleet import Options, simulate
from kvfleet_sim.outcomes import Figures, Slo, figures
from kvfleet_sim.saturation import WANTED_ATTAINMENT, saturation_rps, slo_capacity_rps
from kvfleet_sim.variants import with_policy, with_simulated_workers
from kvfleet_sim.workload import Load

CDF_POINTS = 200
MAX_LOAD = 4.0


@dataclass(frozen=True, slots=True)
class Experiment:
    """What all runs have in common."""

    config: FleetConfig
    """With its simulated workers."""
    model: str
    load: Load
    options: Options = field(default_factory=Options)
    elastic: Callable[[], Elastic] | None = None
    """How workers come and go: a new controller for each run. None: all are on all the time."""

    @property
    def slo(self) -> Slo:
        return Slo.of(self.config, self.model)

    @property
    def worker_count(self) -> int:
        return sum(len(pool.endpoints) for pool in self.config.pools)


@dataclass(frozen=True, slots=True)
class Task:
    """One run; without `rate_rps`, the search for the policy's SLO capacity from `first_rps` on."""

    policy: str
    seed: int
    load: float | None = None
    """Fraction of the saturation rate."""
    rate_rps: float | None = None
    first_rps: float = 1.0
    elastic: Callable[[], Elastic] | None = None
    """Instead of the experiment's."""


@dataclass(frozen=True, slots=True)
class Result:
    task: Task
    figures: Figures | None = None
    failures: dict[str, int] = field(default_factory=dict)
    ttft_ms: list[float] = field(default_factory=list)
    """CDF_POINTS quantiles."""
    capacity_rps: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    saturation_rps: float
    runs: list[Result]
    capacities: list[Result]


def fleet_of(
    config: FleetConfig, manifests: Manifests, model: str | None, workers: int | None
) -> tuple[FleetConfig, str]:
    """The pools that serve the model, with their simulated workers. Raises ValueError naming what is missing."""
    models = sorted({pool.model for pool in config.pools})
    if model is None:
        if len(models) > 1:
            raise ValueError(f"--model: the fleet serves {', '.join(models)}, a trace names none: choose one")
        model = models[0]
    if model not in models:
        raise ValueError(f"--model {model}: no ModelPool serves it: use one of {', '.join(models)}")
    replicas = {}
    for pool in manifests.pools:
        spec = pool.spec
        configured = spec.autoscaling.min_replicas if spec.autoscaling else spec.replicas or 0
        if spec.model.name == model:
            replicas[pool.metadata.name] = configured if workers is None else workers
    served = [pool for pool in config.pools if pool.model == model]
    policies = [policy for policy in config.policies if model in policy.models]
    names = {pool.name for pool in served}
    kept = [
        policy.model_copy(update={"pools": [ref for ref in policy.pools if ref.name in names]}) for policy in policies
    ]
    return with_simulated_workers(config.model_copy(update={"pools": served, "policies": kept}), replicas), model


def with_parking(experiment: Experiment, idle_s: float, startup_s: float) -> Experiment:
    """Idle workers are switched off, and started again under load. Their devices are given back meanwhile: 0 W."""
    no_phases(experiment)
    return replace(experiment, elastic=partial(_parked, idle_s, startup_s))


def _parked(idle_s: float, startup_s: float) -> Elastic:
    return Elastic(Parking(idle_s), startup_s=startup_s)


def no_phases(experiment: Experiment) -> None:
    """Raise ValueError for pools of one phase: their workers cannot come and go here."""
    for pool in experiment.config.pools:
        if pool.role != "Unified":
            raise ValueError(
                f"ModelPool {pool.name}: workers of role {pool.role} cannot come and go in simulate: leave out "
                "--autoscale and --park-seconds"
            )


def check(loads: Sequence[float], json: Path | None) -> None:
    """Raise ValueError for what would fail only after the time was spent."""
    for load in loads:
        if not 0 < load <= MAX_LOAD:
            raise ValueError(f"--load {load:g}: give a share of the saturation rate, above 0 and at most {MAX_LOAD:g}")
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"--json {json}: {json.parent} is not a directory: create it or choose another place")


def run_experiment(
    experiment: Experiment,
    *,
    policies: Sequence[str],
    loads: Sequence[float],
    seeds: int,
    capacity: Sequence[str],
    jobs: int,
    console: Console,
) -> Report:
    """Find the saturation rate, then run every policy at every load, and search the SLO capacity of those in `capacity`."""
    requests = len(experiment.load.requests(1.0, 0))
    with _terminable(), _progress(console) as progress:
        bar = progress.add_task("saturation rate", total=None)
        saturation = saturation_rps(
            experiment.config, experiment.load, experiment.model, lambda count: progress.advance(bar, count)
        )
        progress.remove_task(bar)
        tasks = [
            Task(policy, seed, load, load * saturation)
            for load in loads
            for policy in policies
            for seed in range(seeds)
        ]
        results = list(_run_all(experiment, tasks, jobs, progress, "requests simulated", requests))
        searches = [Task(policy, seed, first_rps=saturation) for policy in capacity for seed in range(seeds)]
        capacities = list(_run_all(experiment, searches, jobs, progress, "capacities found", 1))
    return Report(saturation, results, capacities)


def run_tasks(experiment: Experiment, tasks: list[Task], jobs: int, console: Console) -> list[Result]:
    """These runs alone, in their order."""
    with _terminable(), _progress(console) as progress:
        requests = len(experiment.load.requests(tasks[0].rate_rps or 1.0, 0))
        return list(_run_all(experiment, tasks, jobs, progress, "requests simulated", requests))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: with everything it started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_all(
    experiment: Experiment, tasks: list[Task], jobs: int, progress: Progress, label: str, weight: int
) -> Iterator[Result]:
    """Results in the order of the tasks. `weight`: what a task counts in the progress bar."""
    if not tasks:
        return
    bar = progress.add_task(label, total=len(tasks) * weight)
    if min(jobs, len(tasks)) == 1:
        for number, task in enumerate(tasks, 1):
            yield run_task(experiment, task, (lambda count: progress.advance(bar, count)) if weight > 1 else None)
            progress.update(bar, completed=number * weight)
        return
    # Spawned, not forked: the progress bar has a thread.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, _set_experiment, (experiment,)) as executor:
        futures = [executor.submit(_run_task, task) for task in tasks]
        try:
            for _ in as_completed(futures):
                progress.advance(bar, weight)
            yield from (future.result() for future in futures)
        except BaseException:  # an error, Ctrl-C, or SIGTERM: nothing goes on without us
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_experiment: Experiment


def _set_experiment(experiment: Experiment) -> None:
    """In a worker process: what its tasks are about, sent once."""
    global _experiment
    _experiment = experiment


def _run_task(task: Task) -> Result:
    return run_task(_experiment, task)


def run_task(experiment: Experiment, task: Task, on_progress: Callable[[int], None] | None = None) -> Result:
    """One run, or one search."""
    if task.rate_rps is not None:
        return _simulated(experiment, task, task.rate_rps, on_progress)

    def attainment(rate_rps: float) -> float:
        result = _simulated(experiment, task, rate_rps, on_progress)
        assert result.figures is not None
        return result.figures.slo_attainment

    return Result(task, capacity_rps=slo_capacity_rps(attainment, task.first_rps))


def _simulated(
    experiment: Experiment, task: Task, rate_rps: float, on_progress: Callable[[int], None] | None
) -> Result:
    config, load = experiment.config, experiment.load
    run = simulate(
        with_policy(config, task.policy),
        load.requests(rate_rps, task.seed),
        model=experiment.model,
        block_tokens=load.block_tokens,
        seed=task.seed,
        options=experiment.options,
        elastic=made() if (made := task.elastic or experiment.elastic) is not None else None,
        on_progress=on_progress,
    )
    ttft_ms = run.ttft_s[run.completed] * 1000
    quantiles = np.quantile(ttft_ms, np.linspace(0, 1, CDF_POINTS)).tolist() if len(ttft_ms) else []
    return Result(task, figures(run, config, experiment.slo, rate_rps), dict(run.failures), quantiles)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


# What is shown and written


COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("mean", "ttft_mean_ms", 0.001, -1),
    ("p50", "ttft_p50_ms", 0.001, -1),
    ("p99", "ttft_p99_ms", 0.001, -1),
    ("ITL99", "itl_p99_ms", 1, -1),
    ("SLO%", "slo_attainment", 100, 1),
    ("good/s", "goodput_rps", 1, 1),
    ("hit%", "prefix_hit_ratio", 100, 1),
    ("J/tok", "joules_per_token", 1, -1),
    ("fail", "failed", 1, 0),
)
"""Title, figure, factor, and which direction is better (0: neither)."""
ELASTIC_COLUMN = ("on%", "worker_share", 100, -1)
"""Shown where workers come and go."""
BOLD = "[bold green]{}[/bold green]"


def means(results: Sequence[Result]) -> dict[tuple[float, str], dict[str, float]]:
    """Figures by (load, policy), averaged over the seeds."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for result in results:
        assert result.figures is not None and result.task.load is not None
        groups.setdefault((result.task.load, result.task.policy), []).append(asdict(result.figures))
    return {key: {name: fmean(row[name] for row in rows) for name in rows[0]} for key, rows in groups.items()}


def print_report(report: Report, console: Console) -> None:
    """One table for all loads, the best of each load in bold; then the capacities."""
    rows = means(report.runs)
    if rows:
        title = f"Load 1 is {report.saturation_rps:.2f} requests/s. TTFT (mean, p50, p99) in s, ITL in ms, shares in %."
        table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False, title_style="")
        table.add_column("load", min_width=4, justify="right")
        table.add_column("policy", no_wrap=True)
        columns = (
            [*COLUMNS, ELASTIC_COLUMN]
            if any(row["starts"] or row["worker_share"] < 1 for row in rows.values())
            else COLUMNS
        )
        for name, *_ in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for load in dict.fromkeys(load for load, _ in rows):
            group = {policy: row for (at, policy), row in rows.items() if at == load}
            for number, (policy, row) in enumerate(group.items()):
                cells = [cell(row, list(group.values()), *column[1:], bold=BOLD) for column in columns]
                table.add_row(f"{load:g}" if not number else "", policy, *cells)
            table.add_section()
        console.print(table)
    if report.capacities:
        title = f"SLO capacity: requests/s with {WANTED_ATTAINMENT:.0%} inside their SLO"
        found = Table(title=title, box=SIMPLE, title_style="")
        found.add_column("policy")
        found.add_column("requests/s", justify="right")
        for policy, rate in capacities(report).items():
            found.add_row(policy, f"{rate:.2f}")
        console.print(found)


def capacities(report: Report) -> dict[str, float]:
    """By policy, averaged over the seeds."""
    groups: dict[str, list[float]] = {}
    for result in report.capacities:
        assert result.capacity_rps is not None
        groups.setdefault(result.task.policy, []).append(result.capacity_rps)
    return {policy: fmean(values) for policy, values in groups.items()}


def cell(
    row: dict[str, float], group: list[dict[str, float]], key: str, factor: float, better: int, *, bold: str
) -> str:
    """Five characters, for 80 columns hold no more; in `bold` where it is the best of its group."""
    text = f"{row[key]:g}" if not better else f"{row[key] * factor:.3f}"[:5].rstrip(".")
    best = better and row[key] * better == max(other[key] * better for other in group)
    return bold.format(text) if best and len(group) > 1 else text


def write_json(experiment: Experiment, report: Report, path: Path, *, trace: str) -> None:
    """The figures for programs; what could not be measured is null."""
    document = {
        "trace": trace,
        "model": experiment.model,
        "workers": experiment.worker_count,
        "requests": len(experiment.load.requests(1.0, 0)),
        "slo": {"ttft_ms": experiment.slo.ttft_s * 1000, "itl_ms": experiment.slo.itl_s * 1000},
        "options": asdict(experiment.options),
        "saturation_rps": report.saturation_rps,
        "results": [_row(result) for result in report.runs],
    }
    if report.capacities:
        document["capacity"] = [
            {"policy": result.task.policy, "seed": result.task.seed, "rps": result.capacity_rps}
            for result in report.capacities
        ]
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))


def _row(result: Result) -> dict[str, Any]:
    assert result.figures is not None
    task = result.task
    row: dict[str, Any] = {"policy": task.policy, "load": task.load, "seed": task.seed, "rate_rps": task.rate_rps}
    return {**row, **asdict(result.figures), "failures": result.failures}
