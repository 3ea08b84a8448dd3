"""The operator's process: hold the Lease, then watch and reconcile until told to stop or the Lease is lost.

    probes up → credentials → wait for the Lease → list everything → watch (kopf) + workers + resync + reports + adapters
                                                                     └─ until SIGTERM, or the Lease is lost

A process that lost its Lease exits with status 1 and is restarted as a standby: no half-stopped leader is left behind.
Routers need none of this to go on serving.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from kubernetes.aio.client import Configuration

from kvfleet_operator import handlers
from kvfleet_operator.adapters import AdapterLoader
from kvfleet_operator.api import ApiError, KubeApi, NotLeader, kubernetes_config, load_configuration
from kvfleet_operator.apply import Applier
from kvfleet_operator.autoscale.readers.prometheus import PrometheusReader, PrometheusSettings
from kvfleet_operator.controller import Controller, run_workers
from kvfleet_operator.health import Health, HealthServer
from kvfleet_operator.lease import Lease, LeaseOptions
from kvfleet_operator.metrics import Metrics
from kvfleet_operator.reconcile.dependents import Key
from kvfleet_operator.reports import Reports
from kvfleet_operator.resources import CONFIG_MAP
from kvfleet_operator.resync import Resync
from kvfleet_operator.scaling.loop import Scaler, ScalerOptions
from kvfleet_operator.statuses import StatusWriter
from kvfleet_operator.workqueue import WorkQueue
from kvfleet_operator.world import World

logger = logging.getLogger(__name__)
NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DEFAULT_LEASE: Final = "kvfleet-operator"


def own_namespace() -> str:
    """The namespace of this pod; `default` outside a cluster."""
    try:
        return NAMESPACE_FILE.read_text().strip() or "default"
    except OSError:
        return os.environ.get("POD_NAMESPACE", "default")


def own_identity() -> str:
    """Who holds the Lease: the pod, and something random so that a restarted container is another holder."""
    return f"{os.environ.get('POD_NAME') or socket.gethostname()}_{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class OperatorOptions:
    """Everything the command line can say."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to watch; empty: the whole cluster."""
    lease_name: str = DEFAULT_LEASE
    lease_namespace: str = field(default_factory=own_namespace)
    identity: str = field(default_factory=own_identity)
    lease_duration_s: float = 15.0
    lease_deadline_s: float = 10.0
    lease_retry_s: float = 2.0
    resync_s: float = 300.0
    report_s: float = 2.0
    """Seconds between two questions to a router replica that is behind."""
    adapters_s: float = 1.0
    """Seconds between two looks at which workers need other adapters."""
    metrics_host: str = "0.0.0.0"
    metrics_port: int = 9090
    workers: int = 4
    debounce_s: float = 0.1
    scaling: ScalerOptions = field(default_factory=ScalerOptions)
    prometheus: PrometheusSettings | None = None
    """Where the autoscaler reads its signals; None: from the routers themselves."""
    kubeconfig: str | None = None
    context: str | None = None

    def __post_init__(self) -> None:
        if self.resync_s <= 0 or self.report_s <= 0 or self.adapters_s <= 0 or self.workers < 1:
            raise ValueError("resync, report and adapter seconds must be above 0 and workers at least 1: correct them")

    @property
    def watched(self) -> frozenset[str] | None:
        """None: all namespaces."""
        return frozenset(self.namespaces) or None

    @property
    def lease(self) -> LeaseOptions:
        return LeaseOptions(
            self.lease_name, self.lease_namespace, self.identity,
            self.lease_duration_s, self.lease_deadline_s, self.lease_retry_s,
        )  # fmt: skip


def run_operator(options: OperatorOptions) -> int:
    """Run until SIGTERM or SIGINT; the process's exit status."""
    for chatty in ("kopf.objects", "httpx"):  # a line for every event, and for every question to a router
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return asyncio.run(_until_signal(options))
    except kubernetes_config.ConfigException as error:
        logger.error("no credentials for a cluster: %s: pass --kubeconfig, or run inside a cluster", error)
    except (ApiError, OSError, ValueError) as error:
        logger.error("%s", error)
    return 1


async def _until_signal(options: OperatorOptions) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return await Operator(options).run(stop)


