"""One pod from its binding to its removal.

    refused ─► Failed
    network ─► volumes ─► init containers, one after another ─► containers, all at once
                                                                   │ deletion, or all ended for good
    ended with grace ◄─────────────────────────────────────────────┘
    last status ─► network removed ─► (deletion) the object removed from the API server

Everything that changes a container's state calls `changed()`; a task of its own turns that into status patches, many
changes into one.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from harness import network
from harness.kubelet.api import Api, ApiError, Object
from harness.kubelet.config import KubeletConfig
from harness.kubelet.container import Container, now
from harness.kubelet.env import ConfigSource, PodFacts
from harness.kubelet.status import ContainerView, PodView, pod_status
from harness.kubelet.store import MissingReferenceError, Store
from harness.kubelet.volumes import SUPPORTED_KINDS, PodVolumes

log = logging.getLogger(__name__)

RETRY_S = 0.5


def unsupported(spec: Object) -> str:
    """Names what a process cannot stand in for; empty where the pod can run."""
    for flag in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(flag):
            return f"spec.{flag}: pods have namespaces of their own here; run this test on kind"
    for volume in spec.get("volumes") or []:
        kind = next(key for key in volume if key != "name")
        if kind not in SUPPORTED_KINDS:
            return f"spec.volumes[{volume['name']}].{kind}: not supported; use one of {', '.join(SUPPORTED_KINDS)}"
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        where = f"container {container['name']}"
        if container.get("restartPolicy"):
            return f"{where}: restartPolicy of a container (sidecars) is not supported"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "grpc" in container.get(probe, {}):
                return f"{where}: {probe}.grpc is not supported; use httpGet, tcpSocket or exec"
    return ""


class PodWorker:
    """Implements container.PodContext."""

    def __init__(
        self,
        pod: Object,
        config: KubeletConfig,
        api: Api,
        store: Store,
        number: int,
        address: str,
        record: Callable[[Object, str, str, str], None],
    ) -> None:
        metadata = pod["metadata"]
        self.pod = pod
        self.config = config
        self.facts = PodFacts(pod_ip=address, host_ip=config.node_ip)
        self.network = network.pod_namespace(config.cluster_id, number)
        self.folder = Path(config.folder) / "pods" / metadata["uid"]
        self.log_folder = Path(config.folder) / "logs" / f"{metadata['namespace']}_{metadata['name']}_{metadata['uid']}"
        self.hosts_file = store.hosts_file(metadata["namespace"])
        self.volumes = PodVolumes(self.folder / "volumes", pod, api, store, self.facts)
        self.refused = unsupported(pod["spec"])
        self._api = api
        self._store = store
        self._number = number
        self._record = record
        self._started_at = now()
        self._network_ready = False
        self._prepared = False
        self._deletion = asyncio.Event()
        self._gone = asyncio.Event()
        self._dirty = asyncio.Event()
        self._failed_reports = 0
        self._silent = False
        policy = pod["spec"].get("restartPolicy", "Always")
        init_policy = "Never" if policy == "Never" else "OnFailure"
        self._init = [Container(self, spec, init_policy) for spec in pod["spec"].get("initContainers") or []]
        self._main = [Container(self, spec, policy) for spec in pod["spec"]["containers"]]
        self._will_restart = policy != "Never"

    # --- what a container needs (PodContext)

    def services(self) -> list[Object]:
        """Those whose variables a container gets: the API server's always, others by enableServiceLinks."""
        links = self.pod["spec"].get("enableServiceLinks", True)
        kubernetes = [item for item in self._store.services("default") if item["metadata"]["name"] == "kubernetes"]
        return kubernetes + (self._store.services(self.pod["metadata"]["namespace"]) if links else [])

    def config_source(self) -> ConfigSource:
        return self._store

    def changed(self) -> None:
        self._dirty.set()

    def event(self, kind: str, reason: str, message: str) -> None:
        if not self._silent:
            self._record(self.pod, kind, reason, message)

    # --- what the manager tells

    def update(self, pod: Object) -> None:
        self.pod = pod
        if "deletionTimestamp" in pod["metadata"]:
            self._deletion.set()
        if pod["spec"].get("readinessGates"):
            self.changed()  # Somebody else's condition may have opened a gate.

    def correct(self) -> None:
        """Report again where the API server has another idea of the conditions than we."""
        known = {entry["type"]: entry["status"] for entry in self.pod.get("status", {}).get("conditions") or []}
        ours = pod_status(self.pod, self._view(), now())["conditions"]
        if any(known.get(entry["type"]) != entry["status"] for entry in ours):
            self.changed()

    def gone(self) -> None:
        """The object was removed (a forced deletion): there is no grace left."""
        self._gone.set()
        self._deletion.set()

    def config_changed(self) -> None:
        if self._prepared:
            self.volumes.refresh()

    def container(self, name: str) -> Container | None:
        return next((item for item in [*self._init, *self._main] if item.name == name), None)

    async def cut_connections(self) -> None:
        """For tests. Raises NetworkError where there are none."""
        await network.cut_connections(self.config.cluster_id, self._number)

    async def lose_power(self) -> None:
        """The node dies: all processes end, nobody is told, and no packet of theirs says goodbye."""
        self._silent = True
        if self._network_ready:
            await network.cut_off(self._number, self.facts.pod_ip)
        for item in self._all():
            item.stopping.set()
            item.signal(signal.SIGKILL)

    # --- life

    async def run(self) -> None:
        reporter = asyncio.create_task(self._report_changes())
        self.changed()
        try:
            if not self.refused and await self._unless_deleted(self._prepare()):
                await self._run_containers()
            await self._report()
            await self._deletion.wait()
        finally:
            reporter.cancel()
            await network.delete_pod_namespace(self.config.cluster_id, self._number)
            await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
        if not self._gone.is_set():
            await self._remove_object()

    async def _unless_deleted(self, work: Any) -> bool:
        """Does the work to its end, or leaves it where the pod is deleted meanwhile."""
        task, deletion = asyncio.create_task(work), asyncio.create_task(self._deletion.wait())
        await asyncio.wait({task, deletion}, return_when=asyncio.FIRST_COMPLETED)
        deletion.cancel()
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False

    async def _prepare(self) -> None:
        await network.create_pod_namespace(self.config.cluster_id, self._number, self.facts.pod_ip)
        self._network_ready = True
        last = ""
        while True:
            try:
                await self.volumes.prepare()
                break
            except (MissingReferenceError, ApiError, aiohttp.ClientError, TimeoutError) as error:
                if str(error) != last:
                    last = str(error)
                    self.event("Warning", "FailedMount", last)
                await asyncio.sleep(RETRY_S)
        self._prepared = True

    async def _run_containers(self) -> None:
        ending = asyncio.create_task(self._end_when_deleted())
        try:
            for item in self._init:
                await item.run()
                if not item.succeeded or item.stopping.is_set():
                    return
            async with asyncio.TaskGroup() as tasks:
                for item in self._main:
                    tasks.create_task(item.run())
        finally:
            ending.cancel()

    async def _end_when_deleted(self) -> None:
        await self._deletion.wait()
        grace_s = self.pod["metadata"].get("deletionGracePeriodSeconds")
        if grace_s is None:
            grace_s = self.pod["spec"].get("terminationGracePeriodSeconds", 30)
        if not self._gone.is_set():
            for item in self._main:
                self.event("Normal", "Killing", f"Stopping container {item.name}")
        # Cancelled by _run_containers when the last container has ended.
        stops = [item.stop(0 if self._gone.is_set() else grace_s) for item in self._all()]
        await asyncio.gather(self._kill_when_gone(), *stops)

    async def _kill_when_gone(self) -> None:
        await self._gone.wait()
        for item in self._all():
            await item.kill()

    def _all(self) -> list[Container]:
        return [*self._init, *self._main]

    async def _remove_object(self) -> None:
        metadata = self.pod["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": 0,
            "preconditions": {"uid": metadata["uid"]},
        }
        while not self._gone.is_set():
            try:
                await self._api.delete(self._path, body)
                return
            except ApiError as error:
                if error.status in (404, 409):
                    return
                log.warning("removing %s: %s", self._path, error)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("removing %s: %s", self._path, error)
            await asyncio.sleep(RETRY_S)

    # --- status

    @property
    def _path(self) -> str:
        metadata = self.pod["metadata"]
        return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"

    async def _report_changes(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if not await self._report():
                await asyncio.sleep(RETRY_S)
                self._dirty.set()

    async def _report(self) -> bool:
        """Patches the status; False where it should be tried again."""
        if self._gone.is_set() or self._silent:
            return True
        body = {"metadata": {"uid": self.pod["metadata"]["uid"]}, "status": pod_status(self.pod, self._view(), now())}
        try:
            await self._api.patch(f"{self._path}/status", body)
        except ApiError as error:
            if error.status in (404, 409, 422):  # Removed, or removed and made anew.
                log.info("status of %s: %s", self._path, error)
                return True
            log.warning("status of %s: %s", self._path, error)
            return False
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("status of %s: %s", self._path, error)
            return False
        return True

    def _view(self) -> PodView:
        return PodView(
            pod_ip=self.facts.pod_ip if self._network_ready else "",
            host_ip=self.facts.host_ip,
            started_at=self._started_at,
            network_ready=self._network_ready,
            init=[_container_view(item) for item in self._init],
            main=[_container_view(item) for item in self._main],
            will_restart=self._restarts(),
            refused=self.refused,
            gates=[gate["conditionType"] for gate in self.pod["spec"].get("readinessGates") or []],
        )

    def _restarts(self) -> bool:
        """Whether an ended container is started again: never in a pod on its way out."""
        if self._deletion.is_set() or not self._will_restart:
            return False
        if self.pod["spec"].get("restartPolicy", "Always") == "Always":
            return True
        return not all(item.succeeded for item in self._main)


def _container_view(item: Container) -> ContainerView:
    return ContainerView(
        name=item.name,
        image=item.spec["image"],
        state=item.state,
        last_state=item.last_state,
        restart_count=item.restart_count,
        ready=item.ready,
        started=item.started,
    )
