"""HTTP clients for workers: a plain one, and such that trust what a pool's `engine.tls` says.

Authorities are read from the pool's ConfigMap and looked at again every `KEEP_S`, so renewed ones are taken. While they cannot
be read nobody is trusted: a question to such a worker fails, and the log says what is missing.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

from kvfleet_api.compile import worker_server_name
from kvfleet_api.modelpool import ModelPool
from kvfleet_operator.api import ApiError

logger = logging.getLogger(__name__)
KEEP_S: Final = 60.0
RETRY_S: Final = 5.0
"""The same after a failure."""

ReadConfigMap = Callable[[str, str], Awaitable[Mapping[str, Any] | None]]
"""(namespace, name) → the ConfigMap, or None where there is none. Raises ApiError."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a pool's workers must prove to be."""

    server_name: str
    authorities: tuple[str, str, str] | None
    """(namespace, ConfigMap, key) of those who may vouch for them. None: those the system trusts."""


@dataclass(frozen=True, slots=True)
class WorkerClient:
    """How a pool's workers are asked."""

    http: httpx.AsyncClient
    extensions: Mapping[str, Any]
    """Of each request, for httpx."""


def identity_of(pool: ModelPool) -> Identity | None:
    """None: they serve plain HTTP."""
    tls = pool.spec.engine.tls
    if tls is None:
        return None
    ref = tls.ca_config_map_ref
    return Identity(
        worker_server_name(pool), (pool.metadata.namespace or "default", ref.name, ref.key) if ref else None
    )


class _Trusting:
    """A client that trusts the authorities of one ConfigMap."""

    def __init__(self) -> None:
        self.pem: str | None = None
        """What it trusts; None: nobody."""
        self.client = httpx.AsyncClient(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), trust_env=False)
        self.look_again_at = float("-inf")


class WorkerClients:
    """For all pools. `options`: of every httpx client."""

    def __init__(
        self,
        read: ReadConfigMap,
        *,
        clock: Callable[[], float] = time.monotonic,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._read = read
        self._clock = clock
        self._options = {"trust_env": False, **(options or {})}
        self._plain = httpx.AsyncClient(**self._options)
        self._system: httpx.AsyncClient | None = None
        self._trusting: dict[tuple[str, str, str], _Trusting] = {}

    async def of(self, identity: Identity | None) -> WorkerClient:
        """The client for workers that must prove this; None: for those that serve plain HTTP."""
        if identity is None:
            return WorkerClient(self._plain, {})
        client = await self._for(identity.authorities)
        return WorkerClient(client, {"sni_hostname": identity.server_name})

    async def aclose(self) -> None:
        for client in (self._plain, self._system, *[trusting.client for trusting in self._trusting.values()]):
            if client is not None:
                await client.aclose()

    async def _for(self, authorities: tuple[str, str, str] | None) -> httpx.AsyncClient:
        if authorities is None:
            self._system = self._system or httpx.AsyncClient(verify=ssl.create_default_context(), **self._options)
            return self._system
        trusting = self._trusting.setdefault(authorities, _Trusting())
        now = self._clock()
        if now >= trusting.look_again_at:
            trusting.look_again_at = now + RETRY_S
            pem = await self._pem(authorities)
            if pem is not None:
                trusting.look_again_at = now + KEEP_S
                await self._trust(trusting, authorities, pem)
        return trusting.client

    async def _pem(self, authorities: tuple[str, str, str]) -> str | None:
        namespace, name, key = authorities
        try:
            found = await self._read(namespace, name)
        except ApiError as error:
            logger.warning(
                "ConfigMap %s/%s cannot be read; it says whom to trust to be a worker: %s", namespace, name, error
            )
            return None
        text = ((found or {}).get("data") or {}).get(key)
        if not isinstance(text, str):
            logger.warning(
                "ConfigMap %s/%s has no key %s, which says whom to trust to be a worker", namespace, name, key
            )
            return None
        return text

    async def _trust(self, trusting: _Trusting, authorities: tuple[str, str, str], pem: str) -> None:
        """What cannot be used leaves the old authorities in place."""
        if pem == trusting.pem:
            return
        try:
            context = ssl.create_default_context(cadata=pem)
        except ssl.SSLError as error:
            logger.warning("ConfigMap %s/%s, key %s: no PEM certificates: %s", *authorities, error)
            return
        before, trusting.client = trusting.client, httpx.AsyncClient(verify=context, **self._options)
        trusting.pem = pem
        await before.aclose()