class Operator:
    """The parts, wired. `login` yields credentials; it is asked again when they have expired."""

    def __init__(self, options: OperatorOptions, login: Callable[[], Awaitable[Configuration]] | None = None) -> None:
        self.options = options
        self.metrics = Metrics()
        self.world = World()
        self.queue: WorkQueue[Key] = WorkQueue(debounce_s=options.debounce_s)
        self.started = asyncio.Event()
        """Set once this process leads and knows the whole world."""
        self.port = options.metrics_port
        self._login = login or partial(load_configuration, options.kubeconfig, options.context)

    async def run(self, stop: asyncio.Event) -> int:
        """Until `stop`: 0. Lease lost, or a part failed: 1."""
        options, metrics = self.options, self.metrics
        configuration = await self._login()
        async with AsyncExitStack() as stack:
            # The Lease has a client of its own: the other one's writes are fenced by it. Its reads are as short as its
            # writes, or a connection that went dead would cost the leadership.
            short_s = options.lease.write_timeout_s
            api = KubeApi(configuration, metrics, write_timeout_s=short_s)
            lease_api = KubeApi(configuration, metrics, write_timeout_s=short_s, read_timeout_s=short_s)
            stack.push_async_callback(api.close)
            stack.push_async_callback(lease_api.close)
            lease = Lease(lease_api, options.lease)
            api.fence = lease.fence
            resync = Resync(api, self.world, metrics, namespaces=options.watched, period_s=options.resync_s)
            health = Health(resync.ages, ready=lambda: lease.answered, watch_limit_s=3 * options.resync_s + 60)
            server = HealthServer(health, metrics.registry, host=options.metrics_host, port=options.metrics_port)
            self.port = server.port
            server.start()
            stack.callback(server.stop)
            beating = asyncio.create_task(health.keep_beating())
            stack.callback(beating.cancel)
            metrics.leader.set(0)
            metrics.queue_depth.set_function(lambda: len(self.queue))
            if not await _first(stop, lease.acquire()):
                return 0
            try:
                health.leading = True
                metrics.leader.set(1)
                return await self._lead(stop, api, lease, resync)
            finally:
                health.leading = False
                metrics.leader.set(0)
                await lease.release()

    async def _lead(self, stop: asyncio.Event, api: KubeApi, lease: Lease, resync: Resync) -> int:
        """What the leader does, all at once; the first part that ends ends them all."""
        options = self.options
        statuses = StatusWriter(api, self.world, instance=options.identity)
        controller = Controller(
            self.world,
            self.queue,
            Applier(api, self.world),
            statuses,
            self.metrics,
            now=_now,
            namespaces=options.watched,
        )
        reader = None if options.prometheus is None else PrometheusReader(options.prometheus)
        scaler = Scaler(
            api,
            self.world,
            statuses,
            self.metrics,
            now=_now,
            reader=reader,
            history=None if reader is None else reader.history,
            options=options.scaling,
            namespaces=options.watched,
        )
        reports = Reports(self.world, controller.routers_reported, eager_s=options.report_s)
        loader = AdapterLoader(
            self.world,
            controller.adapters_reported,
            self.metrics,
            partial(api.get, CONFIG_MAP),
            fence=api.fence,
            eager_s=options.adapters_s,
        )
        keeping = asyncio.create_task(lease.keep(), name="lease")
        listing = asyncio.create_task(_know(resync, reports, loader), name="first listing")
        waiting = asyncio.create_task(stop.wait(), name="stop")
        tasks = [keeping, waiting]
        try:
            await asyncio.wait([listing, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if listing.done():
                listing.result()
                self.started.set()
                quiet = asyncio.Event()
                tasks += [
                    asyncio.create_task(run_workers(controller, options.workers), name="workers"),
                    asyncio.create_task(resync.run(controller.enqueue_all), name="resync"),
                    asyncio.create_task(reports.run(), name="reports"),
                    asyncio.create_task(loader.run(), name="adapters"),
                    asyncio.create_task(scaler.run(), name="autoscaler"),
                ]
                watch = handlers.watch(self.world, resync, self._login, namespaces=options.watched, stop=quiet)
                return await _supervise(tasks, waiting, watch, quiet)
            return 0 if stop.is_set() else 1
        finally:
            listing.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(listing, *tasks, return_exceptions=True)


def _now() -> datetime:
    return datetime.now(UTC)


async def _know(resync: Resync, reports: Reports, loader: AdapterLoader) -> None:
    """Learn the present state before anything is judged by it: all objects, and what routers and workers say of themselves."""
    await resync.first()
    await asyncio.gather(reports.poll(), loader.first())


async def _supervise(
    tasks: list[asyncio.Task[Any]], waiting: asyncio.Task[Any], watch: Coroutine[Any, Any, None], quiet: asyncio.Event
) -> int:
    """Wait for the first part to end, then end the watches in an orderly way. 0 if it was a request to stop."""
    watching = asyncio.create_task(watch, name="watches")
    done, _ = await asyncio.wait([watching, *tasks], return_when=asyncio.FIRST_COMPLETED)
    quiet.set()
    await asyncio.wait([watching])
    for task in (done | {watching}) - {waiting}:
        error = task.exception()
        if error is not None or task is not watching:
            log = logger.info if _is_loss(error) else logger.error
            log("%s ended%s", task.get_name(), f": {error!r}" if error else "")
    return 0 if waiting in done and watching.exception() is None else 1


def _is_loss(error: BaseException | None) -> bool:
    """Workers stop with NotLeader when the Lease is lost: no failure of theirs."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(NotLeader) is not None
    return isinstance(error, NotLeader)


async def _first(stop: asyncio.Event, awaited: Coroutine[Any, Any, None]) -> bool:
    """True when `awaited` ended, False when `stop` was set before."""
    task, stopping = asyncio.create_task(awaited), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        for each in (task, stopping):
            each.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)
