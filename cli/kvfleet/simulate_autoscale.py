"""`kvfleet simulate --autoscale`: a fleet whose size follows its load, over hours or days, beside fleets of a fixed size.

    fixed          all workers, all the time; `kvfleet` places
    hpa-N          HorizontalPodAutoscaler's rules on N requests in flight a worker; `least_request` places, as a Service does
    kvfleet        the operator's rules on the router's pack target and predicted TTFT, with its forecast; on what the ModelPool's
                   `spec.autoscaling` says, where it has one (but for bounds by the clock and pools at zero)
    kvfleet:energy the same, with energy mode Prefer

Who decides about workers is the operator's own pure code, every 15 s of virtual time, from what routers would publish; the
requests are those of `kvfleet simulate`. Workers take `startup_s` to start and draw idle power meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import orjson
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kvfleet.simulate import Experiment, Result, Task, no_phases, run_tasks
from kvfleet_api.modelpool import AutoscalingSpec, ConcurrencySignal, ScalingSignal
from kvfleet_operator.autoscale.autoscaler import Autoscaler, PoolStep
from kvfleet_operator.autoscale.decide import Workers
from kvfleet_operator.autoscale.readings import Quality, Reading
from kvfleet_operator.autoscale.signals import DEFAULT_SIGNALS
from kvfleet_sim.elastic import Elastic, PoolView
from kvfleet_sim.saturation import saturation_rps
from kvfleet_sim.workload import GENERATED_REQUESTS, MAX_REQUESTS, RateLoad

TICK_S = 15.0


class Scaler:
    """The operator's autoscaler as a Controller of the simulation."""

    period_s = TICK_S

    def __init__(
        self,
        total: int,
        *,
        ttft_slo_s: float,
        target: float | None,
        startup_s: float,
        specs: Mapping[str, AutoscalingSpec] = MappingProxyType({}),
    ) -> None:
        """`target`: requests in flight a worker, alone, as HPA has it; none: by the pool's spec, or by default pack target, predicted
        TTFT and forecast."""
        forecast = {"mode": "Raise" if target is None else "Off"}
        self._default = AutoscalingSpec.model_validate({"minReplicas": 1, "maxReplicas": total, "forecast": forecast})
        self._specs = specs if target is None else {}
        self._ttft_slo_s, self._target, self._startup_s = ttft_slo_s, target, startup_s
        self._autoscaler = Autoscaler()
        self._leaving: dict[str, int] = {}

    def wanted(self, pools: Sequence[PoolView], now_s: float) -> Mapping[str, int]:
        steps = [self._step(pool, len(pools)) for pool in pools]
        results = self._autoscaler.step(steps, now_s)
        wanted = {pool.name: results[pool.name].decision.desired for pool in pools}
        if self._target is None:  # HPA tells nobody
            self._leaving = {pool.name: results[pool.name].decision.leaving for pool in pools}
        return {pool.name: min(wanted[pool.name], pool.total) for pool in pools}

    def _reading(self, signal: ScalingSignal, pool: PoolView, pools: int) -> Reading:
        """What routers would publish for it."""
        held = pool.held / pools
        if signal.time_to_first_token is not None:
            ttft_s = pool.predicted_ttft_s if pool.in_flight + held else 0.0
            target_s = signal.time_to_first_token.target_percent_of_slo / 100 * self._ttft_slo_s
            return _fresh("timeToFirstToken", "Value", ttft_s, target_s)
        if signal.queue_depth is not None:
            return _fresh("queueDepth", "AverageValue", held, signal.queue_depth.target_per_replica)
        concurrency = signal.concurrency or ConcurrencySignal()
        if concurrency.target_per_replica is not None:
            return _fresh("concurrency", "AverageValue", pool.in_flight + held, concurrency.target_per_replica)
        share = concurrency.target_percent_of_pack_target / 100
        return _fresh("concurrency", "AverageValue", pool.packed + held, share * pool.pack_target)

    def leaving(self) -> Mapping[str, int]:
        return self._leaving

    def _step(self, pool: PoolView, pools: int) -> PoolStep:
        spec = self._specs.get(pool.name, self._default)
        busy = pool.in_flight + pool.held / pools
        if self._target is not None:
            readings = [_fresh("concurrency", "AverageValue", busy, self._target)]
        else:
            readings = [self._reading(signal, pool, pools) for signal in spec.signals or DEFAULT_SIGNALS]
        return PoolStep(
            pool.name,
            spec,
            Workers(pool.wanted, pool.ready),
            readings,
            _fresh("busy", "Value", busy, 1.0),
            _fresh("served", "Value", pool.served, 1.0),
            startup_s=self._startup_s,
        )


def simulated(specs: Mapping[str, AutoscalingSpec], total: int) -> dict[str, AutoscalingSpec]:
    """As they can be followed with `total` workers: there is no clock of days here, and nobody who would wake a pool at zero. Raises
    ValueError for signals that are not simulated."""
    for name, spec in specs.items():
        for index, signal in enumerate(spec.signals):
            if signal.kv_usage is not None or signal.prometheus is not None:
                raise ValueError(
                    f"ModelPool {name}: spec.autoscaling.signals[{index}]: kvUsage and prometheus are not simulated: take the entry "
                    "out, or use concurrency, queueDepth or timeToFirstToken"
                )
    return {
        name: spec.model_copy(
            update={
                "min_replicas": min(max(spec.min_replicas, 1), total),
                "max_replicas": min(spec.max_replicas, total),
                "scale_to_zero": None,
                "schedule": [],
            }
        )
        for name, spec in specs.items()
    }


