"""The chart's dashboards and rules: every metric exists, every panel explains itself, every alert has its runbook page."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from pathlib import Path
from typing import Any

import dashboards
import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from promql import metrics_of

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_operator.metrics import Metrics
from kvfleet_router.app import RouterApp
from kvfleet_router.io.kubernetes import KubernetesSource
from kvfleet_router.io.kubernetes_access import Access
from kvfleet_router.io.processes.hub import Hub
from kvfleet_router.io.sharing.redis_bus import Redis
from kvfleet_sim.config import parse
from kvfleet_sim.server import Server

CHART = Path("helm/kvfleet")
RUNBOOKS = "https://github.com/kvfleet/kvfleet/blob/main/docs/runbooks/"
SEVERITIES = {"critical", "warning"}
VARIABLE = re.compile(r"\$\{?([a-zA-Z_]\w*)")
GRAFANAS_OWN = {"__rate_interval", "__range"}

REPOSITORY = Path(__file__).resolve().parents[2]
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((REPOSITORY / dashboards.FOLDER).glob("*.json"))}
RULES = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((REPOSITORY / CHART / "files/rules").glob("*.yaml"))
}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(board) for target in panel["targets"]]


def rules_of(file: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in file["groups"] for rule in group["rules"]]


ALERTS = [rule for file in RULES.values() for rule in rules_of(file) if "alert" in rule]
RECORDED = {rule["record"] for file in RULES.values() for rule in rules_of(file) if "record" in rule}


def names_in(page: str) -> set[str]:
    """The series that a page of metrics declares, whether or not they have samples yet."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", page, re.MULTILINE):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names, as a router, a simulated worker and an operator that just started tell them."""
    source = CollectorRegistry(auto_describe=False)
    source.register(_Kubernetes())
    pages = [generate_latest(source).decode(), generate_latest(Metrics().registry).decode(), *asyncio.run(_served())]
    return set().union(*map(names_in, pages))


async def _served() -> list[str]:
    """The metrics pages of a router and a worker, and the worker's of its accelerators."""
    config = FleetConfig(pools=[], policies=[], telemetry=TelemetrySpec(), max_watts=1000.0)
    router = RouterApp(config, bus=Redis("redis://127.0.0.1:1", "nobody").bus())
    worker = Server(parse(["llama-8b", "--host", "127.0.0.1", "--port", "0"]))
    await router.start()
    await worker.start()
    try:
        # What the process beside several router processes adds.
        hub = CollectorRegistry(auto_describe=False)
        hub.register(Hub([], None))
        async with httpx.AsyncClient() as client:
            served = f"http://127.0.0.1:{worker.port}"
            urls = [f"http://127.0.0.1:{router.admin_port}/metrics", f"{served}/metrics", f"{served}/dcgm/metrics"]
            pages = [(await client.get(url)).raise_for_status().text for url in urls]
            return [*pages, generate_latest(hub).decode()]
    finally:
        await worker.close()
        await router.stop()


class _Kubernetes:
    """What a router adds when it follows the API server."""

    def collect(self) -> Any:
        access = Access("https://127.0.0.1:1", "default", ssl.create_default_context, lambda: "")
        return KubernetesSource(access, "default/fleet").metrics()


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("1 - 2e3", set()),
        (
            'sum by (le, pod) (rate(a_total{c=~"d}|[e]"}[5m])) / on (pod) group_left (pool) b:c unless e offset 1h',
            {"a_total", "b:c", "e"},
        ),
        ("histogram_quantile(0.99, max(a) without (b))", {"a"}),
        ('label_replace(a[$__range], "b", "$1", "c", "(.+)") > bool Inf', {"a"}),
    ],
)
def test_metrics_are_found_in_an_expression(expression: str, names: set[str]) -> None:
    assert metrics_of(expression) == names


def test_there_is_a_dashboard_file_for_each_in_code() -> None:
    assert BOARDS.keys() == dashboards.BOARDS.keys()
    for path, text in dashboards.outputs().items():
        assert (REPOSITORY / path).read_text() == text, f"{path}: run `make generate`"


