"""The goals that the kvfleet policy is held to, checked against a benchmark's reports (policies.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvfleet.simulate import Report, capacities, means

OURS = "kvfleet"
STUDIED = ("kvfleet", "kvfleet_latency", "lmetric", "ttft_min")
"""Policies that no deployed router has."""
MIXED = ("mooncake",)
"""Traces of mixed long prompts, by the beginnings of their names."""

Row = tuple[str, str, str, bool, str]
"""(where, goal, found, met, remark)"""


def targets(reports: Iterable[tuple[str, str, Report]]) -> str:
    """A table of (name of the trace, title, report): goal, what was found, met or not."""
    lines = ["| where | goal | found | met | |", "| --- | --- | --- | --- | --- |"]
    for name, title, report in reports:
        mixed = name.startswith(MIXED)
        for where, goal, found, met, remark in [*_capacity(title, report, mixed), *_latency(title, report, mixed)]:
            lines.append(f"| {where} | {goal} | {found} | {'yes' if met else '**no**'} | {remark} |")
    return "\n".join(lines)


def _capacity(title: str, report: Report, mixed: bool) -> Iterable[Row]:
    found = capacities(report)
    ours = found.pop(OURS, None)
    deployed = {policy: rate for policy, rate in found.items() if policy not in STUDIED}
    if ours is None:
        return
    goals = (("best deployed", deployed, 1.10), ("lmetric", {p: r for p, r in found.items() if p == "lmetric"}, 1.05))
    for label, others, wanted in goals:
        if others:
            best = max(others, key=others.__getitem__)
            least, ratio = wanted if mixed else 0.98, ours / others[best]
            remark = f"{ours:.2f} against {others[best]:.2f} req/s" + (f" ({best})" if best != label else "")
            yield title, f"SLO capacity ≥ {least:.2f} x {label}", f"{ratio:.2f} x", ratio >= least, remark


def _latency(title: str, report: Report, mixed: bool) -> Iterable[Row]:
    rows = means(report.runs)
    loads = sorted({load for load, _ in rows})
    floor = min(row["ttft_mean_ms"] for row in rows.values())
    for load in loads:
        deployed = {p: row for (at, p), row in rows.items() if at == load and p not in STUDIED}
        ours = rows.get((load, OURS))
        if ours is None or not deployed:
            continue
        wanted = _wanted_ttft(load, mixed)
        if wanted is not None:
            best = _best(deployed, "ttft_mean_ms", min)
            change = ours["ttft_mean_ms"] / deployed[best]["ttft_mean_ms"] - 1
            remark = f"{ours['ttft_mean_ms']:.0f} against {deployed[best]['ttft_mean_ms']:.0f} ms ({best})"
            if wanted < 0 and change > wanted:
                least = floor / deployed[best]["ttft_mean_ms"] - 1
                remark += f"; the lowest mean of any policy at any load is {least:+.0%}"
            yield title, f"TTFT mean at {load:g}: {wanted:+.0%} or less", f"{change:+.1%}", change <= wanted, remark
        if load >= 0.95 and mixed:
            best = _best(deployed, "slo_attainment", max)
            ratio = ours["slo_attainment"] / deployed[best]["slo_attainment"]
            shares = f"{ours['slo_attainment']:.1%} against {deployed[best]['slo_attainment']:.1%} ({best})"
            p99 = f"p99 {ours['ttft_p99_ms'] / 1000:.1f} against {deployed[best]['ttft_p99_ms'] / 1000:.1f} s"
            yield title, f"share in SLO at {load:g} ≥ 1.20 x", f"{ratio:.2f} x", ratio >= 1.2, f"{shares}; {p99}"


def _wanted_ttft(load: float, mixed: bool) -> float | None:
    if load <= 0.6:
        return 0.02
    if not mixed:
        return None
    return -0.30 if load >= 0.95 else -0.15


def _best(rows: dict[str, dict[str, float]], figure: str, better: Callable[..., str]) -> str:
    return better(rows, key=lambda policy: rows[policy][figure])
