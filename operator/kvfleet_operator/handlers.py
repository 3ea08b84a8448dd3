"""kopf's part: watch everything of interest and put what arrives into the world. The only module that knows kopf.

kopf lists and watches (credentials, reconnects, 410, bookmarks, CRDs that come later); every event, whatever its type,
only updates the world, from which reconciliations follow. No handler changes an object, so kopf adds no annotation and
no finalizer, and keeps no state in the cluster.

kopf runs in a thread and an event loop of its own: it ends every task it finds in its loop when it ends itself, and it
takes over the process's signals. Events are handed over to the caller's loop, in order.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from kvfleet_operator.reconcile.plan import Manifest
from kvfleet_operator.resources import WATCHED, ResourceType, label_selector
from kvfleet_operator.resync import Resync
from kvfleet_operator.world import World

Login = Callable[[], Awaitable[Configuration]]
Deliver = Callable[[str, str | None, Manifest], None]
"""Takes an event: the kind, kopf's type of it, the object."""


async def watch(
    world: World, resync: Resync, login: Login, *, namespaces: Collection[str] | None, stop: asyncio.Event
) -> None:
    """Watch until `stop` is set; raises where kopf gives up, as when a watch is forbidden."""
    loop = asyncio.get_running_loop()

    def observe(kind: str, type_: str | None, manifest: Manifest) -> None:
        resync.seen(kind)
        if type_ == "DELETED":
            world.remove(manifest)
        else:
            world.put(manifest)

    def deliver(kind: str, type_: str | None, manifest: Manifest) -> None:
        loop.call_soon_threadsafe(observe, kind, type_, manifest)

    ended = threading.Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kopf") as thread:
        running: asyncio.Future[Any] = loop.run_in_executor(thread, _run, _registry(deliver, login), namespaces, ended)
        stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            ended.set()
            await asyncio.shield(running)


def _run(registry: kopf.OperatorRegistry, namespaces: Collection[str] | None, ended: threading.Event) -> None:
    """kopf's thread."""
    logging.getLogger("kopf._core.reactor.running").addFilter(_not_about_signals)
    operator = kopf.operator(
        registry=registry,
        settings=_settings(cluster_wide=namespaces is None),
        clusterwide=namespaces is None,
        namespaces=sorted(namespaces or ()),
        standalone=True,  # the Lease sees to it that there is one
        stop_flag=ended,
    )
    asyncio.run(operator)


def _not_about_signals(record: logging.LogRecord) -> bool:
    """kopf warns that it does not handle signals here: as it should be."""
    return not record.getMessage().startswith("OS signals are ignored")


def _registry(deliver: Deliver, login: Login) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def _login(**_: Any) -> kopf.ConnectionInfo:
        return await connection(await login())

    for resource in WATCHED:
        on_event = kopf.on.event(
            resource.group, resource.version, resource.plural, registry=registry, id=resource.plural
        )
        on_event(_observer(resource, deliver))
    return registry


def _observer(resource: ResourceType, deliver: Deliver) -> Callable[..., Awaitable[None]]:
    async def observe(event: kopf.RawEvent, **_: Any) -> None:
        manifest = {**event["object"], "apiVersion": resource.api_version, "kind": resource.kind}
        deliver(resource.kind, event["type"], manifest)

    return observe


def _settings(*, cluster_wide: bool) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    # In fixed namespaces the operator may not look at CRDs and namespaces, and need not.
    settings.scanning.disabled = not cluster_wide
    settings.process.ultimate_exiting_timeout = None
    for resource in WATCHED:
        selector = label_selector(resource)
        if selector:
            settings.watching.label_selectors[resource.group, resource.version, resource.plural] = selector
    return settings


async def connection(configuration: Configuration) -> kopf.ConnectionInfo:
    """The official client's credentials as kopf wants them."""
    header: Any = await configuration.get_api_key_with_prefix("BearerToken")
    scheme, _, token = (header or "").partition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        ca_data=configuration.ca_cert_data,
        insecure=not configuration.verify_ssl,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        username=configuration.username or None,
        password=configuration.password or None,
        scheme=scheme or None,
        token=token or None,
        proxy_url=configuration.proxy,
    )
