"""The built-in control plane: etcd, kube-apiserver, controller-manager, scheduler, kube-proxy as local processes.

Each is the real component with the flags kubeadm would give it, and an identity of its own that is authorised by RBAC:
static bearer tokens stand in for client certificates. Leader election is off (there is one of each), client rate limits
are raised, and etcd does not wait for the disk: a test cluster has nothing to lose.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.build import Binaries
from harness.network import NODE_IP, POD_CIDR, SERVICE_CIDR

SERVER = f"https://{NODE_IP}:6443"
START_TIMEOUT_S = 120
API_SERVER = "kube-apiserver"
PROXY_NODE = "node-0"
NODE_GRACE_S = 20
"""After which a silent node counts as lost (default 50)."""
ISSUER = "https://kubernetes.default.svc.cluster.local"

ADMIN, KUBELET = "e2e-admin", "e2e-kubelet"
_GROUPS = {ADMIN: "system:masters", KUBELET: ""}
_USERS = (
    ADMIN,
    KUBELET,
    "system:kube-controller-manager",
    "system:kube-scheduler",
    "system:kube-proxy",
)

_CLIENT_LIMITS = ["--kube-api-qps=500", "--kube-api-burst=1000"]


class StartError(Exception):
    """A component ended or did not become ready; the message carries the end of its log."""


@dataclass
class ControlPlane:
    """The running components. `start()` inside the cluster's network namespace, `stop()` anywhere."""

    folder: Path
    binaries: Binaries
    outlives_us: bool = False
    """Whether the components go on when this process is killed."""
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _commands: dict[str, tuple[list[str], dict[str, str] | None]] = field(default_factory=dict)
    _tokens: dict[str, str] = field(default_factory=lambda: {user: secrets.token_hex(16) for user in _USERS})

    @property
    def ca_file(self) -> Path:
        return self.folder / "certs" / "apiserver.crt"

    def kubeconfig(self, user: str) -> Path:
        return self.folder / f"{user.removeprefix('system:')}.kubeconfig"

    def token(self, user: str) -> str:
        return self._tokens[user]

    def start(self) -> None:
        self._write_credentials()
        self._start_etcd()
        self._start_api_server()
        for user in _USERS:
            self._write_kubeconfig(user)
        self._wait_ready(API_SERVER, "/readyz")
        self._authorise_kubelet()
        self._start_controllers()

    def run(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
        """Starts a process of the cluster; its output goes to `<name>.log`."""
        self._commands[name] = command, environment
        if not self.outlives_us:
            command = [_setpriv(), "--pdeathsig", "KILL", *command]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, **(environment or {})},
                # Ctrl-C is for the tests: they end the cluster themselves, in order.
                start_new_session=True,
            )

    def stop(self) -> None:
        """The newest first; the kubelet thereby ends its pods before the API server goes."""
        for process in reversed(self._processes.values()):
            _end(process)
        self._processes.clear()

    def stop_api_server(self) -> None:
        """The other components and all pods go on."""
        _end(self._processes[API_SERVER])

    def start_api_server(self) -> None:
        """Again, with what it had stored."""
        self.run(API_SERVER, *self._commands[API_SERVER])
        self._wait_ready(API_SERVER, "/readyz")

    def release(self) -> None:
        """The components go on without us."""
        for process in self._processes.values():
            process.returncode = 0  # Or Python warns of children that nobody waits for.
        self._processes.clear()

    def failed_component(self) -> str | None:
        """The name of a component that has ended by itself, if any."""
        return next((name for name, process in self._processes.items() if process.poll() is not None), None)

    def log_end(self, name: str, lines: int = 30) -> str:
        return "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        request = urllib.request.Request(
            SERVER + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token(ADMIN)}", "Content-Type": "application/json"},
        )
        context = ssl.create_default_context(cafile=str(self.ca_file))
        with urllib.request.urlopen(request, timeout=5, context=context) as answer:
            return bytes(answer.read())

    # --- the components

    def _component(self, name: str, *flags: str) -> None:
        self.run(name, [self.binaries.path(name), *flags])

    def _start_etcd(self) -> None:
        self._component(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=default=http://127.0.0.1:2380",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )

    def _start_api_server(self) -> None:
        self._component(
            API_SERVER,
            "--etcd-servers=http://127.0.0.1:2379",
            "--bind-address=0.0.0.0",
            f"--advertise-address={NODE_IP}",
            f"--service-cluster-ip-range={SERVICE_CIDR}",
            f"--cert-dir={self.ca_file.parent}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=Node,RBAC",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-signing-key-file={self.folder / 'service-account.key'}",
            f"--service-account-key-file={self.folder / 'service-account.key'}",
            "--allow-privileged=true",
            "--kubelet-preferred-address-types=InternalIP",
            "--profiling=false",
        )

    def _start_controllers(self) -> None:
        self._component(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig('system:kube-controller-manager')}",
            f"--service-account-private-key-file={self.folder / 'service-account.key'}",
            f"--root-ca-file={self.ca_file}",
            "--use-service-account-credentials=true",
            f"--node-monitor-grace-period={NODE_GRACE_S}s",
            "--node-monitor-period=1s",
            "--horizontal-pod-autoscaler-sync-period=1s",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            *_CLIENT_LIMITS,
        )
        self._component(
            "kube-scheduler",
            f"--kubeconfig={self.kubeconfig('system:kube-scheduler')}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            *_CLIENT_LIMITS,
        )
        (self.folder / "kube-proxy.json").write_text(json.dumps(self._proxy_configuration(), indent=1))
        self._component("kube-proxy", f"--config={self.folder / 'kube-proxy.json'}")

    def _proxy_configuration(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(self.kubeconfig("system:kube-proxy"))},
            "mode": "nftables",
            "nftables": {"minSyncPeriod": "50ms"},
            "clusterCIDR": POD_CIDR,
            "hostnameOverride": PROXY_NODE,
            "bindAddress": NODE_IP,
            # The host's limits on tracked connections are not this cluster's to change.
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
        }

    # --- credentials

    def _write_credentials(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [f'{token},"{user}","{user}","{_GROUPS.get(user, "")}"' for user, token in self._tokens.items()]
        (self.folder / "tokens.csv").write_text("\n".join(rows) + "\n")
        key = self.folder / "service-account.key"
        command = ["openssl", "genrsa", "-out", str(key), "2048"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError:
            raise StartError("the `openssl` command is missing: run e2e/setup.sh (Debian package openssl)") from None

    def _write_kubeconfig(self, user: str) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "e2e",
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": user}}],
            "clusters": [{"name": "e2e", "cluster": {"server": SERVER, "certificate-authority": str(self.ca_file)}}],
            "users": [{"name": user, "user": {"token": self.token(user)}}],
        }
        path = self.kubeconfig(user)
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))

    def _authorise_kubelet(self) -> None:
        for role in ("system:node", "system:node-proxier"):
            self.request(
                "POST",
                "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
                {
                    "metadata": {"name": f"{KUBELET}:{role.removeprefix('system:')}"},
                    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                    "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": KUBELET}],
                },
            )

    def _wait_ready(self, component: str, path: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        last = "no answer yet"
        while time.monotonic() < deadline:
            if (failed := self.failed_component()) is not None:
                raise StartError(f"{failed} ended during start; the end of its log:\n{self.log_end(failed)}")
            try:
                self.request("GET", path)
                return
            except (OSError, urllib.error.URLError, ssl.SSLError) as error:
                last = str(error)
            time.sleep(0.1)
        raise StartError(
            f"{component} was not ready within {START_TIMEOUT_S} s ({last}); the end of its log:\n"
            + self.log_end(component)
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _setpriv() -> str:
    path = shutil.which("setpriv")
    if path is None:
        raise StartError("the `setpriv` command is missing: run e2e/setup.sh (Debian package util-linux)")
    return path