def _fresh(name: str, kind: str, value: float, target: float) -> Reading:
    return Reading(name, "AverageValue" if kind == "AverageValue" else "Value", Quality.FRESH, value, target)


def elastic(
    total: int, ttft_slo_s: float, specs: Mapping[str, AutoscalingSpec], target: float | None, startup_s: float
) -> Elastic:
    return Elastic(
        Scaler(total, ttft_slo_s=ttft_slo_s, target=target, startup_s=startup_s, specs=specs),
        startup_s=startup_s,
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One way to size the fleet, and what came of it."""

    name: str
    result: Result


def command(
    experiment: Experiment,
    *,
    trace: str,
    load: float,
    hours: float,
    hpa_targets: Sequence[int],
    startup_s: float,
    answer_tokens: float,
    jobs: int,
    console: Console,
    json: Path | None,
    specs: Mapping[str, AutoscalingSpec],
) -> None:
    """The whole command. `specs`: `spec.autoscaling` by pool. `load`: mean share of the whole fleet's saturation rate; `answer_tokens`: median of an answer. Raises ValueError for what cannot be."""
    no_phases(experiment)
    specs = simulated(specs, max(len(pool.endpoints) for pool in experiment.config.pools))
    rates = experiment.load
    if not isinstance(rates, RateLoad):
        raise ValueError(f"--autoscale needs a trace of rates (ServeGen's client rates); {trace} has none")
    rates = rates.of(GENERATED_REQUESTS, answer_tokens)
    rate_rps = load * saturation_rps(experiment.config, rates, experiment.model)
    count = round(rate_rps * hours * 3600)
    if count > MAX_REQUESTS:
        raise ValueError(
            f"{hours:g} hours at {rate_rps:.1f} requests/s are {count:,} requests, more than {MAX_REQUESTS:,}: "
            "lower --hours or --load, or take fewer --workers, or longer --answer-tokens"
        )
    experiment = replace(experiment, load=rates.of(count))
    rows = run(
        experiment,
        rate_rps=rate_rps,
        hpa_targets=hpa_targets,
        startup_s=startup_s,
        jobs=jobs,
        console=Console(stderr=True),
        specs=specs,
    )
    print_rows(rows, experiment.worker_count, console)
    if json is not None:
        write_json(rows, json, trace=trace, rate_rps=rate_rps)


def run(
    experiment: Experiment,
    *,
    rate_rps: float,
    hpa_targets: Sequence[int],
    startup_s: float,
    jobs: int,
    console: Console,
    specs: Mapping[str, AutoscalingSpec],
) -> list[Row]:
    """Every variant over the same requests."""
    total = max(len(pool.endpoints) for pool in experiment.config.pools)
    scaled = partial(elastic, total, experiment.slo.ttft_s, specs)
    variants = {
        "fixed": ("kvfleet", None),
        **{f"hpa-{target}": ("least_request", partial(scaled, float(target), startup_s)) for target in hpa_targets},
        "kvfleet": ("kvfleet", partial(scaled, None, startup_s)),
        "kvfleet:energy": ("kvfleet:energy", partial(scaled, None, startup_s)),
    }
    tasks = [Task(policy, 0, rate_rps=rate_rps, elastic=controller) for policy, controller in variants.values()]
    return [
        Row(name, result) for name, result in zip(variants, run_tasks(experiment, tasks, jobs, console), strict=True)
    ]


def print_rows(rows: Sequence[Row], worker_count: int, console: Console) -> None:
    first = rows[0].result.figures
    assert first is not None
    table = Table(
        title=f"{worker_count} workers at most, {first.completed + first.failed} requests. Worker hours, joules: against `fixed`.",
        padding=(0, 1, 0, 0),
        show_edge=False,
        box=SIMPLE,
        title_style="",
    )
    for title in ("fleet", "SLO%", "p99 s", "hours", "", "MJ", "", "J/tok", "starts", "fail"):
        table.add_column(title, justify="left" if title == "fleet" else "right", no_wrap=True)
    for row in rows:
        figures = row.result.figures
        assert figures is not None
        table.add_row(
            row.name,
            f"{100 * figures.slo_attainment:.2f}",
            f"{figures.ttft_p99_ms / 1000:.2f}",
            f"{figures.worker_hours:.1f}",
            _change(figures.worker_hours, first.worker_hours),
            f"{figures.joules / 1e6:.2f}",
            _change(figures.joules, first.joules),
            f"{figures.joules_per_token:.3f}",
            str(figures.starts),
            str(figures.failed),
        )
    console.print(table)


def _change(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.0f}%"


def write_json(rows: Sequence[Row], path: Path, *, trace: str, rate_rps: float) -> None:
    results = [{"fleet": row.name, **asdict(row.result.figures)} for row in rows if row.result.figures is not None]
    document = {"trace": trace, "rate_rps": rate_rps, "results": results}
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
