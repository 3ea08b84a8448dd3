"""How the API server is reached: its address, whom to trust there, and who we say we are.

In a cluster all of it lies in the pod's service account folder, and changes there while the router runs: kubelets renew the
token every hour or so, and authorities are rotated. So nothing is kept: the token is read for each request, and every new
connection is made by a client of its own, which reads the authority's certificate again.

Outside a cluster a kubeconfig tells the same. Programs it would have run to get a token are not run: a router that serves
for months on somebody's log-in is a mistake, a token of a service account is meant for that.
"""

from __future__ import annotations

import base64
import binascii
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

SERVICE_ACCOUNT_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MAX_FILE_BYTES = 1_048_576

_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 10, 5, 3
_TOKEN_REMEDY = "use a service account's token (kubectl create token)"


class AccessError(Exception):
    """The API server cannot be addressed with what is given: names the field and the remedy."""


@dataclass(frozen=True)
class Access:
    """The API server, and who we are to it."""

    server: str
    """`https://host:port`, perhaps with a path."""
    namespace: str
    """The namespace the credentials belong to."""
    trust: Callable[[], ssl.SSLContext]
    """Raises OSError (ssl.SSLError among them)."""
    token: Callable[[], str]
    """The token as it is now; empty: none is needed. Raises OSError."""

    def client(self, *, connect_timeout_s: float, read_timeout_s: float) -> httpx.AsyncClient:
        """A client with connections of its own. Raises OSError where a file cannot be read."""
        transport = httpx.AsyncHTTPTransport(verify=self.trust(), trust_env=False, socket_options=_SOCKET_OPTIONS)
        timeout = httpx.Timeout(connect_timeout_s, read=read_timeout_s)
        return httpx.AsyncClient(
            base_url=self.server,
            transport=transport,
            timeout=timeout,
            trust_env=False,
            headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "kvfleet-router"},
        )

    def headers(self) -> dict[str, str]:
        """What proves who we are, for one request. Raises OSError."""
        token = self.token()
        return {"authorization": f"Bearer {token}"} if token else {}


def in_cluster(environment: Mapping[str, str] = os.environ, folder: Path = SERVICE_ACCOUNT_FOLDER) -> Access:
    """As the pod's service account. Raises AccessError outside a cluster."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise AccessError("not inside a cluster (KUBERNETES_SERVICE_HOST is not set): give --kubeconfig")
    try:
        namespace = _read(folder / "namespace") or "default"
        _read(folder / "token")
    except OSError as error:
        raise AccessError(f"{error}: the pod needs automountServiceAccountToken: true") from error
    return Access(
        server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        namespace=namespace,
        trust=lambda: ssl.create_default_context(cafile=str(folder / "ca.crt")),
        token=lambda: _read(folder / "token"),
    )


def from_kubeconfig(path: Path, context: str | None = None) -> Access:
    """As a kubeconfig's context says, by default its current one. Raises AccessError."""
    import yaml  # the router in a cluster never needs it

    try:
        document = yaml.safe_load(_read(path))
    except OSError as error:
        raise AccessError(f"--kubeconfig {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise AccessError(f"--kubeconfig {path}: not YAML: {error}") from error
    try:
        return _from_document(document, context, path.parent)
    except AccessError as error:
        raise AccessError(f"--kubeconfig {path}: {error}") from error


def _from_document(document: Any, context: str | None, folder: Path) -> Access:
    if not isinstance(document, dict):
        raise AccessError("not a kubeconfig")
    name = context or document.get("current-context")
    if not name:
        raise AccessError("current-context is not set: set it, or give a context")
    chosen = _named(document, "contexts", "context", name)
    cluster = _named(document, "clusters", "cluster", chosen.get("cluster"))
    user = _named(document, "users", "user", chosen["user"]) if chosen.get("user") else {}
    server = cluster.get("server")
    if not isinstance(server, str) or not server.startswith(("https://", "http://")):
        raise AccessError(f"clusters[{chosen.get('cluster')}].server: {server!r} is no https:// address")
    if cluster.get("proxy-url"):
        raise AccessError("proxy-url is not supported: let the router reach the API server directly")
    for field in ("exec", "auth-provider", "username"):
        if field in user:
            raise AccessError(f"users[{chosen['user']}].{field} is not supported: {_TOKEN_REMEDY}")

    def trust() -> ssl.SSLContext:
        return _trust(cluster, user, folder)

    try:
        trust()
    except OSError as error:
        raise AccessError(f"certificates: {error}") from error
    token_file, token = user.get("tokenFile"), str(user.get("token") or "")
    return Access(
        server=server.rstrip("/"),
        namespace=str(chosen.get("namespace") or "default"),
        trust=trust,
        token=(lambda: _read(folder / str(token_file))) if token_file else (lambda: token),
    )


def _named(document: Mapping[str, Any], plural: str, kind: str, name: object) -> dict[str, Any]:
    entries = document.get(plural)
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get(kind), dict):
            return dict(entry[kind])
    raise AccessError(f"{plural}: there is none named {name!r}")


def _trust(cluster: Mapping[str, Any], user: Mapping[str, Any], folder: Path) -> ssl.SSLContext:
    """Raises OSError; AccessError where data is not what it should be."""
    authority = cluster.get("certificate-authority")
    tls = ssl.create_default_context(
        cafile=str(folder / authority) if authority else None,
        cadata=_decoded(cluster, "certificate-authority-data").decode() or None,
    )
    if cluster.get("insecure-skip-tls-verify"):
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    certificate = _decoded(user, "client-certificate-data") or _file(user, "client-certificate", folder)
    if certificate:
        key = _decoded(user, "client-key-data") or _file(user, "client-key", folder)
        with tempfile.NamedTemporaryFile() as file:  # ssl reads certificates of clients from files only
            file.write(certificate + b"\n" + key)
            file.flush()
            tls.load_cert_chain(file.name)
    return tls


def _decoded(fields: Mapping[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(str(fields.get(name) or ""), validate=True)
    except (binascii.Error, ValueError) as error:
        raise AccessError(f"{name} is not base64: {error}") from error


def _file(fields: Mapping[str, Any], name: str, folder: Path) -> bytes:
    return _read(folder / str(fields[name])).encode() if fields.get(name) else b""


def _read(path: Path) -> str:
    """A small text file without surrounding blanks. Raises OSError."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES)
    return content.decode("utf-8", "replace").strip()


def _socket_options() -> list[tuple[int, int, int]]:
    """Have the kernel end a connection whose other side vanished without a word, within half a minute."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    for name, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", _KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", _KEEPALIVE_PROBES),
    ):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


_SOCKET_OPTIONS = _socket_options()
