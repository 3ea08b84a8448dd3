"""How long it takes until what one router replica knows is known at the others, under load.

    python bench/sharing_latency.py [--seconds 20] [--rate 100] [--only redis]

Real routers (the client port, the dispatcher, the buses, the supervisor and the hub of --processes), a real redis-server, and
requests at `--rate` a second to each router process: prompts of 8 KiB, streams of 16 events from workers that cost nothing
(bench/c, as bench/dataplane.py builds them). Beside these each router process sends probes, some 20 a second, of a prompt of
one new block to a worker of its own, which exists in the configuration only. Every other process notes when it counts them:

    in flight   the probe counts in what the worker has elsewhere
    prefix      its block counts as cached there

CLOCK_MONOTONIC is the same for all processes of a machine. A row is about all (probe, other process) pairs. Needs redis-server
and a C compiler. All of it shares the machine's cores: on few of them times are long because processes wait for a core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop
from dataplane import build, free_ports

from kvfleet_api.compile import static_fleet
from kvfleet_api.fleetconfig import Endpoint, FleetConfig, WeightedPool
from kvfleet_router.app import RouterApp, serve
from kvfleet_router.core.parse import ParsedRequest
from kvfleet_router.core.ticket import Ticket
from kvfleet_router.io.processes.run import Place, run_processes
from kvfleet_router.io.sharing.redis_bus import Redis

HOST = "127.0.0.1"
WORKERS = 4
PROBES_PER_S = 20.0
PROMPT_BYTES, GROUPS, EVENTS, PACE_US = 8192, 8, 16, 3000
CONNECTIONS = 16
"""Of the load, at each router process."""
START_S = 60.0
SETTLE_S = 1.0
"""At the beginning and the end; not counted."""


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    pods: int
    processes: int
    redis: bool

    @property
    def replicas(self) -> int:
        return self.pods * self.processes


VARIANTS = (
    Variant("2 routers, Redis", 2, 1, redis=True),
    Variant("4 routers, Redis", 4, 1, redis=True),
    Variant("1 router, 2 processes", 1, 2, redis=False),
    Variant("1 router, 4 processes", 1, 4, redis=False),
    Variant("2 routers x 2 processes, Redis", 2, 2, redis=True),
)


# A router process


def fleet(worker_ports: Sequence[int], replicas: int) -> FleetConfig:
    """Workers of model `bench`, and for each replica a pool of one worker that only its probes are sent to."""
    config = static_fleet([f"http://{HOST}:{port}" for port in worker_ports], "kvfleet", "bench")
    (pool,), (policy,) = config.pools, config.policies
    pools, policies = [pool], [policy]
    for number in range(replicas):
        name = probe(number)
        endpoint = Endpoint(name=name, url=f"http://{HOST}:1")
        pools.append(pool.model_copy(update={"name": name, "model": name, "endpoints": [endpoint]}))
        update = {"name": name, "models": [name], "pools": [WeightedPool(name=name)], "strategy": "llmd_default"}
        policies.append(policy.model_copy(update=update))
    return config.model_copy(update={"pools": pools, "policies": policies, "routers": replicas})


def probe(replica: int) -> str:
    """The model, pool, policy and worker of a replica's probes."""
    return f"probe-{replica}"


class Observed:
    """A router that sends probes of its own, and notes when it counts those of others."""

    def __init__(self, app: RouterApp, number: int, replicas: int) -> None:
        assert app.sharer is not None
        self._app, self._number, self._replicas = app, number, replicas
        self._others = [other for other in range(replicas) if other != number]
        self.sent: list[float] = []
        self.seen: dict[str, dict[int, list[tuple[int, float]]]] = {
            kind: {other: [(0, 0.0)] for other in self._others} for kind in ("in flight", "prefix")
        }
        self._hear = app.sharer.hear
        app.sharer.hear = self.hear  # type: ignore[method-assign]

    def hear(self, messages: Sequence[bytes]) -> None:
        """What came, taken in as ever; then: what is counted by now?"""
        self._hear(messages)
        now = time.monotonic()
        for other in self._others:
            worker = self._app.dispatcher.worker(probe(other))
            assert worker is not None
            for kind, count in (("in flight", worker.elsewhere.in_flight), ("prefix", len(worker.cache))):
                told = self.seen[kind][other]
                if count > told[-1][0]:
                    told.append((count, now))

    async def send(self, ready: Path) -> None:
        """Probes at random times, once all know each other."""
        rng = random.Random(self._number)
        sharer = self._app.sharer
        assert sharer is not None
        while sharer.sharing.peers < self._replicas - 1:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)
        ready.touch()  # noqa: ASYNC240 - once
        model = probe(self._number)
        while True:
            await asyncio.sleep(rng.expovariate(PROBES_PER_S))
            parsed = ParsedRequest("chat", model, stream=True, prompt_bytes=256, prompt_tokens=64)
            parsed.block_hashes = [rng.getrandbits(62)]
            self.sent.append(time.monotonic())
            ticket = self._app.dispatcher.submit(parsed, request_id="", on_assigned=lambda result: None)
            assert isinstance(ticket, Ticket)


