"""A router that cannot be started says why in plain words and ends at once, whichever part of the start fails: nothing that
listens or runs by then keeps the process."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from scripted import Bench, fleet

from kvfleet_router.app import RouterApp

CERTIFICATES = Path(__file__).parent / "certificates"
TIME_LIMIT_S = 60
NOWHERE = "unix:/nowhere/router.sock"
CERTIFICATE, KEY, OTHER_KEY = (str(CERTIFICATES / name) for name in ("a.crt", "a.key", "b.key"))
TAKEN = "TAKEN"
"""Stands for a port that somebody listens on."""

CASES: dict[str, tuple[list[str], int, str]] = {
    "port taken": (["--port", TAKEN], 1, "address already in use"),
    "admin port taken": (["--admin-port", TAKEN], 1, "address already in use"),
    "no such directory": (["--host", NOWHERE], 1, "cannot listen: [Errno 2] /nowhere/router.sock"),
    "one address of two": (["--host", f"127.0.0.1,{NOWHERE}"], 1, "cannot listen: [Errno 2] /nowhere/router.sock"),
    "no such directory for the admin socket": (["--admin-host", NOWHERE], 1, "cannot listen: [Errno 2] /nowhere"),
    "a path too long": (["--host", f"unix:/{'x' * 200}"], 1, "has 107 bytes at most"),
    "no certificate": (["--tls-cert", "/nowhere/a.crt", "--tls-key", KEY], 2, "/nowhere/a.crt"),
    "another certificate's key": (["--tls-cert", CERTIFICATE, "--tls-key", OTHER_KEY], 2, "b.key"),
    "no key": (["--tls-cert", CERTIFICATE], 2, "give both or neither"),
    "no API keys": (["--api-keys-file", "/nowhere/keys"], 2, "/nowhere/keys"),
}


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of the loopback that somebody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_process_ends_with_the_plain_reason(tmp_path: Path, taken: int, case: str, processes: int) -> None:
    arguments, code, said = CASES[case]
    command = [
        sys.executable,
        "-m",
        "kvfleet",
        "router",
        "--workers",
        "http://127.0.0.1:1",
        "--processes",
        str(processes),
    ]
    command += ["--host", "127.0.0.1", "--port", "0", "--admin-host", "127.0.0.1", "--admin-port", "0"]
    command += [str(taken) if argument == TAKEN else argument for argument in arguments]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False, env=environment)
    assert done.returncode == code, done.stderr
    assert said in done.stderr.lower() or said in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("kvfleet-")], "it leaves nothing behind"


def test_a_directory_too_deep_for_the_processes_sockets_is_said_before_there_are_any(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    command = [sys.executable, "-m", "kvfleet", "router", "--workers", "http://127.0.0.1:1", "--processes", "2"]
    command += ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0"]
    environment = {**os.environ, "TMPDIR": str(deep)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False, env=environment)
    assert (done.returncode, list(deep.iterdir())) == (1, [])
    assert "set TMPDIR to a shorter directory" in done.stderr


@pytest.mark.parametrize("part", ["the client port", "the replicas' bus", "what is followed"])
async def test_nothing_listens_or_runs_afterwards(bench: Bench, tmp_path: Path, part: str, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(5, "no")

    host = f"127.0.0.1,unix:{tmp_path}/none/router.sock" if part == "the client port" else "127.0.0.1"
    bus = BrokenBus() if part == "the replicas' bus" else None
    router = RouterApp(fleet([await bench.worker()]), host=host, admin_host="127.0.0.1", bus=bus)
    if part == "what is followed":
        monkeypatch.setattr(router.kv_events, "update", fail)
    before = asyncio.all_tasks()
    with pytest.raises(OSError):
        await router.start()
    assert asyncio.all_tasks() == before
    assert router.admin_port
    with ExitStack() as left:
        for port in filter(None, (router.port, router.admin_port)):
            sock = left.enter_context(socket.socket())
            assert sock.connect_ex(("127.0.0.1", port)) != 0
    await router.stop(0.0)  # as harmless as ever


class BrokenBus:
    """Cannot be started."""

    def start(self, hear: object) -> None:
        raise OSError(98, "in use")

    reachable = False

    def metrics(self) -> list[object]:
        return []
