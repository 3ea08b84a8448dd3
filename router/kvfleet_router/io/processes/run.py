"""`--processes N`: so many router processes on one port, and one more, the hub, for what they have in common.

    supervisor ─┬─ process 0 ┐ one listening socket each (SO_REUSEPORT): the kernel spreads connections
                ├─ process 1 ┘ and a Unix socket for admin requests; loads and prefixes by LocalBus
                └─ hub         the admin port, merged (hub.py); relays between the processes and Redis

Listening sockets are the supervisor's, so connections that wait in the one of a process that died wait for its successor.
Where a successor dies, too, its socket is closed and the others get its share until it comes back.
"""

from __future__ import annotations

import logging
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvfleet_api.fleetrouter import LimitsSpec
from kvfleet_router.io.processes.hub import run_hub
from kvfleet_router.io.processes.supervisor import Supervisor, Task
from kvfleet_router.io.server import BACKLOG
from kvfleet_router.io.sharing.local import LocalBus
from kvfleet_router.io.sharing.redis_bus import Redis
from kvfleet_router.io.sharing.sharer import Bus

log = logging.getLogger("kvfleet.router")

HUB = "hub"
Address = tuple[str, int]


@dataclass(slots=True, eq=False)
class Place:
    """Where one of the processes listens."""

    number: int
    directory: Path
    processes: int
    hub: bool
    """Whether the hub wants to hear what the processes tell each other."""
    address: Address
    """Of clients."""
    listeners: list[socket.socket] = field(default_factory=list)

    @property
    def admin_path(self) -> Path:
        return admin_path(self.directory, self.number)

    def bus(self) -> Bus:
        others = [f"bus-{number}" for number in range(self.processes) if number != self.number]
        return LocalBus(self.directory, f"bus-{self.number}", others, relay=HUB if self.hub else None)


def admin_path(directory: Path, number: int) -> Path:
    return directory / f"admin-{number}"


def run_processes(
    run: Callable[[Place], None],
    processes: int,
    *,
    address: Address,
    admin_address: Address,
    redis: Redis | None,
    limits: LimitsSpec,
) -> int:
    """Run `run(place)` in so many processes until SIGTERM; returns the exit code. Raises OSError where an address cannot be had."""
    directory = Path(tempfile.mkdtemp(prefix="kvfleet-"))  # accessible to this user alone
    admin = bind(*admin_address)
    _assert_free(*address)
    places = [Place(number, directory, processes, redis is not None, address) for number in range(processes)]
    for place in places:
        place.address = address
        place.listeners = bind(*address, shared=True)
        address = (address[0], int(place.listeners[0].getsockname()[1]))
    admin_port = int(admin[0].getsockname()[1])
    log.info("serving on %s:%d, admin on %s:%d, with %d processes", *address, admin_address[0], admin_port, processes)
    paths = [place.admin_path for place in places]
    tasks = [
        Task(
            f"router process {place.number}",
            partial(_serve, run, place, places, admin),
            on_failure=partial(_close, place),
        )
        for place in places
    ]
    tasks.append(Task("the hub", partial(_run_hub, directory, paths, admin, redis, limits, places), order=1))
    try:
        Supervisor(tasks, on_leaving=partial(_close, *places)).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


def _serve(run: Callable[[Place], None], place: Place, places: Sequence[Place], admin: Sequence[socket.socket]) -> None:
    """In a new process: only its own sockets are its business."""
    _close(*(other for other in places if other is not place))
    for sock in admin:
        sock.close()
    if not place.listeners:
        place.listeners = bind(*place.address, shared=True)
    run(place)


def _run_hub(
    directory: Path,
    paths: Sequence[Path],
    admin: Sequence[socket.socket],
    redis: Redis | None,
    limits: LimitsSpec,
    places: Sequence[Place],
) -> None:
    _close(*places)
    local = LocalBus(directory, HUB, [f"bus-{place.number}" for place in places]) if redis is not None else None
    run_hub(paths, admin, limits, local, redis.bus() if redis is not None else None)


def _close(*places: Place) -> None:
    for place in places:
        for sock in place.listeners:
            sock.close()
        place.listeners = []


def bind(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Listening sockets for every address of `host`. `shared`: others may listen there, too. Raises OSError."""
    sockets: list[socket.socket] = []
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
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
