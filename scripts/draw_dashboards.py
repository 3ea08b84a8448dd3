"""Pictures of the dashboards' panels: runs every panel's queries against a Prometheus and draws what Grafana would.

    python scripts/draw_dashboards.py --prometheus http://127.0.0.1:9090 --start UNIX --end UNIX --into docs/images

One picture a dashboard. Not Grafana's look, but its data: the committed JSON's own queries, units, titles and legends.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT: Final = Path(__file__).resolve().parents[1]
BOARDS: Final = ROOT / "helm" / "kvfleet" / "files" / "dashboards"
POINTS: Final = 200
MOST_LINES: Final = 10
"""In a legend; the others are drawn without a name."""
COLUMNS: Final = 24
"""Of Grafana's grid."""
UNITS: Final = {
    "s": "s", "percentunit": "share", "reqps": "requests/s", "ops": "1/s", "watt": "W", "bytes": "B", "joule": "J",
}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """What is drawn, in Unix seconds."""

    start: float
    end: float
    window_s: int
    """For $__rate_interval."""

    @property
    def step_s(self) -> float:
        return max(1.0, (self.end - self.start) / POINTS)


@dataclass(frozen=True)
class Line:
    legend: str
    at_s: list[float]
    """Since the start."""
    values: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", required=True, help="URL of a Prometheus that scraped a fleet")
    parser.add_argument("--start", type=float, required=True, help="Unix time")
    parser.add_argument("--end", type=float, required=True, help="Unix time")
    parser.add_argument("--window-seconds", type=int, default=15, help="for rates; four scrape intervals or more")
    parser.add_argument("--into", type=Path, required=True, help="folder")
    args = parser.parse_args()
    if args.end <= args.start:
        parser.error(f"--end {args.end:g} must be after --start {args.start:g}")
    args.into.mkdir(parents=True, exist_ok=True)
    span = Span(args.start, args.end, args.window_seconds)
    with httpx.Client(base_url=args.prometheus, timeout=60) as prometheus:
        for path in sorted(BOARDS.glob("*.json")):
            target = args.into / f"dashboard-{path.stem}.png"
            picture(json.loads(path.read_text()), prometheus, span).savefig(target, dpi=60)
            sys.stdout.write(f"wrote {target}\n")


def picture(board: dict[str, Any], prometheus: httpx.Client, span: Span) -> Figure:
    """All panels in rows, as wide as in Grafana."""
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    rows: list[list[dict[str, Any]]] = []
    for panel in panels:
        if not rows or sum(each["gridPos"]["w"] for each in [*rows[-1], panel]) > COLUMNS:
            rows.append([])
        rows[-1].append(panel)
    heights = [1.0 if row[0]["type"] == "stat" else 2.6 for row in rows]
    figure = Figure(figsize=(17, 1.1 * sum(heights) + 0.5), layout="constrained")
    figure.suptitle(board["title"], fontweight="bold")
    for row, part in zip(
        rows, figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0], strict=True
    ):
        widths = [panel["gridPos"]["w"] for panel in row]
        for panel, axis in zip(row, part.subplots(1, len(row), width_ratios=widths, squeeze=False)[0], strict=True):
            axis.set_title(panel["title"], fontsize="medium", loc="left")
            lines = [line for target in panel["targets"] for line in _lines(target, prometheus, span)]
            unit = panel["fieldConfig"]["defaults"].get("unit", "")
            if panel["type"] == "stat":
                _number(axis, lines, unit)
            else:
                _curves(axis, lines, unit, stacked=_stacked(panel))
    return figure


def _lines(target: dict[str, Any], prometheus: httpx.Client, span: Span) -> list[Line]:
    """What one query gives. Variables stand for everything, as when All is chosen."""
    expression = re.sub(r'"\$(?!__)[a-z]\w*', '".*', target["expr"])
    expression = expression.replace("$__rate_interval", f"{span.window_s}s")
    expression = expression.replace("$__range", f"{span.end - span.start:.0f}s")
    asked = {"query": expression, "start": span.start, "end": span.end, "step": span.step_s}
    answer = prometheus.post("/api/v1/query_range", data=asked)
    if answer.is_error:
        raise SystemExit(f"{expression}: {answer.text}")
    found = []
    for series in answer.json()["data"]["result"]:
        labels, legend = series["metric"], target.get("legendFormat", "")
        for name, value in labels.items():
            legend = legend.replace(f"{{{{{name}}}}}", value)
        points = [(float(at) - span.start, float(text)) for at, text in series["values"]]
        known = [(at, value) for at, value in points if math.isfinite(value)]
        found.append(Line(legend, [at for at, _ in known], [value for _, value in known]))
    return [line for line in found if line.values]


def _stacked(panel: dict[str, Any]) -> bool:
    stacking = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {})
    return bool(stacking.get("mode") == "normal")


def _number(axis: Axes, lines: list[Line], unit: str) -> None:
    axis.axis("off")
    text = "no data" if not lines else f"{lines[0].values[-1]:.4g} {UNITS.get(unit, '')}"
    axis.text(0.5, 0.4, text, ha="center", va="center", fontsize="xx-large", transform=axis.transAxes)


def _curves(axis: Axes, lines: list[Line], unit: str, *, stacked: bool) -> None:
    axis.grid(alpha=0.3)
    axis.set_ylabel(UNITS.get(unit, ""), fontsize="small")
    if not lines:
        axis.text(0.5, 0.5, "no data", ha="center", va="center", transform=axis.transAxes, color="grey")
        return
    if stacked:
        times = sorted({at for line in lines for at in line.at_s})
        heights = [dict(zip(line.at_s, line.values, strict=True)) for line in lines]
        axis.stackplot(times, *[[known.get(at, 0.0) for at in times] for known in heights], alpha=0.6,
                       labels=[line.legend for line in lines[:MOST_LINES]])  # fmt: skip
    else:
        for number, line in enumerate(lines):
            axis.plot(line.at_s, line.values, linewidth=1, label=line.legend if number < MOST_LINES else None)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize="small")
    if any(line.legend for line in lines):
        axis.legend(fontsize="x-small", loc="upper left", ncols=2, framealpha=0.5)


if __name__ == "__main__":
    main()
