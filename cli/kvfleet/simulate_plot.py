"""The plot of `kvfleet simulate --plot`: TTFT distributions for each load, and goodput over load. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from kvfleet.simulate import Report, Result, means

SUFFIXES = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raise ValueError where nothing could be drawn to `path`, before any time is spent."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot {path}: give a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: {path.parent} is not a directory: create it or choose another place")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib is not installed: pip install 'kvfleet[plot]'")


def draw(report: Report, path: Path, *, title: str) -> None:
    """One panel of TTFT distributions per load, one of goodput."""
    from matplotlib.figure import Figure

    loads = list(dict.fromkeys(result.task.load for result in report.runs))
    policies = list(dict.fromkeys(result.task.policy for result in report.runs))
    figure = Figure(figsize=(4.5 * (len(loads) + 1), 4), layout="constrained")
    axes = figure.subplots(1, len(loads) + 1, squeeze=False)[0]
    for axis, load in zip(axes, loads, strict=False):
        for policy in policies:
            group = [r for r in report.runs if (r.task.load, r.task.policy) == (load, policy)]
            axis.plot(_mean_quantiles(group), np.linspace(0, 1, len(group[0].ttft_ms)), label=policy)
        axis.set(title=f"load {load:g}", xlabel="TTFT, ms", ylabel="share of requests", xscale="log", ylim=(0, 1))
        axis.grid(alpha=0.3)
    _goodput(axes[-1], report, policies)
    axes[-1].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _mean_quantiles(group: list[Result]) -> Any:
    """Quantiles of the seeds, averaged quantile by quantile; never 0, for the axis is logarithmic."""
    return np.maximum(np.mean([result.ttft_ms for result in group], axis=0), 0.1)


def _goodput(axis: Any, report: Report, policies: list[str]) -> None:
    rows = means(report.runs)
    for policy in policies:
        points = sorted((load, row["goodput_rps"]) for (load, name), row in rows.items() if name == policy)
        axis.plot(*zip(*points, strict=True), marker="o", label=policy)
    axis.set(title="goodput", xlabel="load (share of saturation)", ylabel="requests/s inside the SLO", ylim=(0, None))
    axis.grid(alpha=0.3)
