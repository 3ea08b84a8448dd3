"""TLS on both sides: the certificate that clients see, and whom the router trusts to be a worker (`https://` addresses).

Renewed files are taken for new connections as soon as they change.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

log = logging.getLogger("kvfleet.router")


class CertificateRejected(Exception):
    """Certificate and key cannot be used: says why and what to do."""


class WorkerTrust:
    """Whom to believe to be a worker: certificates signed by an authority of `ca_file` (default: those the system trusts), for
    `server_name` (default: the host of the worker's address). Raises CertificateRejected when the file cannot be used."""

    def __init__(self, ca_file: Path | None = None, server_name: str | None = None) -> None:
        self.path = ca_file
        self.server_name = server_name
        self._context = None if ca_file is None else self._load()

    @property
    def context(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = self._load()
        return self._context

    def reload(self) -> None:
        """The file changed; one that cannot be used leaves the old authorities in place."""
        try:
            self._context = self._load()
        except CertificateRejected as error:
            log.error("authorities for workers were not taken, the old ones stay: %s", error)

    def _load(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.path)
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or str(error)
            raise CertificateRejected(f"{self.path}: {reason}: give a PEM file of certificates to trust") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        return context


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
