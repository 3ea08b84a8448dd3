"""The built-in cluster: namespace, control plane and process kubelet, started together and ended together.

While it runs, the test process is inside the cluster's network namespace. Its files are in
`<temporary folder>/kvfleet-e2e/<id>`, locked by the process that made it: a later run finds folders nobody holds and
removes what is left of their clusters. `keep` leaves a cluster running behind the tests instead, until
`python -m harness.builtin delete ID`.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from harness import network
from harness.build import BuildError, binaries
from harness.cluster import Cluster, ClusterError
from harness.controlplane import ADMIN, KUBELET, SERVER, ControlPlane, StartError
from harness.kubelet.config import KubeletConfig
from harness.settings import E2E_DIR, Settings, default_nodes

KUBELET_PORT = 10250
NODES_TIMEOUT_S = 60


def clusters_folder() -> Path:
    return Path(tempfile.gettempdir()) / "kvfleet-e2e"


class BuiltinCluster(Cluster):
    reaches_pods = True

    def __init__(self, cluster_id: str, control_plane: ControlPlane, way_back: int, lock: IO[str]) -> None:
        self.id = cluster_id
        self.kubeconfig = control_plane.kubeconfig(ADMIN)
        self.tools = str(control_plane.binaries.folder)
        self._control_plane = control_plane
        self._way_back = way_back
        self._lock = lock

    @classmethod
    def start(cls, keep: bool) -> BuiltinCluster:
        if os.geteuid() != 0:
            raise ClusterError(
                "the built-in cluster makes network and mount namespaces and needs root: use sudo, or kind, or KUBECONFIG"
            )
        settings = Settings.read()
        try:
            programs = binaries()
        except BuildError as error:
            raise ClusterError(str(error)) from None
        sweep()
        cluster_id = secrets.token_hex(3)
        folder, lock = _make_folder(cluster_id)
        network.create_cluster_namespace(cluster_id)
        way_back = network.enter(cluster_id)
        control_plane = ControlPlane(folder, programs, outlives_us=keep)
        cluster = cls(cluster_id, control_plane, way_back, lock)
        try:
            control_plane.start()
            cluster._start_kubelet(settings)
            cluster._wait_for_nodes()
        except BaseException as error:
            cluster.close(keep=False)
            if isinstance(error, StartError):
                raise ClusterError(str(error)) from None
            raise
        return cluster

    def signal_container(self, namespace: str, pod: str, container: str, number: int) -> None:
        self._lever(f"/e2e/signal/{namespace}/{pod}/{container}?number={number}")

    def cut_connections(self, namespace: str, pod: str) -> None:
        self._lever(f"/e2e/cut/{namespace}/{pod}")

    def fail_node(self, name: str) -> None:
        self._lever(f"/e2e/nodes/{name}/fail")

    def recover_node(self, name: str) -> None:
        self._lever(f"/e2e/nodes/{name}/recover")

    def stop_api_server(self) -> None:
        self._control_plane.stop_api_server()

    def start_api_server(self) -> None:
        self._control_plane.start_api_server()

    def diagnosis(self) -> str:
        failed = self._control_plane.failed_component()
        if failed is not None:
            return f"{failed} has ended; the end of its log:\n{self._control_plane.log_end(failed)}"
        return f"the end of the kubelet's log:\n{self._control_plane.log_end('kubelet', 15)}"

    def close(self, keep: bool) -> str:
        self.close_proxy()
        if keep:
            (self.kubeconfig.parent / "keep").touch()
            self._control_plane.release()
            network.leave(self._way_back)
            self._lock.close()
            return self._instructions()
        try:
            self._control_plane.stop()
        finally:
            network.leave(self._way_back)
            _remove(self.id)
            self._lock.close()
        return ""

    def _start_kubelet(self, settings: Settings) -> None:
        folder, certificates = self._control_plane.folder, self._control_plane.ca_file.parent
        config = KubeletConfig(
            cluster_id=self.id,
            folder=str(folder),
            server=SERVER,
            ca_file=str(self._control_plane.ca_file),
            token=self._control_plane.token(KUBELET),
            certificate_file=str(certificates / "apiserver.crt"),
            key_file=str(certificates / "apiserver.key"),
            node_ip=network.NODE_IP,
            nodes=default_nodes(),
            images=settings.images(),
            port=KUBELET_PORT,
        )
        file = folder / "kubelet.json"
        file.write_bytes(msgspec.json.format(msgspec.json.encode(config)))
        command = [sys.executable, "-m", "harness.kubelet", str(file)]
        self._control_plane.run("kubelet", command, {"PYTHONPATH": str(E2E_DIR)})

    def _wait_for_nodes(self) -> None:
        """Until the node controller has lifted the taint of every node: pods can be placed."""
        deadline = time.monotonic() + NODES_TIMEOUT_S
        while time.monotonic() < deadline:
            if (failed := self._control_plane.failed_component()) is not None:
                raise StartError(f"{failed} ended during start:\n{self._control_plane.log_end(failed)}")
            nodes = msgspec.json.decode(self._control_plane.request("GET", "/api/v1/nodes"))["items"]
            if len(nodes) == len(default_nodes()) and not any(node["spec"].get("taints") for node in nodes):
                return
            time.sleep(0.1)
        raise StartError(f"the nodes were not ready within {NODES_TIMEOUT_S} s:\n{self.diagnosis()}")

    def _lever(self, path: str) -> None:
        url = f"https://{network.NODE_IP}:{KUBELET_PORT}{path}"
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # Inside our own namespace.
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10, context=context).close()
        except urllib.error.HTTPError as error:
            raise ClusterError(f"{path}: {error.read().decode()}") from None

    def _instructions(self) -> str:
        namespace = network.cluster_namespace(self.id)
        kubectl = self._control_plane.binaries.path("kubectl")
        return (
            f"e2e: the cluster goes on; its logs are in {self.kubeconfig.parent}. Look at it and end it with\n"
            f"  ip netns exec {namespace} {kubectl} --kubeconfig {self.kubeconfig} get pods -A\n"
            f"  PYTHONPATH={E2E_DIR} {sys.executable} -m harness.builtin delete {self.id}"
        )


def _lock(folder: Path) -> IO[str] | None:
    """The lock of a cluster's folder; None where another process holds it. Not inherited by child processes."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _make_folder(cluster_id: str) -> tuple[Path, IO[str]]:
    """A folder that is locked from the moment a sweep of another process can see it."""
    folder = clusters_folder() / cluster_id
    hidden = folder.with_name(f".{cluster_id}")
    hidden.mkdir(parents=True)
    lock = _lock(hidden)
    assert lock is not None
    hidden.rename(folder)
    return folder, lock


def _remove(cluster_id: str) -> None:
    network.destroy(cluster_id)
    shutil.rmtree(clusters_folder() / cluster_id, ignore_errors=True)


def _known() -> Iterator[str]:
    if clusters_folder().is_dir():
        yield from sorted(entry.name for entry in clusters_folder().iterdir() if not entry.name.startswith("."))


def sweep() -> list[str]:
    """Removes what is left of clusters whose test process ended without doing so."""
    swept = []
    for cluster_id in _known():
        folder = clusters_folder() / cluster_id
        if (folder / "keep").exists():
            continue
        lock = _lock(folder)
        if lock is not None:
            with lock:
                _remove(cluster_id)
            swept.append(cluster_id)
    return swept


def main(arguments: list[str]) -> int:
    match arguments:
        case ["list"]:
            print("\n".join(_known()))
        case ["sweep"]:
            sweep()
        case ["delete", cluster_id] if cluster_id in _known():
            _remove(cluster_id)
        case _:
            print("usage: python -m harness.builtin list | sweep | delete ID", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
