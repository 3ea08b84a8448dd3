"""Shapes of load, and what a fleet made of them, from Prometheus alone: a table and a picture.

A run is one shape after another. Workers are counted by the targets that Prometheus scrapes, so a worker costs from the
moment its pod has an address until that is gone, draining included. Objectives are counted by the routers' histogram.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi, sin
from pathlib import Path
from typing import Any, Final

import httpx
from harness.settings import E2E_DIR

SLO_S: Final = 1.0
POOL: Final = "llama"
COMMAND: Final = "make bench-autoscaling"
DRAW: Final = E2E_DIR.parent / "scripts" / "draw_dashboards.py"


@dataclass(frozen=True)
class Shape:
    name: str
    seconds: float
    rate: Callable[[float], float]
    """Requests/s at a time since the shape began."""


def burst(seconds: float, low: float, high: float) -> Shape:
    """The middle quarter of the time at `high`."""
    begins, ends = 0.3 * seconds, 0.55 * seconds
    return Shape("burst", seconds, lambda t: high if begins <= t < ends else low)


def day(seconds: float, night: float, noon: float) -> Shape:
    """Midnight to midnight, with a smaller second peak in the evening."""

    def rate(t: float) -> float:
        hour = 24 * t / seconds
        daylight = sin(pi * (hour - 6) / 12) if 6 <= hour <= 18 else 0.0
        evening = 0.5 * sin(pi * (hour - 18) / 5) if 18 <= hour <= 23 else 0.0
        return night + (noon - night) * (daylight + evening)

    return Shape("day", seconds, rate)


def ramp(seconds: float, low: float, high: float) -> Shape:
    return Shape("slow ramp", seconds, lambda t: low + (high - low) * t / seconds)


def idle(seconds: float) -> Shape:
    return Shape("idle", seconds, lambda t: 0.0)


def steady(name: str, seconds: float, rate: float) -> Shape:
    return Shape(name, seconds, lambda t: rate)


SHORT: Final = (burst(60, 1, 8), idle(25), steady("from zero", 15, 1))
LONG: Final = (
    burst(100, 1, 8), idle(35), day(150, 0.5, 8), ramp(100, 0.5, 8), idle(35), steady("from zero", 30, 1),
)  # fmt: skip


def rate_of(shapes: Sequence[Shape]) -> Callable[[float], float]:
    """The rate over the time of all of them."""

    def rate(t: float) -> float:
        for shape in shapes:
            if t < shape.seconds:
                return shape.rate(t)
            t -= shape.seconds
        return 0.0

    return rate


@dataclass(frozen=True)
class Window:
    """What was measured while one shape lasted."""

    name: str
    requests: float
    in_slo: float
    """Requests whose first token came within the objective; all others count against it, the failed too."""
    peak: int
    replica_s: float

    @property
    def attainment(self) -> str:
        return f"{self.in_slo / self.requests:.1%}" if self.requests else "no request"


@dataclass(frozen=True)
class Run:
    """One way of running the fleet through all shapes."""

    started: float
    """Unix seconds."""
    shapes: Sequence[Shape]
    source: Prometheus

    @property
    def ended(self) -> float:
        return self.started + sum(shape.seconds for shape in self.shapes)

    def windows(self) -> list[Window]:
        found, begins = [], self.started
        for shape in self.shapes:
            found.append(self._window(shape.name, begins, begins + shape.seconds))
            begins += shape.seconds
        return found

    def total(self) -> Window:
        return self._window("all", self.started, self.ended)

    def _window(self, name: str, begins: float, ends: float) -> Window:
        counted = [
            self.source.value(expression, ends) - self.source.value(expression, begins)
            for expression in (REQUESTS, IN_SLO)
        ]
        workers = self.source.series(WORKERS, begins, ends)
        return Window(name, *counted, int(max(workers, default=0)), sum(workers))


REQUESTS: Final = f'sum(kvfleet_router_requests_total{{pool="{POOL}"}} or kvfleet_router_requests_total{{pool=""}})'
IN_SLO: Final = f'sum(kvfleet_router_ttft_seconds_bucket{{pool="{POOL}",le="{SLO_S:.1f}"}})'
WORKERS: Final = f'count(up{{kvfleet_io_pool="{POOL}"}})'
READY: Final = f'max(kvfleet_operator_pool_ready_replicas{{pool="{POOL}"}})'
DESIRED: Final = f'max(kvfleet_operator_pool_desired_replicas{{pool="{POOL}"}})'
IN_FLIGHT: Final = f'sum(kvfleet_router_in_flight{{pool="{POOL}"}})'
QUEUED: Final = "sum(kvfleet_router_queue_depth)"
LATE: Final = f'histogram_quantile(0.95, sum by (le) (rate(kvfleet_router_ttft_seconds_bucket{{pool="{POOL}"}}[10s])))'


@dataclass(frozen=True)
class Prometheus:
    url: str

    def value(self, expression: str, at: float) -> float:
        """0 where there is none."""
        result = self._ask("query", {"query": expression, "time": at})
        return float(result[0]["value"][1]) if result else 0.0

    def series(self, expression: str, begins: float, ends: float) -> list[float]:
        """One value a second; 0 where there is none."""
        asked = {"query": expression, "start": begins, "end": ends - 1, "step": 1}
        result = self._ask("query_range", asked)
        known = {round(float(at) - begins): float(text) for at, text in result[0]["values"]} if result else {}
        return [known.get(second, 0.0) for second in range(round(ends - begins))]

    def _ask(self, path: str, form: dict[str, Any]) -> list[dict[str, Any]]:
        answer = httpx.post(f"{self.url}/api/v1/{path}", data=form, timeout=30)
        assert answer.is_success, f"{form['query']}: {answer.text}"
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result


def table(scaled: Run, fixed: Run) -> str:
    """Markdown: one row a shape, and the whole."""
    rows = [
        "| load | requests | most workers | in SLO | replica-seconds | in SLO, fixed | replica-seconds, fixed | saved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for ours, theirs in zip([*scaled.windows(), scaled.total()], [*fixed.windows(), fixed.total()], strict=True):
        saved = f"{1 - ours.replica_s / theirs.replica_s:.0%}" if theirs.replica_s else ""
        cells = [ours.name, f"{ours.requests:.0f}", ours.peak, ours.attainment, f"{ours.replica_s:.0f}"]
        rows.append(f"| {' | '.join(map(str, cells))} | {theirs.attainment} | {theirs.replica_s:.0f} | {saved} |")
    return "\n".join(rows) + "\n"


PAGE: Final = """# Replicas against load

