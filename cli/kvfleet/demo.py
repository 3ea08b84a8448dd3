"""`kvfleet demo`: one real trace against one fleet, once per policy, and a table of what the policy was worth.

The fleet is what the operator renders from the manifests (`local.py` runs it); the load is a slice of a published trace
(`replay.py`). Every policy gets fresh workers with cold caches and the same arrivals. Figures are in the trace's
seconds: the workers and the router run `speed` times faster than a real fleet would.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvfleet.explain import explain_decision
from kvfleet.local import HOST, LocalFleet, LocalFleetError, tail
from kvfleet.replay import Outcome, replay
from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_sim.traces import TraceRow

ENERGY_COUNTER = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"


@dataclass(frozen=True)
class PolicyResult:
    """One policy's run. Times in the trace's seconds."""

    policy: str
    outcomes: list[Outcome]
    joules: float
    span_s: float
    decisions: list[dict[str, Any]]
    requests_by_worker: dict[str, int]

    def figures(self) -> dict[str, float | int]:
        """The figures of the table and of `--json`."""
        good = [outcome for outcome in self.outcomes if outcome.ok]
        ttft_ms = np.array([outcome.ttft_s for outcome in good] or [np.nan]) * 1000
        prompt = sum(outcome.prompt_tokens for outcome in good)
        output = sum(outcome.output_tokens for outcome in good)
        return {
            "ttft_p50_ms": round(float(np.percentile(ttft_ms, 50)), 1),
            "ttft_p99_ms": round(float(np.percentile(ttft_ms, 99)), 1),
            "ttft_mean_ms": round(float(ttft_ms.mean()), 1),
            "itl_p99_ms": round(float(np.percentile([o.itl_s * 1000 for o in good] or [np.nan], 99)), 1),
            "prefix_hit_ratio": round(sum(o.cached_tokens for o in good) / max(1, prompt), 4),
            "joules_per_token": round(self.joules / max(1, output), 4),
            "tokens_per_second": round(output / self.span_s, 1),
            "joules": round(self.joules, 1),
            "completed": len(good),
            "failed": len(self.outcomes) - len(good),
        }


async def run_policies(
    objects: Sequence[dict[str, Any]],
    profiles: Sequence[AcceleratorProfile],
    rows: Sequence[TraceRow],
    *,
    model: str,
    policies: Sequence[str],
    speed: float,
    console: Console,
    keep_logs: Path | None = None,
) -> list[PolicyResult]:
    """Replay `rows` once per policy; raises LocalFleetError where a process cannot start."""
    task = asyncio.current_task()
    assert task is not None
    # SIGTERM ends the run as Ctrl-C does: through the fleet's own clean-up.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    results = []
    with _progress(console) as progress:
        for policy in policies:
            bar = progress.add_task(f"{policy}: starting the fleet", total=len(rows))
            with contextlib.ExitStack() as stack:
                directory = (
                    keep_logs / policy if keep_logs else Path(stack.enter_context(tempfile.TemporaryDirectory()))
                )
                directory.mkdir(parents=True, exist_ok=True)
                fleet = LocalFleet(objects, profiles, directory, speed=speed, strategy=policy)
                async with fleet:
                    progress.update(bar, description=policy)
                    results.append(await _run_one(fleet, policy, rows, model, speed, lambda: progress.advance(bar)))  # noqa: B023 - called within this turn
    return results


async def _run_one(
    fleet: LocalFleet, policy: str, rows: Sequence[TraceRow], model: str, speed: float, advance: Any
) -> PolicyResult:
    assert fleet.router is not None
    loop = asyncio.get_running_loop()
    async with httpx.AsyncClient(timeout=10.0) as client:
        joules_before = await _joules(client, fleet)
        started = loop.time()
        outcomes = await replay(rows, url=fleet.router.url, model=model, speed=speed, on_done=lambda outcome: advance())
        span_s = (loop.time() - started) * speed
        if dead := fleet.dead():
            raise LocalFleetError(f"{dead[0].name} ended during the run.\n{tail(dead[0].log)}")
        joules = await _joules(client, fleet) - joules_before
        decisions = await _sample_decisions(client, fleet.router.ready_port, outcomes)
    by_worker = {worker.name: sum(o.worker == worker.name for o in outcomes) for worker in fleet.workers}
    return PolicyResult(policy, outcomes, joules, span_s, decisions, by_worker)


async def _joules(client: httpx.AsyncClient, fleet: LocalFleet) -> float:
    """The sum of the workers' energy counters (DCGM's name, millijoules)."""
    total = 0.0
    for worker in fleet.workers:
        text = (await client.get(f"{worker.url}/dcgm/metrics")).raise_for_status().text
        total += sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in (ENERGY_COUNTER, f"{ENERGY_COUNTER}_total")
        )
    return total / 1000


async def _sample_decisions(
    client: httpx.AsyncClient, admin_port: int, outcomes: list[Outcome]
) -> list[dict[str, Any]]:
    """Three decisions worth reading: the largest cache hit, the slowest of the other answers and the last of the rest."""
    left = {outcome.decision: outcome for outcome in outcomes if outcome.ok and outcome.decision}
    picks = []
    for worth in (attrgetter("cached_tokens"), attrgetter("ttft_s"), lambda _: 0):  # the last of equals
        if left:
            picks.append(max(reversed(left.values()), key=worth).decision)
            del left[picks[-1]]
    decisions = []
    for decision in picks:
        answer = await client.get(f"http://{HOST}:{admin_port}/decisions/{decision}")
        if answer.status_code == 200:
            decisions.append(answer.json())
    return decisions


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


ROWS = (
    ("TTFT p50", "ttft_p50_ms", "ms", -1),
    ("TTFT p99", "ttft_p99_ms", "ms", -1),
    ("prefix-hit ratio", "prefix_hit_ratio", "", 1),
    ("joules per token", "joules_per_token", "J", -1),
    ("tokens per second", "tokens_per_second", "", 1),
    ("completed", "completed", "", 0),
    ("failed", "failed", "", 0),
)
"""Label, key, unit, and which direction is better (0: neither)."""


def print_results(results: Sequence[PolicyResult], console: Console) -> None:
    """The table, who served how much, and the sample decisions of the last policy."""
    figures = [result.figures() for result in results]
    table = Table(title="What the policy was worth (same trace, same fleet, cold caches)")
    table.add_column("")
    for result in results:
        table.add_column(result.policy, justify="right")
    if len(results) == 2:
        table.add_column("change", justify="right")
    for label, key, unit, better in ROWS:
        cells = [f"{values[key]:,} {unit}".strip() for values in figures]
        if len(results) == 2:
            cells.append(_change(figures[0][key], figures[1][key], better))
        table.add_row(label, *cells)
    console.print(table)
    for result in results:
        served = ", ".join(f"{name} {count}" for name, count in result.requests_by_worker.items())
        console.print(f"[dim]{result.policy}: requests by worker: {served}[/dim]")
    if decisions := results[-1].decisions:
        console.print(f"\n[bold]Why? {len(decisions)} decisions of {results[-1].policy}[/bold]")
        for decision in decisions:
            console.print(explain_decision(decision))


def _change(before: float, after: float, better: int) -> str:
    if not better or not before:
        return ""
    percent = (after - before) / before * 100
    colour = "green" if percent * better > 0 else "red" if percent * better < 0 else "white"
    return f"[{colour}]{percent:+.0f} %[/{colour}]"


def write_json(results: Sequence[PolicyResult], path: Path, *, trace: str, rate: float, speed: float) -> None:
    """The same figures for programs."""
    document = {
        "trace": trace,
        "rate": rate,
        "speed": speed,
        "policies": {
            result.policy: {
                **result.figures(),
                "requests_by_worker": result.requests_by_worker,
                "errors": sorted({outcome.error for outcome in result.outcomes if outcome.error})[:10],
            }
            for result in results
        },
        "decisions": results[-1].decisions,
    }
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
