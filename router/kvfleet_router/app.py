"""The router put together: dispatcher, client port, admin port, configuration source, clockwork and signals.

`RouterApp` runs inside any event loop (tests, the demo); `run_router` is a whole process on uvloop. The ports listen before
the router calls itself ready; on SIGTERM or SIGINT it stops to be ready, accepts no more, lets running answers end for
`drain_s` at most, and leaves. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import uvloop
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvfleet_api.fleetconfig import FleetConfig, PoolConfig
from kvfleet_router.core.dispatcher import ConfigError, Dispatcher, WorkerEndpoint
from kvfleet_router.io.admin import Admin
from kvfleet_router.io.auth import ApiKeys, Authenticator, KeysRejected
from kvfleet_router.io.config_source import ConfigRejected, ConfigSource, FileSource, StaticSource
from kvfleet_router.io.energy_metrics import EnergyMetrics
from kvfleet_router.io.files import WatchedFiles
from kvfleet_router.io.gate import Gate
from kvfleet_router.io.kvevents.follower import Follower
from kvfleet_router.io.kvevents.metrics import event_metrics
from kvfleet_router.io.loaded import Loaded
from kvfleet_router.io.metrics import PREFIX, RouterMetrics
from kvfleet_router.io.models import ModelList
from kvfleet_router.io.probing import Prober
from kvfleet_router.io.processes.run import Place, run_processes
from kvfleet_router.io.proxy import Proxy
from kvfleet_router.io.server import Server, addresses_text
from kvfleet_router.io.sharing.redis_bus import BadRedis, Redis
from kvfleet_router.io.sharing.sharer import Bus, Sharer
from kvfleet_router.io.telemetry import Telemetry
from kvfleet_router.io.tls import Certificate, CertificateRejected, WorkerTrust, WorkerTrusts
from kvfleet_router.io.tracing import Tracer
from kvfleet_router.io.upstream import Upstreams
from kvfleet_router.policies import REGISTRY

log = logging.getLogger("kvfleet.router")

SWEEP_S = 0.25
ADMIN_DRAIN_S = 1.0
GC_THRESHOLDS = (50_000, 20, 100)
"""Requests leave no reference cycles behind, so collecting seldom costs no memory, and saves a few percent."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""mallopt(3)."""
MMAP_THRESHOLD_BYTES, TRIM_THRESHOLD_BYTES = 1 << 20, 1 << 24


