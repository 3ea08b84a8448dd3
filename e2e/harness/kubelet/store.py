"""What the kubelet knows of the cluster beside its pods: ConfigMaps, Secrets, Services, endpoints.

The copies are watched, so that a mounted ConfigMap follows its object within the second. Names of Services reach pods
through a hosts file for each namespace (there is no DNS server): the file is rewritten in place when it changes, and
resolvers read it at every look-up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from harness.kubelet.api import Api, Change, Object, Reflector, key_of

CLUSTER_DOMAIN = "cluster.local"


class MissingReferenceError(Exception):
    """A ConfigMap, Secret or key that a pod refers to and that does not exist (yet)."""


class Store:
    def __init__(self, api: Api, hosts_folder: Path) -> None:
        self.on_config_change: Callable[[], None] = lambda: None
        """Called when a ConfigMap or Secret changed."""
        self._hosts_folder = hosts_folder
        self._hosts_files: dict[str, Path] = {}
        self._config_maps = Reflector(api, "/api/v1/configmaps", self._config_changed)
        self._secrets = Reflector(api, "/api/v1/secrets", self._config_changed)
        self._services = Reflector(api, "/api/v1/services", self._names_changed)
        self._slices = Reflector(api, "/apis/discovery.k8s.io/v1/endpointslices", self._names_changed)
        self._names_dirty = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for reflector in (self._config_maps, self._secrets, self._services, self._slices):
                tasks.create_task(reflector.run())
            tasks.create_task(self._keep_hosts_files())

    async def synced(self) -> None:
        for reflector in (self._config_maps, self._secrets, self._services, self._slices):
            await reflector.synced.wait()

    def config_map(self, namespace: str, name: str) -> Object:
        return self._find(self._config_maps, "ConfigMap", namespace, name)

    def secret(self, namespace: str, name: str) -> Object:
        return self._find(self._secrets, "Secret", namespace, name)

    def services(self, namespace: str) -> list[Object]:
        return [item for (owner, _), item in sorted(self._services.items.items()) if owner == namespace]

    def hosts_file(self, namespace: str) -> Path:
        """The file pods of a namespace see as /etc/hosts."""
        if namespace not in self._hosts_files:
            path = self._hosts_folder / namespace
            self._hosts_folder.mkdir(parents=True, exist_ok=True)
            path.write_text(self._hosts(namespace))
            self._hosts_files[namespace] = path
        return self._hosts_files[namespace]

    @staticmethod
    def _find(reflector: Reflector, kind: str, namespace: str, name: str) -> Object:
        found = reflector.items.get((namespace, name))
        if found is None:
            raise MissingReferenceError(f'{kind} "{name}" not found in namespace "{namespace}"')
        return found

    def _config_changed(self, _change: Change, _item: Object) -> None:
        self.on_config_change()

    def _names_changed(self, _change: Change, _item: Object) -> None:
        self._names_dirty.set()

    async def _keep_hosts_files(self) -> None:
        while True:
            await self._names_dirty.wait()
            self._names_dirty.clear()
            for namespace, path in self._hosts_files.items():
                content = self._hosts(namespace)
                if path.read_text() != content:
                    # In place: containers hold this very file as a bind mount.
                    path.write_text(content)

    def _hosts(self, namespace: str) -> str:
        return hosts_file(namespace, list(self._services.items.values()), list(self._slices.items.values()))


def hosts_file(namespace: str, services: list[Object], slices: list[Object]) -> str:
    """Every Service's names, as a pod of the namespace may call it; a headless Service stands for its endpoints."""
    lines = ["127.0.0.1 localhost"]
    for service in services:
        owner, name = key_of(service)
        address = service["spec"].get("clusterIP", "")
        if address and address != "None":
            lines.append(f"{address} {' '.join(_names(name, owner, namespace))}")
    for piece in slices:
        owner = piece["metadata"]["namespace"]
        labels = piece["metadata"].get("labels", {})
        if "service.kubernetes.io/headless" not in labels:
            continue
        name = labels["kubernetes.io/service-name"]
        for endpoint in piece.get("endpoints") or []:
            names = _names(name, owner, namespace) if endpoint["conditions"].get("ready") else []
            if "hostname" in endpoint:
                names = _names(f"{endpoint['hostname']}.{name}", owner, namespace) + names
            lines += [f"{address} {' '.join(names)}" for address in endpoint["addresses"] if names]
    return "\n".join(lines) + "\n"


def _names(service: str, owner: str, namespace: str) -> list[str]:
    names = [f"{service}.{owner}.svc.{CLUSTER_DOMAIN}", f"{service}.{owner}.svc", f"{service}.{owner}"]
    return [*names, service] if owner == namespace else names
