"""Network namespaces: one for the cluster, one for each pod.

The cluster's namespace holds the API server, kube-proxy and the tests themselves; its `lo` carries the node's address.
A pod's namespace is joined to it by a routed veth pair rather than a bridge: every packet between pods then passes the
cluster's namespace, where kube-proxy's rules translate Service addresses, there and back.

    cluster namespace                      pod namespace
    lo 10.244.0.1     ── veth ──────────── eth0 10.244.1.7, default via 10.244.0.1
    route 10.244.1.7 dev veth

Nothing leads out of the cluster's namespace: the host's network is neither reached nor changed.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import time
from ipaddress import IPv4Address
from pathlib import Path

NODE_IP = "10.244.0.1"
POD_CIDR = "10.244.0.0/16"
FIRST_POD_IP = IPv4Address("10.244.1.0")
LAST_POD_IP = IPv4Address("10.244.255.254")
SERVICE_CIDR = "10.96.0.0/16"
PREFIX = "kvfleet-e2e"
FIRST_EPHEMERAL_PORT = 32768
"""Ports from here on are those of outgoing connections (Linux's ip_local_port_range)."""
NETNS_DIR = Path("/run/netns")

_CLONE_NEWNET = 0x40000000


class NetworkError(Exception):
    """A namespace could not be made or entered."""


def cluster_namespace(cluster_id: str) -> str:
    return f"{PREFIX}-{cluster_id}"


def pod_namespace(cluster_id: str, number: int) -> str:
    return f"{PREFIX}-{cluster_id}-p{number}"


def create_cluster_namespace(cluster_id: str) -> None:
    name = cluster_namespace(cluster_id)
    _ip("netns", "add", name)
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "address", "add", f"{NODE_IP}/32", "dev", "lo")
    # Only a packet that has a route is sent at all; kube-proxy's rules then give it its real destination.
    _ip("-n", name, "route", "add", SERVICE_CIDR, "dev", "lo", "src", NODE_IP)
    _run(["ip", "netns", "exec", name, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])


def enter(cluster_id: str) -> int:
    """Moves this thread, and what it starts from now on, into the cluster's namespace; returns the way back."""
    way_back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    target = os.open(NETNS_DIR / cluster_namespace(cluster_id), os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(target)
    finally:
        os.close(target)
    return way_back


def leave(way_back: int) -> None:
    try:
        _setns(way_back)
    finally:
        os.close(way_back)


def _setns(descriptor: int) -> None:
    # os.setns() exists from Python 3.12 on; 3.11 is supported.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise NetworkError(f"cannot enter the cluster's network namespace: {os.strerror(number)}; run as root")


async def create_pod_namespace(cluster_id: str, number: int, address: str) -> None:
    """Called inside the cluster's namespace. The host's end of the veth pair is named by the pod's number."""
    name, link = pod_namespace(cluster_id, number), f"pod{number}"
    await _ip_async(["netns", "add", name])
    await _ip_batch(
        [],
        f"link add {link} type veth peer name eth0 netns {name}",
        f"link set {link} up",
        f"route add {address}/32 dev {link} src {NODE_IP}",
    )
    await _ip_batch(
        ["-n", name],
        "link set lo up",
        f"address add {address}/32 dev eth0",
        "link set eth0 up",
        f"route add {NODE_IP}/32 dev eth0 scope link",
        f"route add default via {NODE_IP} dev eth0",
    )


async def delete_pod_namespace(cluster_id: str, number: int) -> None:
    """The veth pair goes with it. Its last process must have ended, or the kernel keeps the namespace alive."""
    name = pod_namespace(cluster_id, number)
    if (NETNS_DIR / name).exists():
        await _ip_async(["netns", "delete", name])


async def cut_connections(cluster_id: str, number: int) -> None:
    """Packets of the connections that the pod has opened are lost from now on, both ways; new connections work."""
    inside = ["ip", "netns", "exec", pod_namespace(cluster_id, number)]
    table = await _run_async([*inside, "ss", "--numeric", "--no-header", "--tcp", "state", "established"])
    own_ends = {int(line.split()[2].rpartition(":")[2]) for line in table.splitlines()}
    opened = sorted(port for port in own_ends if port >= FIRST_EPHEMERAL_PORT)
    if not opened:
        raise NetworkError("the pod has opened no TCP connection that could be cut")
    ports = ", ".join(map(str, opened))
    rules = f"""
        add table inet cut
        add chain inet cut in {{ type filter hook input priority 0; }}
        add chain inet cut out {{ type filter hook output priority 0; }}
        add rule inet cut in tcp dport {{ {ports} }} drop
        add rule inet cut out tcp sport {{ {ports} }} drop
    """
    await _run_async([*inside, "nft", "--file", "-"], rules)


async def cut_off(number: int, address: str) -> None:
    """From now on packets to and from the pod are lost without an answer, as when its node is without power."""
    await _ip_batch([], f"link set pod{number} down", f"route add blackhole {address}/32")


async def forget(addresses: list[str]) -> None:
    """Ends what `cut_off` began, for pods that are gone."""
    await _ip_batch([], *(f"route delete blackhole {address}/32" for address in addresses))


def destroy(cluster_id: str) -> None:
    """Ends every process inside the cluster's namespaces and deletes them."""
    pattern = re.compile(rf"{PREFIX}-{re.escape(cluster_id)}(-p\d+)?")
    names = [entry.name for entry in NETNS_DIR.glob(f"{PREFIX}-{cluster_id}*") if pattern.fullmatch(entry.name)]
    deadline = time.monotonic() + 10
    while (processes := [pid for name in names for pid in _processes(name)]) and time.monotonic() < deadline:
        for pid in processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)
    for name in names:
        _ip("netns", "delete", name)


def _processes(namespace: str) -> list[int]:
    answer = _ip("netns", "pids", namespace)
    return [pid for pid in map(int, answer.split()) if pid != os.getpid()]


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NetworkError("the `ip` command is missing: run e2e/setup.sh (Debian package iproute2)") from None
    if result.returncode != 0:
        raise NetworkError(f"`{' '.join(command)}` failed: {result.stderr.strip()}; run as root")
    return result.stdout


async def _ip_batch(options: list[str], *lines: str) -> None:
    await _ip_async([*options, "-batch", "-"], "\n".join(lines))


async def _ip_async(arguments: list[str], standard_input: str = "") -> None:
    await _run_async(["ip", *arguments], standard_input)


async def _run_async(command: list[str], standard_input: str = "") -> str:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    output, errors = await process.communicate(standard_input.encode())
    if process.returncode != 0:
        raise NetworkError(f"`{' '.join(command)}` failed: {errors.decode().strip()}")
    return output.decode()
