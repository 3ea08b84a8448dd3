"""Socket options against peers that vanish without a word: a node that lost power, a cut cable, a forgotten NAT entry."""

from __future__ import annotations

import socket

IDLE_S, INTERVAL_S, PROBES = 15, 5, 3
UNACKNOWLEDGED_MS = 30_000
"""How long a worker may leave sent bytes unacknowledged: far less than any answer's time limit."""


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
