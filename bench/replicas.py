"""Router replicas and processes, live: what clients get from one router, and from several that know of each other or do not.

    python bench/replicas.py [--trace shared-prefix] [--requests 600] [--load 0.7] [--speed 4]

The same requests at the same times, each variant on fresh simulated workers (real processes with cold caches): 1, 2 and 4
routers, each request sent to one of them drawn at random, with and without Redis between them; and one router of 2 and 4
processes. Needs redis-server. Everything runs on this machine and shares its cores: compare within a run only, and
hit ratio and balance rather than times where the machine is busy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from live_fleet import Setting, measured, running, setting

from kvfleet.local import HOST, free_ports
from kvfleet.replay import Outcome, replay
from kvfleet_api.fleetconfig import FLEET_CONFIG_KEY, FleetConfig

START_S = 60.0


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    routers: int = 1
    processes: int = 1
    redis: bool = False


VARIANTS = (
    Variant("1 router"),
    Variant("2 routers, alone", 2),
    Variant("2 routers, Redis", 2, redis=True),
    Variant("4 routers, alone", 4),
    Variant("4 routers, Redis", 4, redis=True),
    Variant("1 router, 2 processes", processes=2),
    Variant("1 router, 4 processes", processes=4),
    Variant("2 routers x 2 processes, Redis", 2, 2, redis=True),
)


@contextlib.asynccontextmanager
async def process(*command: str, log: Path) -> AsyncIterator[None]:
    """Run a command until the block ends."""
    with log.open("wb") as output:
        started = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        try:
            yield
        finally:
            if started.returncode is None:
                started.terminate()
            await started.wait()


async def ready(client: httpx.AsyncClient, admin_port: int, peers: int) -> None:
    """Wait until a router serves, and hears so many others."""
    async with asyncio.timeout(START_S):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = await client.get(f"http://{HOST}:{admin_port}/readyz")
                if answer.status_code == 200 and (not peers or await heard(client, admin_port) >= peers):
                    return
            await asyncio.sleep(0.1)


async def heard(client: httpx.AsyncClient, admin_port: int) -> int:
    text = (await client.get(f"http://{HOST}:{admin_port}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("kvfleet_router_sharing_peers ")]
    return int(float(lines[0].rpartition(" ")[2])) if lines else 0


@contextlib.asynccontextmanager
async def routers(variant: Variant, config: FleetConfig, directory: Path, speed: float) -> AsyncIterator[list[str]]:
    """The variant's routers, all ready; their URLs."""
    total = variant.routers * variant.processes
    path = directory / f"routers-{FLEET_CONFIG_KEY}"
    path.write_text(config.model_copy(update={"routers": total}).to_json())
    async with contextlib.AsyncExitStack() as stack:
        options = ["--config", str(path), "--host", HOST, "--speed", str(speed), "--processes", str(variant.processes)]
        if variant.redis:
            [port] = free_ports(1)
            program = shutil.which("redis-server")
            assert program is not None
            arguments = ("--port", str(port), "--bind", HOST, "--save", "")
            await stack.enter_async_context(process(program, *arguments, log=directory / "redis.log"))
            options += ["--redis-url", f"redis://{HOST}:{port}"]
        urls, admin_ports = [], []
        for number in range(variant.routers):
            port, admin_port = free_ports(2)
            command = (sys.executable, "-m", "kvfleet", "router", *options)
            ports = ("--port", str(port), "--admin-port", str(admin_port))
            await stack.enter_async_context(process(*command, *ports, log=directory / f"router-{number}.log"))
            urls.append(f"http://{HOST}:{port}")
            admin_ports.append(admin_port)
        peers = total - 1 if variant.redis else variant.processes - 1
        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
            await asyncio.gather(*(ready(client, admin_port, peers) for admin_port in admin_ports))
        yield urls


async def send(given: Setting, urls: Sequence[str], speed: float) -> list[Outcome]:
    """Every request to one of the routers, drawn at random; the same draw for every variant."""
    draw = random.Random(0)
    rows_of: dict[str, list[int]] = {url: [] for url in urls}
    for number in range(len(given.rows)):
        rows_of[draw.choice(urls)].append(number)
    rows = given.rows
    parts = await asyncio.gather(
        *(
            replay([rows[number] for number in numbers], url=url, model=given.model, speed=speed, timeout_s=180.0)
            for url, numbers in rows_of.items()
        )
    )
    return [outcome for part in parts for outcome in part]


async def measure(variant: Variant, given: Setting, speed: float) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with running(given, directory, strategy="kvfleet", speed=speed):
            config = FleetConfig.model_validate_json((directory / FLEET_CONFIG_KEY).read_text())
            async with routers(variant, config, directory, speed) as urls:
                return await send(given, urls, speed)


def balance(outcomes: Sequence[Outcome]) -> float:
    """Output and uncached prompt tokens of the busiest worker, as a multiple of the mean."""
    work: Counter[str] = Counter()
    for outcome in outcomes:
        work[outcome.worker] += outcome.prompt_tokens - outcome.cached_tokens + outcome.output_tokens
    return max(work.values()) / (sum(work.values()) / len(work))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trace", default="shared-prefix", help="trace file, or shared-prefix")
    options.add_argument("--requests", type=int, default=600)
    options.add_argument("--load", type=float, default=0.7, help="share of the saturation rate")
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--speed", type=float, default=4.0, help="virtual seconds per second")
    options.add_argument("--only", help="variants whose name contains this")
    chosen = options.parse_args()
    given = setting(chosen.trace, chosen.requests, chosen.load, chosen.workers)
    print(
        f"{len(given.requests)} requests of {Path(chosen.trace).name}, {given.rate_rps:.1f}/s (load {chosen.load:g}), "
        f"{chosen.workers} workers, {chosen.speed:g} times faster than real\n"
    )
    print("| variant | hit ratio | TTFT mean | p99 | in SLO | balance | failed |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for variant in VARIANTS:
        if chosen.only and chosen.only not in variant.name:
            continue
        outcomes = asyncio.run(measure(variant, given, chosen.speed))
        figures = measured(given, outcomes)
        print(
            f"| {variant.name} | {figures.hit_ratio:.3f} | {figures.ttft_mean_s:.3f} s | {figures.ttft_p99_s:.2f} s "
            f"| {figures.slo_attainment:.1%} | {balance(outcomes):.2f} | {figures.failed} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
