"""Runs what the operator renders as local processes: the cluster a laptop does not have.

Takes the very objects that would be applied. Each replica of a Deployment whose container runs `vllm serve` becomes a
`kvfleet worker` with the same arguments; the router's Deployment becomes a `kvfleet router` with the rendered FleetConfig,
to which the workers' addresses are added. Ports are free ones of the loopback; adapters, which a worker in a cluster loads
from the ConfigMap it mounts, are given to it as arguments. Nothing else changes.

Every process ends with `stop`, and with this process however it ends (Linux: parent-death signal).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import orjson
import yaml

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.fleetconfig import FLEET_CONFIG_KEY, Endpoint, FleetConfig
from kvfleet_operator.reconcile import lora

HOST = "127.0.0.1"
PROFILE_LABEL = "kvfleet.io/accelerator-profile"
POOL_LABEL = "kvfleet.io/pool"
LOG_TAIL_LINES = 20
PORTS = (20_000, 32_768)
"""From, and up to but without: ports to listen at."""


class LocalFleetError(RuntimeError):
    """A process did not start; the message ends with the last lines of its log."""


@dataclass
class LocalProcess:
    """One replica."""

    name: str
    argv: list[str]
    port: int
    ready_path: str
    ready_port: int
    log: Path
    popen: subprocess.Popen[bytes] | None = None
    pool: str = ""
    kv_events_port: int | None = None
    kv_replay_port: int | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


@dataclass
class LocalFleet:
    """The processes of one rendered fleet. Use as an async context manager."""

    objects: Sequence[dict[str, Any]]
    profiles: Sequence[AcceleratorProfile]
    directory: Path
    """An empty directory for logs and files handed to the processes."""
    speed: float = 1.0
    strategy: str | None = None
    """Replaces every policy's strategy."""
    port: int = 0
    """The router's port; 0: a free one."""
    start_timeout_s: float = 60.0
    workers: list[LocalProcess] = field(default_factory=list)
    router: LocalProcess | None = None

    async def __aenter__(self) -> LocalFleet:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the workers, then the router; return when all answer their readiness probe."""
        self._write_profiles()
        engines = [
            obj for obj in self.objects if obj["kind"] == "Deployment" and _command(obj)[:2] == ["vllm", "serve"]
        ]
        wanted = [(each, index) for each in engines for index in range(each["spec"].get("replicas", 1))]
        ports = free_ports(3 * len(wanted) + 2)
        self.workers = [self._worker(*each, *ports[2 + 3 * n : 5 + 3 * n]) for n, each in enumerate(wanted)]
        for worker in self.workers:
            self._spawn(worker)
        self.router = self._router(self.port or ports[0], ports[1])
        self._spawn(self.router)
        await asyncio.gather(*(self._ready(process) for process in [*self.workers, self.router]))

    async def stop(self) -> None:
        """End every process, the router first; what does not end in 5 s is killed."""
        processes = [p for p in ([self.router] if self.router else []) + self.workers if p.popen is not None]
        for process in processes:
            assert process.popen is not None
            with contextlib.suppress(ProcessLookupError):
                process.popen.terminate()
        await asyncio.to_thread(_reap, [p.popen for p in processes if p.popen is not None], 5.0)

    def dead(self) -> list[LocalProcess]:
        """Processes that ended by themselves."""
        everyone = [*self.workers, *([self.router] if self.router else [])]
        return [p for p in everyone if p.popen is not None and p.popen.poll() is not None]

    def _write_profiles(self) -> None:
        for profile in self.profiles:
            text = yaml.safe_dump(profile.model_dump(mode="json", by_alias=True, exclude_none=True))
            self._profile_path(profile.metadata.name).write_text(text)

    def _profile_path(self, name: str) -> Path:
        return self.directory / f"profile-{name}.yaml"

    def _worker(self, deployment: dict[str, Any], index: int, port: int, events: int, replay: int) -> LocalProcess:
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        name = f"{deployment['metadata']['name']}-{index}"
        args = [_expanded(arg, name) for arg in _command(deployment)[2:]]
        args = _with_option(args, "--port", str(port))
        args = _with_option(args, "--host", HOST)
        if "--kv-events-config" in args:
            config = orjson.loads(args[args.index("--kv-events-config") + 1])
            config |= {"endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{replay}"}
            args = _with_option(args, "--kv-events-config", orjson.dumps(config).decode())
        args += self._adapters(deployment)
        if profile := labels.get(PROFILE_LABEL):
            args += ["--profile", str(self._profile_path(profile))]
        args += ["--speed", str(self.speed), "--seed", str(index), "--pod", name]
        return LocalProcess(
            name=name,
            argv=["worker", *args],
            port=port,
            ready_path="/health",
            ready_port=port,
            log=self.directory / f"{name}.log",
            pool=labels[POOL_LABEL],
            kv_events_port=events,
            kv_replay_port=replay,
        )

    def _adapters(self, deployment: dict[str, Any]) -> list[str]:
        """What a worker in a cluster loads when it starts: the list it mounts."""
        volumes = deployment["spec"]["template"]["spec"].get("volumes", [])
        mounted = {volume["configMap"]["name"] for volume in volumes if volume["name"] == lora.VOLUME}
        lists = [o for o in self.objects if o["kind"] == "ConfigMap" and o["metadata"]["name"] in mounted]
        listed = {name: uri for found in lists for name, uri in orjson.loads(found["data"][lora.FILE]).items()}
        modules = [orjson.dumps({"name": name, "path": uri}).decode() for name, uri in listed.items()]
        return ["--lora-modules", *modules] if modules else []

    def _router(self, port: int, admin_port: int) -> LocalProcess:
        config_map = next(o for o in self.objects if o["kind"] == "ConfigMap" and FLEET_CONFIG_KEY in o.get("data", {}))
        config = self._with_workers(FleetConfig.model_validate_json(config_map["data"][FLEET_CONFIG_KEY]))
        path = self.directory / FLEET_CONFIG_KEY
        path.write_text(config.to_json())
        argv = ["router", "--config", str(path), "--host", HOST, "--port", str(port)]
        argv += ["--admin-port", str(admin_port), "--speed", str(self.speed)]
        return LocalProcess("router", argv, port, "/readyz", admin_port, self.directory / "router.log")

    def _with_workers(self, config: FleetConfig) -> FleetConfig:
        pools = [
            pool.model_copy(update={"endpoints": [_endpoint(w) for w in self.workers if w.pool == pool.name]})
            for pool in config.pools
        ]
        policies = config.policies
        if self.strategy:
            policies = [policy.model_copy(update={"strategy": self.strategy}) for policy in policies]
        return config.model_copy(update={"pools": pools, "policies": policies, "routers": 1})

    def _spawn(self, process: LocalProcess) -> None:
        with process.log.open("wb") as log:
            # Its own session: a Ctrl-C at the terminal reaches this process alone, which then ends the others in order.
            process.popen = subprocess.Popen(
                [sys.executable, "-m", "kvfleet", *process.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()) if sys.platform == "linux" else None,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    async def _ready(self, process: LocalProcess) -> None:
        deadline = asyncio.get_running_loop().time() + self.start_timeout_s
        async with httpx.AsyncClient(timeout=2.0) as client:
            while True:
                assert process.popen is not None
                if (code := process.popen.poll()) is not None:
                    raise LocalFleetError(f"{process.name} ended with code {code} while starting.\n{tail(process.log)}")
                if asyncio.get_running_loop().time() > deadline:
                    raise LocalFleetError(
                        f"{process.name} was not ready after {self.start_timeout_s:g} s.\n{tail(process.log)}"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    answer = await client.get(f"http://{HOST}:{process.ready_port}{process.ready_path}")
                    if answer.status_code == 200:
                        return
                await asyncio.sleep(0.1)


def _command(deployment: dict[str, Any]) -> list[str]:
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    return [*container.get("command", []), *container.get("args", [])]


def _expanded(arg: str, pod: str) -> str:
    """`$(VAR)` of the pod's own name and address, as a kubelet expands them."""
    return arg.replace("$(POD_NAME)", pod).replace("$(POD_IP)", HOST)


def _with_option(args: list[str], option: str, value: str) -> list[str]:
    """`args` with `option` set to `value`, in place of any earlier setting."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if skip:
            skip = False
        elif arg == option:
            skip = True
        elif not arg.startswith(option + "="):
            kept.append(arg)
    return [*kept, option, value]


def _endpoint(worker: LocalProcess) -> Endpoint:
    return Endpoint(
        name=worker.name,
        url=worker.url,
        kv_events_url=f"tcp://{HOST}:{worker.kv_events_port}",
        kv_replay_url=f"tcp://{HOST}:{worker.kv_replay_port}",
    )


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports of the loopback that were free a moment ago.

    From below the range that Linux and macOS take for outgoing connections: a client's connection, made before the port is
    listened at, could otherwise have it.
    """
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        for port in random.sample(range(*PORTS), PORTS[1] - PORTS[0]):
            if len(ports) == count:
                return ports
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                ports.append(port)
    raise LocalFleetError(f"no {count} free ports from {PORTS[0]} to {PORTS[1] - 1} at {HOST}: end what listens there")


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Let this process, a child of `parent`, have SIGTERM when that ends; at once if it has ended already, before it was asked."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _reap(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    for process in processes:
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
