"""The routers that `dataplane.py` can measure, and how each is started."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_api.resolve import GENERIC_COST

KVFLEET = Path(__file__).resolve().parent.parent / "router" / "kvfleet_router"


@dataclass
class Router:
    """How to start one. `command` gets its port, an admin port, the workers' ports and a directory for files."""

    name: str
    command: Callable[[int, int, Sequence[int], Path], list[str]]
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    resident_mib: float = 0.0
    """After the memory test; 0: not measured."""
    problem: str = ""


def urls(ports: Sequence[int]) -> list[str]:
    return [f"http://127.0.0.1:{port}" for port in ports]


def compiled() -> bool:
    """Whether the router's hot path is compiled here (scripts/compile_router.py)."""
    return any(KVFLEET.rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"))


def idle_fleet(ports: Sequence[int], strategy: str) -> FleetConfig:
    """The benchmark's workers as they are: what they do takes no time. (With a real engine's figures kvfleet would wait for
    prefills that nobody computes, and decide again and again.)"""
    cost = replace(
        GENERIC_COST,
        prefill_s_per_token=1e-8,
        prefill_s_per_token_pair=0.0,
        step_s=1e-4,
        step_s_per_sequence=1e-7,
        step_s_per_context_token=0.0,
    )
    return static_fleet(urls(ports), strategy, cost=cost)


def kvfleet(strategy: str, build: str) -> Router:
    """`build`: compiled, or plain: a copy of the sources alone."""

    def command(port: int, admin: int, workers: Sequence[int], directory: Path) -> list[str]:
        listen = ["--host", "127.0.0.1", "--port", str(port), "--admin-port", str(admin), "--log-level", "warning"]
        fleet = directory / f"{strategy}.json"
        fleet.write_text(idle_fleet(workers, strategy).model_dump_json(by_alias=True))
        run = [sys.executable, "-m", "kvfleet", "router", *listen, "--config", str(fleet)]
        if build == "compiled":
            return run
        plain = directory / "plain"
        if not plain.exists():
            shutil.copytree(KVFLEET, plain / KVFLEET.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        return ["env", f"PYTHONPATH={plain}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", *run]

    return Router(f"kvfleet {strategy}, {build}", command)


NGINX = """daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 1m; client_body_temp_path {directory};
  proxy_temp_path {directory}; fastcgi_temp_path {directory}; uwsgi_temp_path {directory}; scgi_temp_path {directory};
  keepalive_requests 1000000000; tcp_nodelay on;
  upstream workers {{ {servers} keepalive 512; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://workers; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
  }}
}}
"""
HAPROXY = """global
  nbthread 1
  maxconn 4096
defaults
  mode http
  option http-no-delay
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen router
  bind 127.0.0.1:{port}
  balance roundrobin
  http-reuse always
{servers}
"""
ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: router
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: workers, timeout: 0s}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: workers
    type: STATIC
    lb_policy: ROUND_ROBIN
    load_assignment:
      cluster_name: workers
      endpoints: [{{lb_endpoints: [{servers}]}}]
"""


def configured(name: str, program: str, arguments: Sequence[str], template: str, server: str, suffix: str) -> Router:
    """A proxy that is told everything by a file: `{file}` among its arguments."""

    def command(port: int, admin: int, workers: Sequence[int], directory: Path) -> list[str]:
        servers = "\n".join(server.format(port=worker) for worker in workers)
        if suffix == ".yaml":
            servers = servers.replace("\n", ",")
        path = directory / f"{name}{suffix}"
        path.write_text(template.format(port=port, servers=servers, directory=directory))
        return [program, *(argument.replace("{file}", str(path)) for argument in arguments)]

    return Router(name, command)


def rust_gateway(name: str, program: Sequence[str], policy: str) -> Router:
    def command(port: int, admin: int, workers: Sequence[int], directory: Path) -> list[str]:
        arguments = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls(workers), "--policy", policy]
        metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(admin)]
        return [*program, *arguments, *metrics, "--log-level", "warn" if "sglang" in name else "warning"]

    return Router(f"{name} {policy}", command)


def floor(port: int, admin: int, workers: Sequence[int], directory: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("floor.py")), str(port), *map(str, workers)]


PEERS: Final = Path(__file__).resolve().parent.parent / "out" / "peers"
"""Where `make peers` installs them, each in an environment of its own."""


def peers(venvs: Sequence[Path] = ()) -> dict[str, Router]:
    """Every peer found on this machine, in `venvs` or where `make peers` put them."""
    found = [Router("uvloop passing bytes", floor)]
    system = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin"))
    if program := shutil.which("nginx", path=system):
        found.append(configured("nginx", program, ["-c", "{file}"], NGINX, "server 127.0.0.1:{port};", ".conf"))
    if program := shutil.which("haproxy", path=system):
        found.append(
            configured("haproxy", program, ["-f", "{file}"], HAPROXY, "  server w{port} 127.0.0.1:{port}", ".cfg")
        )
    for venv in venvs or sorted(PEERS.glob("*")):
        for program in venv.glob("lib/python3*/site-packages/envoy/_bin/envoy"):
            endpoint = "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}"
            options = ["--disable-hot-restart", "--concurrency", "1", "-l", "warn", "-c", "{file}"]
            found.append(configured("envoy", str(program), options, ENVOY, endpoint, ".yaml"))
        if list(venv.glob("lib/python3*/site-packages/sglang_router")):
            launch = [str(venv / "bin/python"), "-m", "sglang_router.launch_router"]
            found += [rust_gateway("sglang-router", launch, policy) for policy in ("round_robin", "cache_aware")]
        if (venv / "bin/vllm-router").exists():
            launch = [str(venv / "bin/vllm-router")]
            found += [rust_gateway("vllm-router", launch, policy) for policy in ("round_robin", "cache_aware")]
    return {router.name: router for router in found}
