"""TLS on both sides: the certificate that clients see, and whom the router trusts to be a worker (`https://` addresses).

Renewed files are taken for new connections as soon as they change.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterable
from pathlib import Path

from kvfleet_api.fleetconfig import PoolConfig, WorkerTLS
from kvfleet_router.io.files import POLL_S, WatchedFiles

log = logging.getLogger("kvfleet.router")


class CertificateRejected(ValueError):
    """Certificate and key cannot be used: says why and what to do."""


class WorkerTrust:
    """Whom to believe to be a worker: certificates signed by an authority of `ca_file` (default: those the system trusts), for
    `server_name` (default: the host of the worker's address). `client`: chain and key that the router shows workers. Raises
    CertificateRejected when `ca_file` cannot be used, unless it may come `later`."""

    def __init__(
        self,
        ca_file: Path | None = None,
        server_name: str | None = None,
        client: tuple[Path, Path] | None = None,
        *,
        later: bool = False,
    ) -> None:
        self.server_name = server_name
        self.files = WatchedFiles(*([] if ca_file is None else [ca_file]), *(client or ()))
        self._ca_file = ca_file
        self._client = client
        self._context = None if ca_file is None or later else self._load()

    @property
    def context(self) -> ssl.SSLContext:
        """For a new connection. Raises CertificateRejected while the files cannot be used."""
        if self._context is None:
            self._context = self._load()
        return self._context

    def reload(self) -> None:
        """The files changed; such as cannot be used leave the old ones in place."""
        try:
            self._context = self._load()
        except CertificateRejected as error:
            old = "the old ones stay" if self._context else "its workers cannot be reached"
            log.error("certificates for workers were not taken, %s: %s", old, error)

    def _load(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self._ca_file)
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or str(error)
            raise CertificateRejected(f"{self._ca_file}: {reason}: give a PEM file of certificates to trust") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        if self._client is not None:
            try:
                context.load_cert_chain(*self._client)
            except OSError as error:
                reason = error.strerror or str(error)
                chain, key = self._client
                raise CertificateRejected(f"{chain} and {key}: {reason}: give a PEM chain and its key") from error
        return context


class WorkerTrusts:
    """The trust of every pool: what its `tls` says, else `default`."""

    def __init__(self, default: WorkerTrust) -> None:
        self._default = default
        self._of_pool: dict[str, tuple[WorkerTLS, WorkerTrust]] = {}

    def configure(self, pools: Iterable[PoolConfig]) -> None:
        """The pools as they are from now on."""
        before = self._of_pool
        self._of_pool = {}
        for pool in pools:
            if pool.tls is not None:
                known = before.get(pool.name)
                trust = known[1] if known is not None and known[0] == pool.tls else _trust_of(pool.tls)
                self._of_pool[pool.name] = (pool.tls, trust)

    def of(self, pool: str) -> WorkerTrust:
        found = self._of_pool.get(pool)
        return self._default if found is None else found[1]

    async def follow(self, *, poll_s: float = POLL_S) -> None:
        """Take files that change, until cancelled."""
        while True:
            for trust in (self._default, *[trust for _, trust in self._of_pool.values()]):
                if trust.files.changed():
                    trust.reload()
            await asyncio.sleep(poll_s)


def _trust_of(tls: WorkerTLS) -> WorkerTrust:
    client = None
    if tls.client_certificate_path is not None:
        directory = Path(tls.client_certificate_path)
        client = (directory / "tls.crt", directory / "tls.key")
    return WorkerTrust(None if tls.ca_path is None else Path(tls.ca_path), tls.server_name, client, later=True)


class Certificate:
    """A certificate chain and its key, in PEM files. Raises CertificateRejected when they cannot be used at first."""

    def __init__(self, chain: Path, key: Path) -> None:
        self.paths = (chain, key)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._load()

    def reload(self) -> None:
        """The files changed. Renewals may be seen half-way: what does not fit together leaves the old pair in place."""
        try:
            self._load()
            log.info("certificate %s is in use", self.paths[0])
        except CertificateRejected as error:
            log.error("a certificate was not taken, the old one stays: %s", error)

    def _load(self) -> None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self.paths)  # a failure must not spoil ours
            self.context.load_cert_chain(*self.paths)
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or str(error)
            raise CertificateRejected(
                f"{self.paths[0]} and {self.paths[1]}: {reason}: give a PEM chain and its key"
            ) from error
