"""`--processes N`: so many router processes on one port, and one more, the hub, for what they have in common.

    supervisor ─┬─ process 0 ┐ one listening socket each (SO_REUSEPORT): the kernel spreads connections
                ├─ process 1 ┘ and a Unix socket for admin requests; loads and prefixes by LocalBus
                └─ hub         the admin port, merged (hub.py); relays between the processes and Redis

Listening sockets are the supervisor's, so connections that wait in the one of a process that died wait for its successor.
Where a successor dies, too, its socket is closed and the others get its share until it comes back. At a Unix socket
(`--host unix:PATH`) all take connections from one queue: whoever looks first.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvfleet_api.fleetrouter import LimitsSpec
from kvfleet_router.io.processes.hub import run_hub
from kvfleet_router.io.processes.supervisor import Supervisor, Task
from kvfleet_router.io.server import BACKLOG, UNIX, addresses_text
from kvfleet_router.io.sharing.local import LocalBus
from kvfleet_router.io.sharing.redis_bus import Redis
from kvfleet_router.io.sharing.sharer import Bus
from kvfleet_router.io.sockets import MAX_UNIX_PATH_BYTES, bind_unix

log = logging.getLogger("kvfleet.router")

HUB = "hub"


@dataclass(slots=True, eq=False)
class Place:
    """Where one of the processes listens."""

    number: int
    directory: Path
    processes: int
    hub: bool
    """Whether the hub wants to hear what the processes tell each other."""
    hosts: Sequence[str]
    """Addresses for clients, each with `port`."""
    port: int
    shared: Sequence[socket.socket]
    """Unix sockets, the same for all processes."""
    own: list[socket.socket] = field(default_factory=list)

    @property
    def admin_path(self) -> Path:
        return admin_path(self.directory, self.number)

    def bus(self) -> Bus:
        others = [f"bus-{number}" for number in range(self.processes) if number != self.number]
        return LocalBus(self.directory, f"bus-{self.number}", others, relay=HUB if self.hub else None)

    def bind(self) -> None:
        """Raises OSError."""
        for host in self.hosts:
            self.own += bind(host, self.port, shared=True)
            self.port = int(self.own[-1].getsockname()[1])

    def listeners(self) -> list[socket.socket]:
        """For clients, its own bound again where they were closed. To be asked for last: who connects shall not find a process
        that cannot be started after all. Raises OSError."""
        if not self.own:
            self.bind()
        return [*self.own, *self.shared]

    def close(self) -> None:
        """Its own sockets; those shared are others', too."""
        _close(self.own)
        self.own = []


def admin_path(directory: Path, number: int) -> Path:
    return directory / f"admin-{number}"


def run_processes(
    run: Callable[[Place], int],
    processes: int,
    *,
    host: str,
    port: int,
    admin_host: str,
    admin_port: int,
    redis: Redis | None,
    limits: LimitsSpec,
) -> int:
    """Run `run(place)`, which returns an exit code, in so many processes until SIGTERM; returns the exit code of all. `host` and `admin_host` as in Server.listen.
    Raises OSError where an address cannot be had."""
    hosts = [address for address in host.split(",") if not address.startswith(UNIX)]
    with ExitStack() as left:
        directory = Path(tempfile.mkdtemp(prefix="kvfleet-"))  # accessible to this user alone
        left.callback(shutil.rmtree, directory, ignore_errors=True)
        _assert_short(admin_path(directory, processes))
        admin: list[socket.socket] = []
        left.callback(_close, admin)
        for address in admin_host.split(","):
            admin += _bind_unix(address) or bind(address, admin_port)
            admin_port = next(
                (int(sock.getsockname()[1]) for sock in admin if sock.family != socket.AF_UNIX), admin_port
            )
        shared: list[socket.socket] = []
        left.callback(_close, shared)
        for address in host.split(","):
            shared += _bind_unix(address)
        for address in hosts:
            _assert_free(address, port)
        places = []
        for number in range(processes):
            places.append(Place(number, directory, processes, redis is not None, hosts, port, shared))
            left.callback(places[-1].close)
            places[-1].bind()
            port = places[-1].port
        where = addresses_text(host, port), addresses_text(admin_host, admin_port)
        log.info("serving on %s, admin on %s, with %d processes", *where, processes)
        paths = [place.admin_path for place in places]
        tasks = [
            Task(f"router process {place.number}", partial(_serve, run, place, places, admin), on_failure=place.close)
            for place in places
        ]
        tasks.append(Task("the hub", partial(_run_hub, directory, paths, admin, redis, limits, places), order=1))
        return Supervisor(tasks, on_leaving=partial(_close_all, places)).run()


def _serve(run: Callable[[Place], int], place: Place, places: Sequence[Place], admin: Sequence[socket.socket]) -> None:
    """In a new process: only its own sockets are its business."""
    for other in places:
        if other is not place:
            other.close()
    _close(admin)
    sys.exit(run(place))


def _run_hub(
    directory: Path,
    paths: Sequence[Path],
    admin: Sequence[socket.socket],
    redis: Redis | None,
    limits: LimitsSpec,
    places: Sequence[Place],
) -> None:
    _close_all(places)
    local = LocalBus(directory, HUB, [f"bus-{place.number}" for place in places]) if redis is not None else None
    run_hub(paths, admin, limits, local, redis.bus() if redis is not None else None)


def _close_all(places: Sequence[Place]) -> None:
    for place in places:
        place.close()
        _close(place.shared)


def _close(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _bind_unix(address: str) -> list[socket.socket]:
    """The listening socket of a `unix:PATH`; none where it is no such address. Raises OSError."""
    if not address.startswith(UNIX):
        return []
    sock = bind_unix(Path(address.removeprefix(UNIX)))
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return [sock]


def bind(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Listening sockets for every address of `host`. `shared`: others may listen there, too. Raises OSError."""
    sockets: list[socket.socket] = []
    found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and len(sockets) > 1:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _assert_free(host: str, port: int) -> None:
    """SO_REUSEPORT would share the port with any program of this user: raises OSError where one is there."""
    for sock in bind(host, port):
        sock.close()


def _assert_short(path: Path) -> None:
    """Else every process would fail: raises OSError with the remedy."""
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        said = (
            f"{path} is too long for a socket ({MAX_UNIX_PATH_BYTES} bytes at most): set TMPDIR to a shorter directory"
        )
        raise OSError(errno.ENAMETOOLONG, said)
