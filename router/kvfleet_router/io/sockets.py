"""Sockets at paths, and socket options against peers that vanish without a word: a node that lost power, a cut cable, a
forgotten NAT entry."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

IDLE_S, INTERVAL_S, PROBES = 15, 5, 3
UNACKNOWLEDGED_MS = 30_000
"""How long a worker may leave sent bytes unacknowledged: far less than any answer's time limit."""
MAX_UNIX_PATH_BYTES = 107
"""The kernel's `sun_path`, less its closing zero."""


def bind_unix(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A Unix socket there; one that was left behind is replaced. Raises OSError that names the path."""
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"{path}: a socket's path has {MAX_UNIX_PATH_BYTES} bytes at most")
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        if path.is_socket():
            path.unlink()
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{path}: {error.strerror}") from error
    return sock


def probe_silent_peer(sock: socket.socket) -> None:
    """Have the kernel ask a silent peer whether it is still there. (Where it offers no such probes, time limits remain.)"""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE_S), ("TCP_KEEPINTVL", INTERVAL_S), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def limit_unacknowledged(sock: socket.socket) -> None:
    """End a connection whose peer does not even acknowledge. Not for clients: a slow reader's full window looks the same."""
    if sock.family in (socket.AF_INET, socket.AF_INET6) and hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
