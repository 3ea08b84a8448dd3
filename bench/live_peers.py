"""kvfleet beside real routers, live: the same simulated workers behind each, the same arrivals in front, one after the other.

    make peers && python bench/live_peers.py [--trace FILE] [--requests 300] [--load 0.8] [--workers 8] [--speed 0.5]

The binaries of sglang-router and vllm-router run with each of their policies given below. Workers are started anew for each router:
caches are cold, and what one leaves behind does not help the next. `--speed` below 1 stretches virtual time where the machine is small.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dataplane_peers import Router, peers
from live_fleet import FLEET, Measured, Setting, measured, running, send, setting

from kvfleet.local import LocalFleet, free_ports

OURS = ("kvfleet", "least_request")
START_TIMEOUT_S = 60.0


def main() -> None:
    arguments = parse()
    made = setting(arguments.trace, arguments.requests, arguments.load, arguments.workers)
    found = {name: router for name, router in peers(arguments.venv).items() if name.startswith(("sglang", "vllm"))}
    if not found:
        raise SystemExit("error: no sglang-router or vllm-router here: run `make peers`, or say --venv DIR")
    print(
        f"{len(made.requests)} requests at {made.rate_rps:.2f} req/s ({arguments.load:g} of saturation) on {arguments.workers} "
        f"workers, at {arguments.speed:g} x real time; seconds are virtual\n"
    )
    print("| router | TTFT mean | p50 | p90 | p99 | in SLO | goodput/s | hit ratio | completed | failed |")
    print("| --- |" + " ---: |" * 9)
    for strategy in OURS:
        print(line(f"kvfleet {strategy}", asyncio.run(run(made, None, strategy, arguments.speed))), flush=True)
    for name, router in found.items():
        print(line(name, asyncio.run(run(made, router, "least_request", arguments.speed))), flush=True)


async def run(made: Setting, peer: Router | None, strategy: str, speed: float) -> Measured:
    """A fleet of its own; the load goes to the peer where there is one, else to kvfleet's router."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        (path / "fleet").mkdir()
        async with running(made, path / "fleet", strategy=strategy, speed=speed) as fleet:
            assert fleet.router is not None
            if peer is None:
                return measured(made, await send(made, fleet.router.url, speed=speed, timeout_s=900.0))
            with started(peer, fleet, path) as url:
                return measured(made, await send(made, url, speed=speed, timeout_s=900.0))


@contextlib.contextmanager
def started(peer: Router, fleet: LocalFleet, directory: Path) -> Iterator[str]:
    """The peer's process in front of the fleet's workers; its URL."""
    port, admin_port = free_ports(2)
    command = peer.command(port, admin_port, [worker.port for worker in fleet.workers], directory)
    with (directory / "peer.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process, directory / "peer.log")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url + "/health", timeout=2.0) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"error: the router did not start:\n{log.read_text(errors='replace')[-2000:]}")


def line(name: str, found: Measured) -> str:
    seconds = (found.ttft_mean_s, found.ttft_p50_s, found.ttft_p90_s, found.ttft_p99_s)
    cells = [*(f"{value:.3f}" for value in seconds), f"{found.slo_attainment:.1%}", f"{found.goodput_rps:.2f}"]
    cells += [f"{found.hit_ratio:.1%}", str(found.completed), str(found.failed)]
    return f"| {name} | {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = FLEET.parent / "traces" / "mooncake_synthetic_300.jsonl"
    parser.add_argument(
        "--venv",
        type=Path,
        action="append",
        default=[],
        help="with sglang-router or vllm-router (default: those of `make peers`)",
    )
    parser.add_argument("--trace", default=str(shipped), help="a trace without sessions, or `shared-prefix`")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--load", type=float, default=0.8, help="share of the saturation rate")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--speed", type=float, default=0.5, help="virtual seconds in a real one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