def run_pod(pod: int, variant: Variant, directory: Path, port: int, admin_port: int, redis_port: int) -> int:
    """One router until SIGTERM, of one process or of several."""
    config = FleetConfig.model_validate_json((directory / "fleet.json").read_text())
    redis = Redis(f"redis://{HOST}:{redis_port}", "kvfleet:bench") if variant.redis else None

    def run(place: Place | None) -> int:
        number = pod * variant.processes + (place.number if place else 0)
        bus = place.bus() if place else redis.bus() if redis else None
        listeners, admin_path = (place.listeners, place.admin_path) if place else (None, None)
        app = RouterApp(
            config, host=HOST, port=port, admin_port=admin_port, bus=bus, listeners=listeners, admin_path=admin_path
        )
        uvloop.run(observe(app, number))
        return 0

    async def observe(app: RouterApp, number: int) -> None:
        observed = Observed(app, number, variant.replicas)
        sending = asyncio.create_task(observed.send(directory / f"ready-{number}"))
        await serve(app)
        sending.cancel()
        told = {"sent": observed.sent, "seen": observed.seen}
        (directory / f"told-{number}.json").write_text(json.dumps(told))

    if variant.processes == 1:
        return run(None)
    return run_processes(
        run, variant.processes, host=HOST, port=port, admin_host=HOST, admin_port=admin_port, redis=redis,
        limits=config.limits,
    )  # fmt: skip


# All of them


@contextlib.contextmanager
def process(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the block ends."""
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield started
    finally:
        started.terminate()
        started.wait()


def until(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1.0) as answer:
        return bool(answer.status == 200)
    return False


def measure(variant: Variant, seconds: float, rate: float) -> tuple[dict[str, list[float]], int]:
    """Delays in seconds, ascending, by kind; and how many requests the load had answered."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        build(directory)
        ports = free_ports(WORKERS + 2 * variant.pods + 1)
        workers, (redis_port, *rest) = ports[:WORKERS], ports[WORKERS:]
        stack.enter_context(process(str(directory / "worker"), *map(str, workers), log=directory / "worker.log"))
        until(lambda: answers(f"http://{HOST}:{workers[0]}/pace?us={PACE_US}"), "the workers do not answer")
        if variant.redis:
            program = shutil.which("redis-server")
            assert program is not None, "install redis-server"
            arguments = ("--port", str(redis_port), "--bind", HOST, "--save", "")
            stack.enter_context(process(program, *arguments, log=directory / "redis.log"))
        (directory / "fleet.json").write_text(fleet(workers, variant.replicas).to_json())
        pods = []
        for pod in range(variant.pods):
            options = [str(pod), str(VARIANTS.index(variant)), str(directory), *map(str, rest[2 * pod : 2 * pod + 2])]
            command = (sys.executable, __file__, "--pod", *options, str(redis_port))
            pods.append(stack.enter_context(process(*command, log=directory / f"pod-{pod}.log")))
        replicas = range(variant.replicas)
        known = [directory / f"ready-{number}" for number in replicas]
        try:
            until(lambda: all(path.exists() for path in known), "the routers do not hear each other")
        except AssertionError:
            for path in directory.glob("*.log"):
                print(path.read_text()[-2000:], file=sys.stderr)
            raise
        loads = []
        if rate:
            for pod in range(variant.pods):
                load = [str(directory / "load"), "-p", str(rest[2 * pod]), "-s", str(seconds + 2 * SETTLE_S)]
                load += ["-c", str(CONNECTIONS * variant.processes), "-r", str(rate * variant.processes)]
                load += ["-b", str(PROMPT_BYTES), "-g", str(GROUPS), "-k", str(EVENTS)]
                loads.append(subprocess.Popen(load, stdout=subprocess.PIPE))
        began = time.monotonic() + SETTLE_S
        time.sleep(seconds + 2 * SETTLE_S)
        ended = time.monotonic() - SETTLE_S
        done = sum(json.loads(load.communicate()[0])["done"] for load in loads)
        for each in pods:
            os.kill(each.pid, signal.SIGTERM)
        for each in pods:
            each.wait()
        told = [json.loads((directory / f"told-{number}.json").read_text()) for number in replicas]
    return {kind: delays(told, kind, began, ended) for kind in ("in flight", "prefix")}, done


def delays(told: Sequence[dict[str, object]], kind: str, began: float, ended: float) -> list[float]:
    """From a probe until another process counted as many; of all pairs, ascending."""
    found = []
    for number, sender in enumerate(told):
        sent = sender["sent"]
        assert isinstance(sent, list)
        for other in told:
            if other is sender:
                continue
            seen = iter(other["seen"][kind][str(number)])  # type: ignore[index]
            count, at = next(seen)
            for probes, sent_at in enumerate(sent, 1):
                while count < probes:
                    count, at = next(seen, (len(sent) + 1, float("inf")))
                if began <= sent_at <= ended:
                    found.append(at - sent_at)
    return sorted(found)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=20.0)
    options.add_argument("--rate", type=float, default=100.0, help="requests per second at each router process")
    options.add_argument("--only", default="", help="variants whose name contains this")
    options.add_argument("--pod", nargs=6, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.pod:
        pod, variant, directory, *ports = chosen.pod
        sys.exit(run_pod(int(pod), VARIANTS[int(variant)], Path(directory), *map(int, ports)))
    print(f"{chosen.rate:g} requests/s at each router process; load of the machine before: {os.getloadavg()[0]:.1f}\n")
    print("| replicas | what | pairs | p50 ms | p90 | p99 | most | requests answered |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for variant in VARIANTS:
        if chosen.only.lower() not in variant.name.lower():
            continue
        figures, done = measure(variant, chosen.seconds, chosen.rate)
        for kind, found in figures.items():
            points = [1e3 * found[min(int(share * len(found)), len(found) - 1)] for share in (0.5, 0.9, 0.99, 1.0)]
            texts = " | ".join(f"{point:.1f}" for point in points)
            print(f"| {variant.name} | {kind} | {len(found)} | {texts} | {done} |", flush=True)


if __name__ == "__main__":
    main()