Written by `{command}`: {minutes:.0f} minutes of load on the [built-in e2e cluster](e2e.md) with real controllers and a real Prometheus,
on {cores} cores at a load average of {busy:.1f}. Workers are simulated at a quarter of an H100's speed with at most 4 sequences each; the
pool is scaled on `concurrency` with a target of 3, judged every second with scale-down windows of 10 s: a day takes {day:.0f} s here. Every
figure comes from Prometheus; a worker counts from its pod's address to its end. All {requests:.0f} streams of both runs ended whole.

{table}
In SLO: first token within {slo:g} s. From zero the first requests wait for a worker to start, and a burst outruns workers that start (how
long that took: Start-up time in the Autoscaling dashboard of [dashboards.md](dashboards.md), of the same run). A schedule or a larger
`minReplicas` keeps workers ready; a fixed fleet does at the price in the last columns.

![Load, workers and time to first token]({picture})
"""


def write_page(scaled: Run, fixed: Run, folder: Path) -> None:
    """`autoscaling-live.md` and its picture."""
    picture = folder / "images" / "autoscaling-live.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(scaled, fixed, picture)
    text = PAGE.format(
        command=COMMAND,
        minutes=2 * (scaled.ended - scaled.started) / 60,
        cores=os.cpu_count(),
        busy=os.getloadavg()[2],
        day=next(shape.seconds for shape in scaled.shapes if shape.name == "day"),
        requests=scaled.total().requests + fixed.total().requests,
        table=table(scaled, fixed),
        slo=SLO_S,
        picture=picture.relative_to(folder),
    )
    (folder / "autoscaling-live.md").write_text(text)


def draw_dashboards(source: Prometheus, run: Run, folder: Path) -> None:
    """The panels of all dashboards over a run."""
    command = [sys.executable, str(DRAW), f"--prometheus={source.url}", f"--into={folder / 'images'}"]
    subprocess.run([*command, f"--start={run.started}", f"--end={run.ended}"], check=True)


def draw(scaled: Run, fixed: Run, path: Path) -> None:
    """Load, workers and time to first token over the same time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    load, workers, wait = figure.subplots(3, 1, sharex=True)
    source, (begins, ends) = scaled.source, (scaled.started, scaled.ended)
    seconds = range(round(ends - begins))
    load.plot(seconds, [rate_of(scaled.shapes)(t) for t in seconds], label="requests/s sent", color="black")
    load.plot(seconds, source.series(IN_FLIGHT, begins, ends), label="in flight at workers")
    load.plot(seconds, source.series(QUEUED, begins, ends), label="held by the router")
    for label, query, style in (("desired", DESIRED, "--"), ("exist", WORKERS, "-"), ("ready", READY, ":")):
        workers.step(seconds, source.series(query, begins, ends), style, where="post", label=label)
    workers.step(seconds, source.series(WORKERS, fixed.started, fixed.ended), color="grey", label="fixed fleet")
    for run, label, colour in ((scaled, "autoscaled", "C0"), (fixed, "fixed fleet", "grey")):
        late = [value or None for value in source.series(LATE, run.started, run.ended)]
        wait.plot(seconds, late, label=label, color=colour)
    wait.axhline(SLO_S, color="red", linewidth=0.8, label="objective")
    wait.set(yscale="log", ylabel="TTFT p95 of 10 s, s", xlabel="s")
    workers.set(ylabel="workers", ylim=(0, None))
    load.set(ylabel="requests")
    at = 0.0
    for shape in scaled.shapes:
        for axis in (load, workers, wait):
            axis.axvline(at, color="lightgrey", linewidth=0.8)
        load.text(at + 1, load.get_ylim()[1], shape.name, va="bottom", fontsize="small")
        at += shape.seconds
    for axis in (load, workers, wait):
        axis.legend(fontsize="small", loc="upper left")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
