"""Nodes: registration with capacity and labels, the leases that keep them Ready, and their own word that they are."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

import aiohttp

from harness.kubelet.api import Api, ApiError, Object
from harness.kubelet.config import KubeletConfig, NodeConfig
from harness.kubelet.container import now

log = logging.getLogger(__name__)

LEASE_DURATION_S = 40
RENEW_EVERY_S = 2
"""A real kubelet: 10. The controller-manager is told to give a node up sooner, too."""
REPORT_EVERY_S = 10
"""How often a node looks whether the API server still knows it to be Ready: as a real kubelet does."""
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


def node_object(node: NodeConfig) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {
                "kubernetes.io/hostname": node.name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                **node.labels,
            },
        },
    }


def node_status(node: NodeConfig, config: KubeletConfig, version: str) -> Object:
    resources = {"cpu": str(node.cpus), "memory": f"{node.memory_gib}Gi", "pods": "250", "ephemeral-storage": "1Ti"}
    if node.gpus:
        resources["nvidia.com/gpu"] = str(node.gpus)
    pressures = ("MemoryPressure", "DiskPressure", "PIDPressure")
    conditions = [{"type": kind, "status": "False", "reason": "KubeletHasSufficient"} for kind in pressures]
    conditions.append({"type": "Ready", "status": "True", "reason": "KubeletReady"})
    times = {"lastHeartbeatTime": now(), "lastTransitionTime": now()}
    return {
        "capacity": resources,
        "allocatable": resources,
        "addresses": [
            {"type": "InternalIP", "address": config.node_ip},
            {"type": "Hostname", "address": node.name},
        ],
        "conditions": [{**condition, **times} for condition in conditions],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": config.port}},
        "nodeInfo": {
            "architecture": "amd64",
            "operatingSystem": "linux",
            "osImage": "processes",
            "kernelVersion": "",
            "bootID": "",
            "machineID": "",
            "systemUUID": "",
            "containerRuntimeVersion": "process://1",
            "kubeletVersion": version,
            "kubeProxyVersion": version,
        },
    }


class Node:
    """One node; `online` is what a failed node lacks."""

    def __init__(self, node: NodeConfig, config: KubeletConfig, api: Api) -> None:
        self.name = node.name
        self.online = asyncio.Event()
        self.online.set()
        self._node = node
        self._config = config
        self._api = api

    async def register(self) -> None:
        try:
            await self._api.create("/api/v1/nodes", node_object(self._node))
        except ApiError as error:
            if error.status != 409:
                raise
        await self._report()

    async def run(self) -> None:
        """Renews the lease while online; a node that was held to be lost reports itself Ready again."""
        known: Object | None = None
        reported_at = time.monotonic()
        while True:
            if not self.online.is_set():
                await self.online.wait()
                await self.register()
            try:
                known = await self._renew(known)
                if time.monotonic() - reported_at > REPORT_EVERY_S:
                    reported_at = time.monotonic()
                    await self._correct()
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("lease of %s: %s", self.name, error)
                known = None
            await asyncio.sleep(RENEW_EVERY_S)

    async def _report(self) -> None:
        version = (await self._api.get("/version"))["gitVersion"]
        status = node_status(self._node, self._config, version)
        await self._api.patch(f"/api/v1/nodes/{self.name}/status", {"status": status})

    async def _correct(self) -> None:
        """While the API server was away no lease was renewed: the node controller took the node for lost."""
        conditions = (await self._api.get(f"/api/v1/nodes/{self.name}"))["status"].get("conditions") or []
        if not any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions):
            log.info("%s is not lost", self.name)
            await self._report()

    async def _renew(self, known: Object | None) -> Object:
        path = f"{LEASES}/{self.name}"
        if known is None:
            try:
                known = await self._api.get(path)
            except ApiError as error:
                if error.status != 404:
                    raise
                return await self._api.create(LEASES, {"metadata": {"name": self.name}, "spec": self._lease_spec()})
        return await self._api.replace(path, {**known, "spec": self._lease_spec()})

    def _lease_spec(self) -> Object:
        renewed = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {"holderIdentity": self.name, "leaseDurationSeconds": LEASE_DURATION_S, "renewTime": renewed}
