"""Which cluster the tests run on, and what a test may do to it beside the Kubernetes API.

    KUBECONFIG is set            that cluster; nothing is created or deleted but the tests' namespaces
    docker and kind are there    a kind cluster out of e2e/kind.yaml
    otherwise                    the built-in one: `controlplane.py` and the process kubelet

`KVFLEET_E2E_CLUSTER=existing|kind|builtin` overrides the choice.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path

from harness.settings import E2E_DIR, WEB_IMAGE, default_nodes
from kvfleet_api.fleetrouter import DEFAULT_ROUTER_IMAGE
from kvfleet_api.modelpool import DEFAULT_ENGINE_IMAGE

KIND_CLUSTER = "kvfleet-e2e"
CUT_HERE = "connections of pods are cut on the built-in cluster only: run this test there (KVFLEET_E2E_CLUSTER=builtin)"
API_SERVER_TIMEOUT_S = 120


class ClusterError(Exception):
    """A cluster cannot be had or cannot do what a test asks, and why."""


class Cluster(ABC):
    """A running cluster."""

    _proxy: subprocess.Popen[str] | None = None
    _proxy_url = ""

    kubeconfig: Path
    tools: str
    """Folder with kubectl and helm that comes first in PATH, or empty."""
    reaches_pods = False
    """Whether the addresses of pods and Services are reachable from the tests."""

    @abstractmethod
    def signal_container(self, namespace: str, pod: str, container: str, number: int) -> None:
        """Sends a signal to a container's process 1, from outside the container."""

    @abstractmethod
    def cut_connections(self, namespace: str, pod: str) -> None:
        """The connections that a pod has opened go dead, without a word to either end; new ones work."""

    @abstractmethod
    def fail_node(self, name: str) -> None:
        """Cuts a node's power: its pods' processes and its lease end, packets to them are lost."""

    @abstractmethod
    def recover_node(self, name: str) -> None:
        """Switches it on again."""

    @abstractmethod
    def stop_api_server(self) -> None:
        """Nothing can be asked of the cluster from now on; pods go on."""

    @abstractmethod
    def start_api_server(self) -> None:
        """Returns once it answers again."""

    @abstractmethod
    def diagnosis(self) -> str:
        """What the cluster's own components say where a test failed; empty where they are not ours."""

    @abstractmethod
    def close(self, keep: bool) -> str:
        """Ends the cluster, or leaves it to the user and tells how to use it."""

    def api_proxy(self) -> str:
        """A local address for the API server, with the user's credentials: the way to Services from outside."""
        if self._proxy is None:
            command = ["kubectl", "proxy", "--port=0"]
            self._proxy = subprocess.Popen(command, env=self.environment(), stdout=subprocess.PIPE, text=True)
            assert self._proxy.stdout is not None
            self._proxy_url = "http://" + self._proxy.stdout.readline().split()[-1]
        return self._proxy_url

    def close_proxy(self) -> None:
        if self._proxy is not None:
            self._proxy.terminate()
            self._proxy.wait()

    def environment(self) -> dict[str, str]:
        """For kubectl and helm."""
        path = os.pathsep.join(part for part in (self.tools, os.environ.get("PATH", "")) if part)
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "PATH": path}

    def run(self, *command: str, standard_input: str | None = None, timeout_s: float = 120) -> str:
        """kubectl, helm or helm3 against this cluster: its output. Raises ClusterError with its errors."""
        environment = self.environment()
        program = shutil.which(command[0], path=environment["PATH"])
        if program is None:
            raise ClusterError(f"{command[0]} is not installed: install it, or use the built-in cluster, which has it")
        result = subprocess.run(
            [program, *command[1:]],
            env=environment,
            input=standard_input,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if result.returncode != 0:
            raise ClusterError(f"`{' '.join(command)}` failed ({result.returncode}): {result.stderr or result.stdout}")
        return result.stdout


class ExistingCluster(Cluster):
    """The user's own, by kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self.tools = ""
        if not kubeconfig.exists():
            raise ClusterError(f"KUBECONFIG={kubeconfig}: no such file; unset it to use a cluster made for the tests")
        self.run("kubectl", "version", "--request-timeout=10s")

    def signal_container(self, namespace: str, pod: str, container: str, number: int) -> None:
        raise ClusterError(
            "signals to containers need the node: run this test on kind or on the built-in cluster (unset KUBECONFIG)"
        )

    def cut_connections(self, namespace: str, pod: str) -> None:
        raise ClusterError(CUT_HERE)

    def fail_node(self, name: str) -> None:
        raise ClusterError("nodes of a cluster that is not the tests' own are not failed: use kind or unset KUBECONFIG")

    def recover_node(self, name: str) -> None:
        """None was failed."""

    def stop_api_server(self) -> None:
        raise ClusterError(
            "the API server of a cluster that is not the tests' own goes on: use kind or unset KUBECONFIG"
        )

    def start_api_server(self) -> None:
        """It was not stopped."""

    def diagnosis(self) -> str:
        return ""

    def close(self, keep: bool) -> str:
        """Nothing but the proxy is ours."""
        self.close_proxy()
        return ""


class KindCluster(Cluster):
    """Made by kind out of e2e/kind.yaml; an earlier one that was kept is used again."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self.tools = ""
        known = self.run("kind", "get", "clusters").split()
        if KIND_CLUSTER not in known:
            config = str(E2E_DIR / "kind.yaml")
            self.run("kind", "create", "cluster", "--name", KIND_CLUSTER, "--config", config, timeout_s=600)
        self.run("kind", "export", "kubeconfig", "--name", KIND_CLUSTER, "--kubeconfig", str(kubeconfig))
        self._load_images()
        self._advertise_gpus()

    def _load_images(self) -> None:
        """Built from this checkout, under the names that manifests use."""
        self.run("docker", "build", "-t", DEFAULT_ROUTER_IMAGE, str(E2E_DIR.parent), timeout_s=900)
        base = ["--build-arg", f"KVFLEET_IMAGE={DEFAULT_ROUTER_IMAGE}", "-f", str(E2E_DIR / "kind.Dockerfile")]
        for target, image in (("vllm", DEFAULT_ENGINE_IMAGE), ("web", WEB_IMAGE)):
            self.run("docker", "build", *base, "--target", target, "-t", image, str(E2E_DIR), timeout_s=900)
        images = (DEFAULT_ROUTER_IMAGE, DEFAULT_ENGINE_IMAGE, WEB_IMAGE)
        self.run("kind", "load", "docker-image", "--name", KIND_CLUSTER, *images, timeout_s=600)

    def _advertise_gpus(self) -> None:
        """Extended resources that a node's status names are scheduled, whether or not there is hardware."""
        nodes = self.run("kubectl", "get", "nodes", "-l", "nvidia.com/gpu.product", "-o=name").split()
        capacity = {"status": {"capacity": {"nvidia.com/gpu": str(default_nodes()[0].gpus)}}}
        for node in nodes:
            self.run("kubectl", "patch", node, "--subresource=status", "-p", json.dumps(capacity))

    def signal_container(self, namespace: str, pod: str, container: str, number: int) -> None:
        wanted = f"{{.status.containerStatuses[?(@.name=='{container}')].containerID}}"
        template = f"-o=jsonpath={{.spec.nodeName}} {wanted}"
        answer = self.run("kubectl", "get", "pod", pod, "-n", namespace, template)
        node, identity = answer.split()
        inspect = ["crictl", "inspect", "--output", "go-template", "--template", "{{.info.pid}}"]
        pid = self.run("docker", "exec", node, *inspect, identity.split("//")[1]).strip()
        self.run("docker", "exec", node, "kill", f"-{number}", pid)

    def cut_connections(self, namespace: str, pod: str) -> None:
        raise ClusterError(CUT_HERE)

    def fail_node(self, name: str) -> None:
        self.run("docker", "kill", name)

    def recover_node(self, name: str) -> None:
        self.run("docker", "start", name)

    def stop_api_server(self) -> None:
        """A static pod: its kubelet ends it when its manifest leaves the folder."""
        self._move_manifest("/etc/kubernetes/manifests", "/etc/kubernetes")
        self._wait_for_api(there=False)

    def start_api_server(self) -> None:
        self._move_manifest("/etc/kubernetes", "/etc/kubernetes/manifests")
        self._wait_for_api(there=True)

    def _move_manifest(self, source: str, target: str) -> None:
        file = "kube-apiserver.yaml"
        self.run("docker", "exec", f"{KIND_CLUSTER}-control-plane", "mv", f"{source}/{file}", f"{target}/{file}")

    def _wait_for_api(self, there: bool) -> None:
        deadline = time.monotonic() + API_SERVER_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                self.run("kubectl", "get", "--raw=/readyz", "--request-timeout=2s")
            except ClusterError:
                if not there:
                    return
            else:
                if there:
                    return
            time.sleep(0.5)
        raise ClusterError(f"the API server was not {'back' if there else 'gone'} within {API_SERVER_TIMEOUT_S} s")

    def diagnosis(self) -> str:
        return ""

    def close(self, keep: bool) -> str:
        self.close_proxy()
        if keep:
            return f"e2e: the kind cluster {KIND_CLUSTER} goes on; its kubeconfig is {self.kubeconfig}"
        self.run("kind", "delete", "cluster", "--name", KIND_CLUSTER)
        return ""


def open_cluster(scratch: Path, keep: bool) -> Cluster:
    """`scratch` is a folder for files that last as long as the test run."""
    choice = chosen()
    if choice == "existing":
        return ExistingCluster(Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config"))
    if choice == "kind":
        return KindCluster(scratch / "kind.kubeconfig")
    if choice == "builtin":
        from harness.builtin import BuiltinCluster  # Linux only; the two others run anywhere.

        return BuiltinCluster.start(keep)
    raise ClusterError(f"KVFLEET_E2E_CLUSTER={choice}: choose existing, kind or builtin")


def chosen() -> str:
    """existing, kind or builtin."""
    if choice := os.environ.get("KVFLEET_E2E_CLUSTER"):
        return choice
    if os.environ.get("KUBECONFIG"):
        return "existing"
    if shutil.which("kind") and shutil.which("docker"):
        docker = subprocess.run(["docker", "info"], capture_output=True, check=False)
        if docker.returncode == 0:
            return "kind"
    return "builtin"


if __name__ == "__main__":
    print(chosen())
