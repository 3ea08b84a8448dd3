"""The configuration source in a cluster: one ConfigMap and the EndpointSlices of the pools' Services, watched directly.

    ConfigMap ──► FleetConfig ──► are the slices of all its Services known? ──► served, with their workers, in one step
                                    │ no: list them first; the old configuration stays until then
    EndpointSlices ─────────────────┴──────────────────────────────────────────► workers of the configuration served

A configuration and the workers of a pool it brings are thus never apart: no request meets a pool that is there but seems
empty. Both watches go on by themselves (`kubernetes_watch`): while the API server is away nothing changes, and the router
serves with what it knows. Once it is back it may call every worker lost for a while; that is doubted (`kubernetes_slices`).
A configuration that cannot be served is reported, and the old one stays.

At the start the router takes no requests before it knows a configuration and all its workers; `unready` says what is missing.
If the ConfigMap cannot be read then, the copy that the kubelet mounted (`fallback`) is taken in its place until it can be.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvfleet_api.fleetconfig import DRAINING_ANNOTATION, FLEET_CONFIG_KEY, FleetConfig
from kvfleet_router.core.worker import WorkerEndpoint
from kvfleet_router.io.config_source import ConfigRejected, ConfigSource, Sink, parse_config, read_config
from kvfleet_router.io.kubernetes_access import Access, AccessError
from kvfleet_router.io.kubernetes_drains import Drains
from kvfleet_router.io.kubernetes_slices import SERVICE_LABEL, EndpointSlice, Readiness, workers
from kvfleet_router.io.kubernetes_wake import Waker
from kvfleet_router.io.kubernetes_watch import Contact, Metadata, Reflector, Timings
from kvfleet_router.io.metrics import PREFIX

log = logging.getLogger("kvfleet.router")

_REFERENCE = re.compile(r"([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)/([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?)")


class ConfigMap(msgspec.Struct):
    metadata: Metadata
    data: dict[str, str] | None = None


class KubernetesSource(ConfigSource):
    """See the module's text."""

    def __init__(
        self,
        access: Access,
        config_map: str,
        *,
        fallback: Path | None = None,
        adapt: Callable[[FleetConfig], FleetConfig] | None = None,
        timings: Timings = Timings(),
        rng: random.Random | None = None,
    ) -> None:
        """`config_map`: `namespace/name`. `adapt` is applied to whatever is read: what a command line says beside it.

        Raises AccessError where `config_map` is no reference."""
        match = _REFERENCE.fullmatch(config_map)
        if match is None:
            raise AccessError(f"{config_map!r} names no ConfigMap: write it as NAMESPACE/NAME")
        self._namespace, self._name = match[1], match[3]
        self._access = access
        self._fallback = fallback
        self._adapt = adapt
        self._timings = timings
        self._rng = rng or random.Random()
        self.contacts = {"configmaps": Contact(), "endpointslices": Contact()}
        self._configs = Reflector(
            access,
            f"/api/v1/namespaces/{self._namespace}/configmaps",
            ConfigMap,
            {"fieldSelector": f"metadata.name={self._name}"},
            self.contacts["configmaps"],
            on_change=lambda _: self._config_map_changed(),
            on_failure=self._use_fallback,
            timings=timings,
            rng=self._rng,
        )
        self._waker = Waker(access, self._namespace, timings=timings)
        self._slices: Reflector[EndpointSlice] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._services: frozenset[str] = frozenset()
        """Those watched."""
        self._text: str | None = None
        self._refused = ""
        """What is wrong with the ConfigMap as it is; empty: nothing."""
        self._next: FleetConfig | None = None
        """Waits for its workers."""
        self._served: FleetConfig | None = None
        self._given: dict[str, list[WorkerEndpoint]] = {}
        """Pool → its workers as the sink knows them."""
        self._readiness: dict[str, Readiness] = {}
        """By pool."""
        self._drains = Drains()
        self._look_again: asyncio.TimerHandle | None = None

    @property
    def unready(self) -> str:
        """Why no requests should come yet; empty: they may."""
        if self._served is not None:
            return ""
        if self._next is not None:
            return f"waiting for the workers' EndpointSlices: {self.contacts['endpointslices'].reason}"
        return f"waiting for ConfigMap {self._where}: {self._refused or self.contacts['configmaps'].reason}"

    async def run(self, sink: Sink) -> None:
        """Feed `sink` until cancelled."""
        self._sink = sink
        try:
            async with asyncio.TaskGroup() as self._group:
                self._group.create_task(self._configs.run())
                self._group.create_task(self._waker.run(sink.pools_to_wake))
        finally:
            if self._look_again is not None:
                self._look_again.cancel()

    @property
    def _where(self) -> str:
        return f"{self._namespace}/{self._name}"

    # The configuration

    def _config_map_changed(self) -> None:
        found = self._configs.objects.get(self._name)
        self._take_drains((found.metadata.annotations or {}).get(DRAINING_ANNOTATION) if found else None)
        text = (found.data or {}).get(FLEET_CONFIG_KEY) if found else None
        if text is not None and text == self._text:
            return
        self._text = text
        if text is None:
            self._refuse(f"has no key {FLEET_CONFIG_KEY}" if found else "does not exist")
            return
        try:
            self._offer(parse_config(text))
        except ConfigRejected as error:
            self._refuse(str(error))

    def _take_drains(self, text: str | None) -> None:
        try:
            changed = self._drains.take(text, time.time())
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("ConfigMap %s: annotation %s is not used: %s", self._where, DRAINING_ANNOTATION, error)
            changed = True
        if changed:
            self._give()

    def _use_fallback(self) -> None:
        """The ConfigMap cannot be read: better the mounted copy than nothing."""
        if self._fallback is None or self._served is not None or self._next is not None or self._configs.synced:
            return
        try:
            config = read_config(self._fallback)
        except ConfigRejected as error:
            log.warning("%s: %s", self._fallback, error)
            return
        log.warning("ConfigMap %s cannot be read: its copy in %s is used", self._where, self._fallback)
        self._offer(config)

    def _offer(self, config: FleetConfig) -> None:
        """Serve `config` as soon as its workers are known."""
        self._next = self._adapt(config) if self._adapt else config
        services = _services(self._next)
        if not services <= self._services:
            # Those of the configuration being served are watched on: it stays if the new one is refused.
            self._follow(services | _services(self._served))
        elif not services or (self._slices and self._slices.synced):
            self._take_next()
            self._give()

    def _take_next(self) -> None:
        config, self._next = self._next, None
        if config is None:
            return
        try:
            self._sink.take_config(config)
        except ConfigRejected as error:
            self._refuse(str(error))
            return
        self._served, self._refused = config, ""
        self._given.clear()
        self._readiness = {pool.name: self._readiness.get(pool.name, Readiness()) for pool in config.pools}

    def _refuse(self, reason: str) -> None:
        """The ConfigMap as it is cannot be served; what was served stays, and what waited is out of date."""
        self._next = None
        self._refused = reason
        self._sink.reject_config(f"ConfigMap {self._where}: {reason}")

    # The workers

    def _follow(self, services: frozenset[str]) -> None:
        """Watch these Services' slices from now on."""
        if self._watching is not None:
            self._watching.cancel()
        self._services = services
        self._slices = Reflector(
            self._access,
            f"/apis/discovery.k8s.io/v1/namespaces/{self._namespace}/endpointslices",
            EndpointSlice,
            {"labelSelector": f"{SERVICE_LABEL} in ({','.join(sorted(services))})"},
            self.contacts["endpointslices"],
            on_change=self._slices_changed,
            timings=self._timings,
            rng=self._rng,
        )
        self._watching = self._group.create_task(self._slices.run())

    def _slices_changed(self, changed: Sequence[EndpointSlice] | None) -> None:
        if self._next is not None:
            self._take_next()
            changed = None  # whatever changed before the configuration came counts now
        self._give(None if changed is None else {part.service for part in changed})

    def _give(self, services: set[str] | None = None) -> None:
        """Tell the sink the workers of the pools behind `services` (None: of all), where they changed."""
        if self._served is None or self._slices is None:
            return
        now_s = time.time()  # one reading: a wish is over for all that follows, or will be looked at again
        if self._drains.end(now_s):
            services = None
        for pool in self._served.pools:
            if pool.service is None or pool.endpoints or (services is not None and pool.service not in services):
                continue
            readiness = self._readiness[pool.name]
            told = workers(self._slices.objects.values(), pool.service, tls=pool.tls is not None)
            found = readiness.judge(told, time.monotonic())
            if draining := self._drains.of(pool.name, now_s):
                found = [replace(worker, draining=True) if worker.name in draining else worker for worker in found]
            if found != self._given.get(pool.name):
                self._given[pool.name] = found
                self._sink.take_endpoints(pool.name, found)
                _log_workers(pool.name, found, readiness.doubted)
        self._look_again_later(now_s)

    def _look_again_later(self, now_s: float) -> None:
        """When the next doubt or the next wish to drain a worker ends."""
        if self._look_again is not None:
            self._look_again.cancel()
        doubts = [readiness.due for readiness in self._readiness.values() if readiness.due is not None]
        ends = [due - time.monotonic() for due in doubts]
        if (ends_in_s := self._drains.ends_in_s(now_s)) is not None:
            ends.append(ends_in_s)
        delay_s = min(ends, default=None)
        loop = asyncio.get_running_loop()
        self._look_again = None if delay_s is None else loop.call_later(delay_s, self._give)

    # Metrics

    def metrics(self) -> Iterator[Metric]:
        by_resource, now = ("resource",), time.monotonic()
        connected = GaugeMetricFamily(
            PREFIX + "kubernetes_connected",
            "Whether the API server is heard: 1, or 0 while the router serves with what it knew last.",
            labels=by_resource,
        )
        age = GaugeMetricFamily(
            PREFIX + "kubernetes_last_contact_age_seconds",
            "Time since the API server last said something; it does so about every minute.",
            labels=by_resource,
        )
        lists = CounterMetricFamily(
            PREFIX + "kubernetes_lists", "Times everything was listed anew.", labels=by_resource
        )
        failures = CounterMetricFamily(
            PREFIX + "kubernetes_failures", "Lists and watches that failed, by cause.", labels=("resource", "cause")
        )
        doubted = GaugeMetricFamily(
            PREFIX + "kubernetes_doubted_workers",
            "Workers used though the API server calls none of their pool ready any more.",
            labels=("pool",),
        )
        for pool, readiness in self._readiness.items():
            doubted.add_metric((pool,), len(readiness.doubted))
        for resource, contact in self.contacts.items():
            connected.add_metric((resource,), contact.connected)
            if contact.last_at is not None:
                age.add_metric((resource,), now - contact.last_at)
            lists.add_metric((resource,), contact.lists)
            for cause, count in contact.failures.items():
                failures.add_metric((resource, cause), count)
        yield from (connected, age, lists, failures, doubted)
        yield from self._waker.metrics()


def _services(config: FleetConfig | None) -> frozenset[str]:
    """Those whose slices list workers of `config`."""
    pools: Iterable[str | None] = (pool.service for pool in config.pools if not pool.endpoints) if config else ()
    return frozenset(service for service in pools if service)


def _log_workers(pool: str, found: Sequence[WorkerEndpoint], doubted: Sequence[str]) -> None:
    ready = sum(worker.ready and not worker.terminating for worker in found)
    leaving = sum(worker.terminating or worker.draining for worker in found)
    log.info("pool %s: %d workers, %d of them ready, %d leaving", pool, len(found), ready, leaving)
    if doubted:
        log.warning(
            "pool %s: all workers are called not ready at once; used on for a while: %s", pool, ", ".join(doubted)
        )