@pytest.mark.parametrize("name", BOARDS)
def test_every_metric_of_a_dashboard_is_exported(name: str, exported: set[str]) -> None:
    for expression in expressions(BOARDS[name]):
        used = metrics_of(expression)
        assert used, expression
        assert used <= exported, f"{expression}: nobody exports {sorted(used - exported)}"


@pytest.mark.parametrize("name", BOARDS)
def test_every_variable_lists_the_values_of_a_label_of_a_metric(name: str, exported: set[str]) -> None:
    for variable in BOARDS[name]["templating"]["list"]:
        if variable["type"] == "query":
            (series,) = re.findall(r"^label_values\(([^,{]+)(?:\{.*\})?, \w+\)$", variable["query"])
            assert series in exported, variable["name"]


@pytest.mark.parametrize("name", RULES)
def test_every_metric_of_a_rule_is_exported_or_recorded(name: str, exported: set[str]) -> None:
    known = RECORDED | exported
    for rule in rules_of(RULES[name]):
        used = metrics_of(rule["expr"])
        assert used and used <= known, f"{rule}: nobody exports {sorted(used - known)}"


def test_recorded_series_are_read() -> None:
    read = set().union(*(metrics_of(alert["expr"]) for alert in ALERTS))
    assert read >= RECORDED


def test_uids_and_titles_are_kvfleets_own_and_stay() -> None:
    names = {board["uid"]: board["title"] for board in BOARDS.values()}
    assert names == {
        "kvfleet-fleet": "kvfleet / Fleet",
        "kvfleet-routing": "kvfleet / Routing",
        "kvfleet-energy": "kvfleet / Energy",
        "kvfleet-autoscaling": "kvfleet / Autoscaling",
        "kvfleet-operator": "kvfleet / Operator",
    }


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_title_unit_description_and_a_place_of_their_own(name: str) -> None:
    board = BOARDS[name]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, f"{panel['title']} lies upon another panel"
        taken |= cells
    for panel in panels(board):
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters) > 0


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_uses_the_variables_it_has_and_grafanas_interval(name: str) -> None:
    board = BOARDS[name]
    declared = {variable["name"] for variable in board["templating"]["list"]}
    used = {found for text in expressions(board) for found in VARIABLE.findall(text)}
    for variable in board["templating"]["list"]:
        used |= set(VARIABLE.findall(str(variable.get("query", ""))))
    assert used - GRAFANAS_OWN == declared - {"datasource"}
    for text in expressions(board):
        assert not re.search(r"\[\d", text), f"{text}: a fixed range; write $__rate_interval"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert['alert']}-{alert['for']}")
def test_alerts_say_how_severe_they_are_and_what_to_do(alert: dict[str, Any]) -> None:
    assert re.fullmatch(r"Kvfleet[A-Za-z]+", alert["alert"])
    assert alert["labels"]["severity"] in SEVERITIES
    annotations = alert["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url"}
    page = annotations["runbook_url"].removeprefix(RUNBOOKS)
    assert page != annotations["runbook_url"]
    title = (REPOSITORY / "docs/runbooks" / page).read_text().splitlines()[0]
    assert alert["alert"] in title, f"{page}: its title does not name {alert['alert']}"


def test_every_runbook_belongs_to_an_alert_and_its_links_lead_somewhere() -> None:
    wanted = {alert["annotations"]["runbook_url"].removeprefix(RUNBOOKS) for alert in ALERTS}
    folder = REPOSITORY / "docs/runbooks"
    assert {path.name for path in folder.glob("*.md")} == wanted
    for path in folder.glob("*.md"):
        for target in re.findall(r"\]\(([\w./-]+\.md)", path.read_text()):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"


def test_every_alert_is_fired_by_a_test_of_promtool() -> None:
    told = "".join(path.read_text() for path in (Path(__file__).parent / "rules").glob("*_test.yaml"))
    assert {alert["alert"] for alert in ALERTS} == set(re.findall(r'alertname(?:="|: )(\w+)', told))
