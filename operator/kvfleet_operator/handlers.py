"""kopf's part: watch everything of interest and put what arrives into the world. The only module that knows kopf.

kopf lists and watches (credentials, reconnects, 410, bookmarks, CRDs that come later); every event, whatever its type,
only updates the world, from which reconciliations follow. No handler changes an object, so kopf adds no annotation and
no finalizer, and keeps no state in the cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from kvfleet_operator.resources import WATCHED, ResourceType, label_selector
from kvfleet_operator.resync import Resync
from kvfleet_operator.world import World

Login = Callable[[], Awaitable[Configuration]]


async def watch(
    world: World, resync: Resync, login: Login, *, namespaces: Collection[str] | None, stop: asyncio.Event
) -> None:
    """Run kopf until `stop` is set, a signal arrives, or a watch is refused for good (an exception then)."""
    await kopf.operator(
        registry=_registry(world, resync, login),
        settings=_settings(cluster_wide=namespaces is None),
        clusterwide=namespaces is None,
        namespaces=sorted(namespaces or ()),
        standalone=True,  # the Lease sees to it that there is one
        stop_flag=stop,
    )


def _registry(world: World, resync: Resync, login: Login) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def _login(**_: Any) -> kopf.ConnectionInfo:
        return await connection(await login())

    for resource in WATCHED:
        kopf.on.event(resource.group, resource.version, resource.plural, registry=registry, id=resource.plural)(
            _observer(resource, world, resync)
        )
    return registry


def _observer(resource: ResourceType, world: World, resync: Resync) -> Callable[..., Awaitable[None]]:
    async def observe(event: kopf.RawEvent, **_: Any) -> None:
        resync.seen(resource.kind)
        manifest = {**event["object"], "apiVersion": resource.api_version, "kind": resource.kind}
        if event["type"] == "DELETED":
            world.remove(manifest)
        else:
            world.put(manifest)

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
