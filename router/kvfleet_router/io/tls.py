"""The certificate that clients see. A renewed one is taken for new connections as soon as its files change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

log = logging.getLogger("kvfleet.router")


class CertificateRejected(Exception):
    """Certificate and key cannot be used: says why and what to do."""


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
