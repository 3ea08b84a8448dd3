"""How dashboards look: a `Board` of rows of panels becomes Grafana's JSON by way of the Grafana Foundation SDK.

A panel states its title, what it tells, its unit and its queries; place, id, datasource and style are given here, in the
order of the code, so that the JSON changes only where the code does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

COLUMNS: Final = 24
HEIGHT: Final = 8
STAT_HEIGHT: Final = 4
TAG: Final = "kvfleet"
DATASOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
ALL: Final = VariableOption(selected=True, text=["All"], value=["$__all"])


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    width: int = 12
    single: bool = False
    """One number, the latest; else lines over time."""
    stacked: bool = False
    maximum: float | None = None


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """Values of a label, chosen by the user; all of them at first."""

    name: str
    label: str
    query: str


@dataclass(frozen=True)
class Board:
    uid: str
    """Never changed: links and Grafana's own provisioning go by it."""
    title: str
    description: str
    variables: Sequence[Variable]
    rows: Sequence[Row]


def to_json(board: Board) -> str:
    """The dashboard as Grafana 10.1 or later imports it."""
    builder = (
        builders.Dashboard(f"kvfleet / {board.title}")
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .link(_siblings())
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in board.variables:
        builder.with_variable(_variable(variable))
    number = 0
    for row in board.rows:
        number += 1
        builder.with_row(builders.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            builder.with_panel(_panel(panel, number))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _siblings() -> builders.DashboardLink:
    """A menu of all of kvfleet's dashboards, keeping time and variables."""
    link = builders.DashboardLink("kvfleet").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.as_dropdown(True).include_vars(True).keep_time(True)


def _variable(variable: Variable) -> builders.QueryVariable:
    # "All" matches series without the label too, as from a Prometheus that scrapes a router outside a cluster.
    return (
        builders.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(DATASOURCE)
        .query(variable.query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(ALL)
    )


def _panel(panel: Panel, number: int) -> stat.Panel | timeseries.Panel:
    built = _number() if panel.single else _lines(panel)
    built.id(number).title(panel.title).description(panel.description).datasource(DATASOURCE)
    built.unit(panel.unit).span(panel.width).min(0)
    if panel.maximum is not None:
        built.max(panel.maximum)
    for index, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + index))
        built.with_target(target.instant() if panel.single else target.range())
    return built


def _number() -> stat.Panel:
    return stat.Panel().height(STAT_HEIGHT).reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _lines(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .height(HEIGHT)
        .draw_style(GraphDrawStyle.LINE)
        .line_width(1)
        .fill_opacity(30 if panel.stacked else 5)
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
        )
    )
    if panel.stacked:
        built.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    return built
