"""The dashboards on live data: a real Prometheus scrapes a fleet under load, and every panel's query gives numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from harness.kube import wait_until
from harness.sentences import Given, Story, Then, When
from harness.settings import E2E_DIR
from harness.streams import streams
from support.installation import Installation
from support.manifests import MODEL, engine, policy, pool, router
from support.scraping import component, entries

BOARDS = sorted((E2E_DIR.parent / "helm/kvfleet/files/dashboards").glob("*.json"))
SCRAPE_S: Final = 1
WINDOW_S: Final = 15
"""For $__rate_interval; Grafana takes at least four times the scrape interval."""
LOAD = (20, 20, 20, 40, 200, 200, 200, 200)
WHOLE = 8
"""Answers asked for in one piece."""
BOOKS = {"dcgmURLs": ["http://{host}:{port}/dcgm/metrics"], "intervalSeconds": 1}
"""Of joules, which the router keeps where it is told who measures them."""
VARIABLES = {"namespace": ".*", "pool": ".*", "router_namespace": ".*"}
"""As Grafana fills them when All is chosen."""


@dataclass(frozen=True)
class Prometheus:
    url: str

    def values(self, expression: str, over_s: int = 60) -> list[float]:
        """Every finite value of a query over the last minute."""
        now = time.time()
        asked = {"query": expression, "start": now - over_s, "end": now, "step": 2 * SCRAPE_S}
        answer = httpx.post(f"{self.url}/api/v1/query_range", data=asked, timeout=30)
        assert answer.is_success, f"{expression}: {answer.text}"
        found = [float(value) for series in answer.json()["data"]["result"] for _, value in series["values"]]
        return [value for value in found if math.isfinite(value)]


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[list[dict[str, Any]]], Prometheus]]:
    """Starts a Prometheus that scrapes these targets, on the loopback."""
    started: list[subprocess.Popen[bytes]] = []

    def start(targets: list[dict[str, Any]]) -> Prometheus:
        program = shutil.which("prometheus")
        assert program is not None, "there is no prometheus: run e2e/setup.sh"
        scraping = {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}
        jobs = [{"job_name": "kvfleet", "static_configs": targets}]
        file = tmp_path / "prometheus.yml"
        file.write_text(yaml.safe_dump({"global": scraping, "scrape_configs": jobs}))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        arguments = [f"--config.file={file}", f"--storage.tsdb.path={tmp_path}/data"]
        arguments.append(f"--web.listen-address=127.0.0.1:{port}")
        with (tmp_path / "prometheus.log").open("w") as log:
            environment = {**os.environ, "GOMAXPROCS": "1"}
            process = subprocess.Popen([program, *arguments], stdout=log, stderr=log, env=environment)
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(f"{url}/-/ready", process), "Prometheus is ready", 60)
        return Prometheus(url)

    yield start
    for process in started:
        process.terminate()
        process.wait(30)


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "Prometheus ended while starting"
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.HTTPError:
        return False


def queries() -> list[tuple[str, str]]:
    """(which panel, its query as Grafana sends it)"""
    return [
        (f"{path.stem}: {panel['title']} {target['refId']}", filled(target["expr"]))
        for path in BOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets") or []
    ]


def filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(f'"${name}', f'"{value}')
    return expression.replace("$__rate_interval", f"{WINDOW_S}s").replace("$__range", "60s")


def break_a_worker_under(count: int, url: str, story: Story, when: When, prometheus: Prometheus) -> None:
    """Answers that come whole have no first byte for seconds: those of the worker that is killed are asked of another."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1500, "ignore_eos": True}
    in_flight = "sum(kvfleet_router_in_flight)"
    wait_until(lambda: prometheus.values(in_flight), "the router is scraped", 30)
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(count)]
        enough = len(LOAD) + count // 2
        wait_until(lambda: max(prometheus.values(in_flight, over_s=4), default=0) >= enough, "they are at workers", 30)
        when.signalled(component(story.kube, "engine")[0]["metadata"]["name"], "engine")
    assert [answer.result().status_code for answer in asked] == [200] * count


def test_every_panel_shows_data(
    kvfleet: Installation,
    given: Given,
    when: When,
    then: Then,
    story: Story,
    prometheus: Callable[[list[dict[str, Any]]], Prometheus],
    tells: Callable[[str], None],
) -> None:
    simulated = engine(1)
    simulated["env"].append({"name": "POD_NAMESPACE", "value": story.kube.namespace})
    scaling = {"minReplicas": 2, "maxReplicas": 3, "signals": [{"concurrency": {"targetPerReplica": 2}}]}
    given.applied(
        pool(replicas=2, engine=simulated, autoscaling=scaling), policy(), router(telemetry=BOOKS, maxWatts=100_000)
    )
    then.ready("ModelPool", "llama", within_s=120).ready("FleetRouter", "router", within_s=120)
    then.ready("RoutingPolicy", "all", within_s=60).counts("Pod", 2, "app.kubernetes.io/component=engine")
    url = story.url("router", path="/v1/chat/completions")
    started = prometheus(entries(story, kvfleet))

    asked = queries()
    assert len(asked) > 80
    missing: list[str] = []

    def all_have_data() -> bool:
        missing[:] = [f"{panel}: {expression}" for panel, expression in asked if not started.values(expression)]
        return not missing

    with streams(url, MODEL, LOAD):
        assert httpx.post(url, json={"messages": []}, timeout=10).status_code == 400  # so that there is an error
        break_a_worker_under(WHOLE, url, story, when, started)  # so that there are retries
        wait_until(all_have_data, "every query gives numbers", 120, now=lambda: "no data for " + "; ".join(missing))
    tells(f"{len(asked)} queries of {len(BOARDS)} dashboards gave data")
