"""The Grafana dashboards of the chart, as code: `outputs` gives their JSON for generate.py.

One module per dashboard says what is shown; `panels` says how. Every dashboard carries the variables it uses, so a query is
read as it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dashboards import autoscaling, control, energy, fleet, routing
from dashboards.panels import Board, to_json

FOLDER = Path("helm/kvfleet/files/dashboards")
BOARDS: dict[str, Callable[[], Board]] = {
    "fleet": fleet.board,
    "routing": routing.board,
    "energy": energy.board,
    "autoscaling": autoscaling.board,
    "operator": control.board,
}
"""File name without `.json` → what it shows."""


def outputs() -> dict[Path, str]:
    """Every dashboard (path below the repository's root) and its JSON."""
    return {FOLDER / f"{name}.json": to_json(board()) for name, board in BOARDS.items()}
