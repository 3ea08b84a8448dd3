"""Pictures of the dashboards: each panel's own queries are asked, and what they give is drawn."""

from __future__ import annotations

import json
import re
from typing import Any

import draw_dashboards
import httpx
import pytest

SPAN = draw_dashboards.Span(1000.0, 1060.0, 15)
BOARD = json.loads((draw_dashboards.BOARDS / "autoscaling.json").read_text())


class Prometheus:
    """Answers every query with the same series, and remembers what it was asked."""

    def __init__(self, *series: dict[str, Any]) -> None:
        self.asked: list[str] = []
        self.series = series

    def client(self) -> httpx.Client:
        def answer(request: httpx.Request) -> httpx.Response:
            self.asked.append(httpx.QueryParams(request.content.decode())["query"])
            return httpx.Response(200, json={"data": {"result": list(self.series)}})

        return httpx.Client(base_url="http://prometheus", transport=httpx.MockTransport(answer))


def texts(figure: Any) -> list[str]:
    """Titles and legends of all panels."""
    found = []
    for axis in figure.get_axes():
        legend = axis.get_legend()
        found += [axis.get_title(loc="left"), *(text.get_text() for text in (legend.get_texts() if legend else []))]
    return found


@pytest.fixture
def lines() -> dict[str, Any]:
    """One series, with a gap in it."""
    labels = {"pool": "llama", "signal": "concurrency", "reason": "Budget"}
    return {"metric": labels, "values": [[1000, "1"], [1030, "NaN"], [1060, "3"]]}


def test_every_panel_is_drawn_with_its_own_queries_legend_and_data(lines: dict[str, Any]) -> None:
    prometheus = Prometheus(lines)
    figure = draw_dashboards.picture(BOARD, prometheus.client(), SPAN)
    panels = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
    assert len(figure.get_axes()) == len(panels)
    assert len(prometheus.asked) == sum(len(panel["targets"]) for panel in panels)
    assert {panel["title"] for panel in panels} <= set(texts(figure))
    assert "llama concurrency" in texts(figure)
    (first, *_) = figure.get_axes()[0].get_lines()
    assert [list(axis) for axis in first.get_data()] == [[0.0, 60.0], [1.0, 3.0]]


def test_variables_stand_for_everything() -> None:
    prometheus = Prometheus()
    draw_dashboards.picture(BOARD, prometheus.client(), SPAN)
    assert not any(re.search(r"\$", query) for query in prometheus.asked)
    assert any('pool=~".*"' in query and "[15s]" in query for query in prometheus.asked)


def test_what_a_label_is_replaced_by_is_no_variable() -> None:
    prometheus = Prometheus()
    energy = json.loads((draw_dashboards.BOARDS / "energy.json").read_text())
    draw_dashboards.picture(energy, prometheus.client(), SPAN)
    assert any('"namespace", "$1", "exported_namespace"' in query for query in prometheus.asked)
