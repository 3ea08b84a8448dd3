"""EndpointSlices → the workers of a pool. Pure.

A Service's endpoints are spread over any number of slices; while the controller moves one, it may be in two at once. What
its conditions mean here:

    terminating            gets no new request from now on; the answers it is giving go on
    ready (or not said)    gets requests
    otherwise              gets none, whatever else there is: an engine that loads its model answers nothing

That some workers are not ready any more is believed at once; that all of a pool are, only after DOUBT_S (`Readiness`): while
the API server or its store was away nodes could not report, so once it is back they are all called lost, with every pod on
them, until they have reported; for half a minute nobody could be used, though all are well. Those that are not fail when
used, and the circuit breakers see it. A worker that never was ready is never used.

An endpoint in two slices is terminating if either says so, and ready only if both do. With two address families the first
in FAMILIES counts. Ports are found by their names; an endpoint without the HTTP port, or whose address is no IP address
that a pod can have, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from ipaddress import ip_address

import msgspec

from kvfleet_router.core.worker import WorkerEndpoint
from kvfleet_router.io.kubernetes_watch import Metadata

SERVICE_LABEL = "kubernetes.io/service-name"
FAMILIES = ("IPv4", "IPv6")
HTTP_PORT, KV_EVENTS_PORT, KV_REPLAY_PORT = "http", "kv-events", "kv-replay"
"""Names of the ports in the pools' headless Services."""
MAX_WORKERS = 8192
"""Of one pool; more are left out."""
DOUBT_S = 60.0
"""Kubelets report every 10 s, and three things have to be reported in turn: the lease, the node, its pods."""
_POD_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
"""Names go into headers of answers, and nobody checks what a slice made by hand refers to."""


class Conditions(msgspec.Struct):
    ready: bool | None = None
    terminating: bool | None = None


class Reference(msgspec.Struct):
    kind: str = ""
    name: str = ""


class SliceEndpoint(msgspec.Struct):
    addresses: list[str] | None = None
    conditions: Conditions = msgspec.field(default_factory=Conditions)
    target: Reference | None = msgspec.field(default=None, name="targetRef")


class SlicePort(msgspec.Struct):
    name: str | None = None
    port: int | None = None


class EndpointSlice(msgspec.Struct, dict=True):
    """`workers` is worked out once: of a large pool's slices an event changes one."""

    metadata: Metadata
    family: str = msgspec.field(default="", name="addressType")
    endpoints: list[SliceEndpoint] | None = None
    ports: list[SlicePort] | None = None

    @property
    def service(self) -> str:
        return (self.metadata.labels or {}).get(SERVICE_LABEL, "")

    @cached_property
    def workers(self) -> list[WorkerEndpoint]:
        ports = {port.name: port.port for port in self.ports or () if port.port is not None and 0 < port.port < 65536}
        if HTTP_PORT not in ports:
            return []
        found = (_worker(endpoint, ports) for endpoint in self.endpoints or ())
        return [worker for worker in found if worker is not None]


def workers(slices: Iterable[EndpointSlice], service: str, *, tls: bool = False) -> list[WorkerEndpoint]:
    """The workers behind `service`, by name. `tls`: they serve HTTPS."""
    found: dict[str, WorkerEndpoint] = {}
    ours = [part for part in slices if part.service == service]
    for family in FAMILIES:
        of_family: dict[str, WorkerEndpoint] = {}
        for part in ours:
            if part.family == family:
                for worker in part.workers:
                    other = of_family.get(worker.name)
                    of_family[worker.name] = worker if other is None else _merged(other, worker)
        found = {**of_family, **found}
    listed = [found[name] for name in sorted(found)[:MAX_WORKERS]]
    return [replace(worker, url=f"https{worker.url.removeprefix('http')}") for worker in listed] if tls else listed


def _merged(one: WorkerEndpoint, other: WorkerEndpoint) -> WorkerEndpoint:
    """One endpoint, in two slices."""
    return replace(other, ready=one.ready and other.ready, terminating=one.terminating or other.terminating)


def _worker(endpoint: SliceEndpoint, ports: dict[str | None, int]) -> WorkerEndpoint | None:
    host = _host(endpoint.addresses[0]) if endpoint.addresses else ""
    if not host:
        return None
    target, conditions = endpoint.target, endpoint.conditions

    def url(port: str, scheme: str = "tcp") -> str | None:
        return f"{scheme}://{host}:{ports[port]}" if port in ports else None

    is_pod = target is not None and target.kind == "Pod" and _POD_NAME.fullmatch(target.name)
    return WorkerEndpoint(
        name=target.name if target and is_pod else f"{host}:{ports[HTTP_PORT]}",
        url=f"http://{host}:{ports[HTTP_PORT]}",
        ready=conditions.ready is not False,
        terminating=bool(conditions.terminating),
        kv_events_url=url(KV_EVENTS_PORT),
        kv_replay_url=url(KV_REPLAY_PORT),
    )


def _host(address: str) -> str:
    """As in a URL; empty where it is no address of a pod."""
    try:
        ip = ip_address(address)
    except ValueError:
        return ""
    if ip.is_unspecified or ip.is_link_local or ip.is_multicast or getattr(ip, "scope_id", None):
        return ""
    return f"[{ip}]" if ip.version == 6 else str(ip)


class Readiness:
    """Of one pool's workers, as they are told from time to time; see the module's text."""

    def __init__(self) -> None:
        self._ready: set[tuple[str, str]] = set()
        """(name, URL) of those called ready."""
        self._lost_at: dict[tuple[str, str], float] = {}
        """Of those still there that were called ready, and are so no more."""
        self.doubted: list[str] = []
        """Names of workers used though they are not called ready."""
        self.due: float | None = None
        """When to judge again though nothing new is told."""

    def judge(self, told: list[WorkerEndpoint], now: float) -> list[WorkerEndpoint]:
        """How the workers shall be treated."""
        staying = {(worker.name, worker.url): worker for worker in told if not worker.terminating}
        ready = {key for key, worker in staying.items() if worker.ready}
        lost = dict.fromkeys(self._ready - ready, now) | self._lost_at
        self._lost_at = {key: at for key, at in lost.items() if key in staying and key not in ready}
        self._ready = ready
        ends = {} if ready else {key: at + DOUBT_S for key, at in self._lost_at.items() if now < at + DOUBT_S}
        self.doubted = sorted(name for name, _ in ends)
        self.due = min(ends.values(), default=None)
        return [replace(worker, ready=True) if (worker.name, worker.url) in ends else worker for worker in told]