class RouterApp:
    """One router. `start`, then `stop`; `port` and `admin_port` say where it listens (for port 0)."""

    def __init__(
        self,
        config: FleetConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        admin_host: str | None = None,
        admin_port: int = 0,
        speed: float = 1.0,
        source: ConfigSource | None = None,
        certificate: Certificate | None = None,
        worker_trust: WorkerTrust | None = None,
        otlp_endpoint: str | None = None,
        trace_share: float = 1.0,
        api_keys: ApiKeys | None = None,
        rng: random.Random | None = None,
        bus: Bus | None = None,
        listeners: Callable[[], Sequence[socket.socket]] | None = None,
        admin_path: Path | None = None,
    ) -> None:
        """`speed`: seconds the dispatcher's clock moves in one second, for workers simulated in compressed time.
        `certificate`: serve clients by TLS. `worker_trust`: for workers with https addresses, where their
        pool says nothing of it. `api_keys`: ask clients for a key.
        `bus`: over it other replicas are told and heard. `listeners`: gives bound sockets to serve clients on, instead of `host`
        and `port`; `admin_path`: a Unix socket instead of the admin port.

        Raises ConfigError where the configuration cannot be served."""
        self.host, self.port = host, port
        self.admin_host, self.admin_port = admin_host or host, admin_port
        self._source = source or StaticSource()
        self._certificate = certificate
        self._trusts = WorkerTrusts(worker_trust or WorkerTrust())
        self._trusts.configure(config.pools)
        self._api_keys = api_keys
        self._listeners, self._admin_path = listeners, admin_path
        self._speed = speed
        self._rng = rng or random.Random()
        monotonic = time.monotonic
        self.clock = monotonic if speed == 1.0 else lambda: monotonic() * speed
        self.dispatcher = Dispatcher(
            config, clock=self.clock, rng=self._rng, policies=REGISTRY, epoch_s=time.time() - self.clock()
        )
        self.kv_events = Follower(self.dispatcher)
        self.loaded = Loaded(config, self._pool_views)
        self.metrics = RouterMetrics(self.dispatcher, self.loaded)
        self.telemetry = Telemetry(self.dispatcher, speed=speed)
        self.energy_metrics = EnergyMetrics(self.dispatcher)
        self.metrics.extra += (
            self._connection_metrics,
            self._source.metrics,
            self.telemetry.metrics,
            self.energy_metrics,
            event_metrics(self.dispatcher, self.kv_events),
        )
        self.tracer: Tracer | None = None
        if otlp_endpoint is not None:
            self.tracer = self.metrics.tracer = Tracer(
                otlp_endpoint, clock=self.clock, epoch_s=time.time() - self.clock(), rng=self._rng, share=trace_share
            )
            self.metrics.extra.append(self.tracer.metrics)
        if api_keys is not None:
            self.metrics.extra.append(api_keys.metrics)
        identity = self._rng.getrandbits(61) + 1
        self.sharer = None if bus is None else Sharer(self.dispatcher, bus, identity=identity, usage=api_keys)
        if self.sharer is not None:
            self.metrics.extra.append(self.sharer.metrics)
        self._unready = "starting"
        self._sweeper: asyncio.TimerHandle | None = None
        self._followers: list[asyncio.Task[None]] = []
        """What changes while the router runs: configuration, keys, certificate."""

    # Life

    async def start(self) -> None:
        """Listen, and follow the configuration source. Raises OSError where a port cannot be had; nothing listens or runs then."""
        self.upstreams = Upstreams(self._trusts)
        self.proxy = Proxy(
            self.dispatcher,
            self.upstreams,
            self.metrics,
            ModelList(self.dispatcher, self._trusts),
            clock=self.clock,
            rng=self._rng,
            speed=self._speed,
        )
        self.prober = Prober(self.dispatcher, self._trusts, self.proxy.spawn)
        self.metrics.extra.append(self.prober.metrics)
        limits = self.dispatcher.config.limits
        handler = self.proxy if self._api_keys is None else Authenticator(self.proxy, self._api_keys)
        self.server = Server(Gate(handler, lambda: self._source.unready), limits)
        self.admin_server = Server(Admin(self.dispatcher, self.loaded, self._registry(), lambda: self.unready), limits)
        try:
            await self._listen_for_admin()
            self._run()
            await self._listen()
        except BaseException:  # what listens or runs by now would keep the process, and its callers, waiting
            await self.stop(0.0)
            raise
        self._unready = ""
        admin = self._admin_path or addresses_text(self.admin_host, self.admin_port)
        log.info("serving on %s, admin on %s", addresses_text(self.host, self.port), admin)

    def _run(self) -> None:
        """All that goes on beside requests."""
        self.proxy.start()
        if self.sharer is not None:
            self.sharer.start()
        self._sweep()
        self.kv_events.update()
        self._follow(self.kv_events.run())
        self._follow(self._source.run(self))
        self._follow(self.telemetry.run())
        if self._api_keys is not None:
            self._follow(WatchedFiles(self._api_keys.path).follow(self._api_keys.reload))
        if self._certificate is not None:
            self._follow(WatchedFiles(*self._certificate.paths).follow(self._certificate.reload))
        if self.tracer is not None:
            self._follow(self.tracer.run())
        self._follow(self._trusts.follow())

    async def _listen_for_admin(self) -> None:
        if self._admin_path is not None:
            await self.admin_server.listen_at(self._admin_path)
        else:
            self.admin_port = await self.admin_server.listen(self.admin_host, self.admin_port)

    async def _listen(self) -> None:
        tls = None if self._certificate is None else self._certificate.context
        if self._listeners is not None:
            listeners = self._listeners()
            await self.server.listen_on(listeners, tls=tls)
            ports = [int(sock.getsockname()[1]) for sock in listeners if sock.family != socket.AF_UNIX]
            self.port = ports[0] if ports else self.port
        else:
            self.port = await self.server.listen(self.host, self.port, tls=tls)

    async def stop(self, drain_s: float | None = None) -> None:
        """Leave: answers under way may end within `drain_s` (default: the configuration's)."""
        self._unready = "draining"
        self.proxy.draining = True
        self.dispatcher.drain()
        cut = await self.server.drain(self.dispatcher.config.drain_s if drain_s is None else drain_s)
        if cut:
            log.warning("%d answers were cut off at the drain time limit", cut)
        for follower in self._followers:  # only now: requests that were queued still had to find the right workers
            follower.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)
        if self.sharer is not None:
            await self.sharer.close()
        self.kv_events.close()
        await self.proxy.close()
        await self.admin_server.drain(ADMIN_DRAIN_S)
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _follow(self, source: Coroutine[Any, Any, None]) -> None:
        follower = asyncio.create_task(source)
        follower.add_done_callback(_report)
        self._followers.append(follower)

    @property
    def unready(self) -> str:
        """Why no requests should come; empty: they may."""
        return self._unready or self._source.unready

    def _sweep(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        now = time.monotonic()
        self.upstreams.sweep(now)
        self.server.sweep(now)
        self.admin_server.sweep(now)
        self.dispatcher.energy_tick()
        self.prober.sweep()

    # What a configuration source calls

    def take_config(self, config: FleetConfig) -> None:
        """Serve `config` from now on; requests under way are not touched. Raises ConfigRejected."""
        if config.revision == self.loaded.revision:
            self.loaded.still_wanted()
            return
        try:
            self.dispatcher.configure(config)
        except ConfigError as error:
            raise ConfigRejected(str(error)) from error
        self._trusts.configure(config.pools)
        self.loaded.take(config)
        self.server.limits = self.admin_server.limits = config.limits
        self.kv_events.update()
        self._forget_origins()
        log.info("configuration %s is in use", self.loaded.revision)

    def take_endpoints(self, pool: str, endpoints: Sequence[WorkerEndpoint]) -> None:
        self.dispatcher.set_endpoints(pool, endpoints)
        self.kv_events.update()
        self._forget_origins()

    def pools_to_wake(self) -> list[PoolConfig]:
        names = self.dispatcher.pools_to_wake()
        return [pool.config for pool in self.dispatcher.pools() if pool.name in names] if names else []

    def reject_config(self, reason: str) -> None:
        self.loaded.refuse(reason)
        log.error("a configuration was not taken: %s", reason)

    def _pool_views(self) -> dict[str, dict[str, Any]]:
        """Pool → what its workers' caches are known by and, where books of joules are kept, what is known of its energy."""
        views: dict[str, dict[str, Any]] = {
            pool.name: asdict(self.kv_events.cache_view(pool)) for pool in self.dispatcher.pools()
        }
        if self.dispatcher.config.telemetry is not None:
            for told in self.dispatcher.energy_states():
                views[told.pool]["energy"] = told.document()
        return views

    def _forget_origins(self) -> None:
        self.upstreams.keep_only({worker.name for worker in self.dispatcher.workers()})

    # Metrics

    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(cast(Collector, self.metrics))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        return registry

    def _connection_metrics(self) -> list[Metric]:
        connections = GaugeMetricFamily(PREFIX + "client_connections", "Open client connections.")
        connections.add_metric((), len(self.server.connections))
        bodies = GaugeMetricFamily(PREFIX + "request_body_bytes", "Request bodies held, in bytes.")
        bodies.add_metric((), self.server.body_bytes)
        tasks = GaugeMetricFamily(PREFIX + "tasks", "Tasks of the router's event loop.")
        tasks.add_metric((), len(asyncio.all_tasks()))
        refused = CounterMetricFamily(
            PREFIX + "bad_requests", "Requests refused before they were read whole, by cause.", labels=("cause",)
        )
        for cause, count in self.server.refused.items():
            refused.add_metric((cause,), count)
        return [connections, bodies, tasks, refused]


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("changes are followed no more; what was last read stays in use", exc_info=task.exception())


async def serve(app: RouterApp) -> None:
    """Run until SIGTERM or SIGINT, then leave gracefully; a second signal cuts what is left."""
    loop = asyncio.get_running_loop()
    leave = asyncio.Event()
    cut = asyncio.Event()

    def on_signal() -> None:
        (cut if leave.is_set() else leave).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await app.start()
    await leave.wait()
    log.info("leaving: running answers may end within %g s", app.dispatcher.config.drain_s)
    stopping = asyncio.create_task(app.stop())
    cutting = asyncio.create_task(cut.wait())
    await asyncio.wait((stopping, cutting), return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        await app.stop(drain_s=0.0)
    cutting.cancel()
    await stopping


def run_router(
    config: FleetConfig,
    *,
    host: str,
    port: int,
    admin_host: str,
    admin_port: int,
    speed: float = 1.0,
    config_path: Path | None = None,
    adapt: Callable[[FleetConfig], FleetConfig] | None = None,
    source: ConfigSource | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    api_keys_file: Path | None = None,
    processes: int = 1,
    redis: Redis | None = None,
    worker_ca_file: Path | None = None,
    worker_server_name: str | None = None,
    otlp_endpoint: str | None = None,
    trace_share: float = 1.0,
) -> int:
    """The router as a process; returns its exit code: 1 where it cannot listen, 2 where what it was given cannot be used.

    `config_path`: the file `config` came from, followed from now on; `adapt` is applied to what is read from it again.
    `source`: what is followed in its place. `tls_cert` and `tls_key`: PEM files; clients are served by TLS.
    `worker_ca_file` and `worker_server_name`: for workers with https addresses, see tls.py. `api_keys_file`: see auth.py.
    All of them are read again when they change. `processes`: so many of them serve the port together (processes.py). `redis`:
    where routers of other pods are told and heard."""
    raise_open_files()
    give_large_memory_back()
    if source is None and config_path is not None:
        source = FileSource(config_path, adapt=adapt)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def build(place: Place | None) -> RouterApp:
        if (tls_cert is None) != (tls_key is None):
            raise CertificateRejected("a certificate and a key go together: give both or neither")
        bus: Bus | None = redis.bus() if redis is not None else None
        return RouterApp(
            config,
            host=host,
            port=port,
            admin_host=admin_host,
            admin_port=admin_port,
            speed=speed,
            source=source,
            certificate=Certificate(tls_cert, tls_key) if tls_cert is not None and tls_key is not None else None,
            otlp_endpoint=otlp_endpoint,
            trace_share=trace_share,
            worker_trust=WorkerTrust(worker_ca_file, worker_server_name),
            api_keys=ApiKeys(api_keys_file) if api_keys_file is not None else None,
            bus=bus if place is None else place.bus(),
            listeners=None if place is None else place.listeners,
            admin_path=None if place is None else place.admin_path,
        )

    def run(place: Place | None) -> int:
        app = build(place)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        uvloop.run(serve(app))
        return 0

    def run_all() -> int:
        build(None)  # what is wrong with it is said once, and before there are any processes
        gc.collect()
        gc.freeze()  # what is there by now stays as it is: the processes share its memory
        return run_processes(
            lambda place: _plainly(lambda: run(place)),
            processes,
            host=host,
            port=port,
            admin_host=admin_host,
            admin_port=admin_port,
            redis=redis,
            limits=config.limits,
        )

    return _plainly(run_all if processes > 1 else lambda: run(None))


def _plainly(run: Callable[[], int]) -> int:
    """Its exit code; what keeps a router from being started is said in words, not shown as a traceback."""
    try:
        return run()
    except (ConfigError, CertificateRejected, KeysRejected, BadRedis) as error:
        log.error("the router cannot be started: %s", error)
        return 2
    except OSError as error:
        log.error("cannot listen: %s", error)
        return 1


def give_large_memory_back() -> None:
    """glibc learns to keep what was freed: after a few request bodies of megabytes, megabytes lie about in pieces. Fixed limits
    end that; blocks from MMAP_THRESHOLD_BYTES on go back to the system when they are freed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def raise_open_files() -> None:
    """Every connection is a file: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
