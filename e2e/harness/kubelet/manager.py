"""Gives every pod that is bound to one of our nodes a worker, and tells the workers what changes."""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import dataclass

import aiohttp

from harness import network
from harness.kubelet.api import Api, ApiError, Change, Object, Reflector
from harness.kubelet.config import KubeletConfig
from harness.kubelet.container import Container, now
from harness.kubelet.node import Node
from harness.kubelet.store import Store
from harness.kubelet.worker import PodWorker

log = logging.getLogger(__name__)

COMPONENT = "process-kubelet"
CORRECT_EVERY_S = 10
"""How often pods' statuses are compared with what the API server has: as a real kubelet does."""


@dataclass
class Running:
    worker: PodWorker
    task: asyncio.Task[None]
    node: str


class Manager:
    def __init__(self, config: KubeletConfig, api: Api, store: Store) -> None:
        self._config = config
        self._api = api
        self._store = store
        self._nodes = {node.name: Node(node, config, api) for node in config.nodes}
        self._pods = Reflector(api, "/api/v1/pods", self._pod_changed, fieldSelector="spec.nodeName!=")
        self._running: dict[str, Running] = {}
        """By the pod's UID."""
        self._lost_addresses: list[str] = []
        self._numbers = itertools.cycle(range(1, int(network.LAST_POD_IP) - int(network.FIRST_POD_IP) + 1))
        self._tasks = asyncio.TaskGroup()
        self._event_number = itertools.count()
        self._events: asyncio.Queue[tuple[str, Object]] = asyncio.Queue(maxsize=10_000)
        store.on_config_change = self._config_changed

    async def run(self) -> None:
        """Until cancelled. A bug in a worker ends everything, loudly, rather than leaving one pod stuck."""
        async with self._tasks as tasks:
            tasks.create_task(self._store.run())
            await self._store.synced()
            for node in self._nodes.values():
                await node.register()
                tasks.create_task(node.run())
            tasks.create_task(self._pods.run())
            tasks.create_task(self._send_events())
            tasks.create_task(self._correct())

    # --- for the server

    def find(self, namespace: str, name: str) -> PodWorker | None:
        for running in self._running.values():
            metadata = running.worker.pod["metadata"]
            if (metadata["namespace"], metadata["name"]) == (namespace, name):
                return running.worker
        return None

    def container(self, namespace: str, pod: str, name: str) -> Container | None:
        worker = self.find(namespace, pod)
        return None if worker is None else worker.container(name)

    async def fail_node(self, name: str) -> None:
        """As if its power were cut: its processes end, its lease runs out, nobody is told."""
        self._nodes[name].online.clear()
        for uid, running in list(self._running.items()):
            if running.node == name:
                await running.worker.lose_power()
                self._lost_addresses.append(running.worker.facts.pod_ip)
                running.task.cancel()
                await asyncio.gather(running.task, return_exceptions=True)
                self._running.pop(uid, None)

    async def recover_node(self, name: str) -> None:
        """Pods that are still bound to it start anew."""
        await network.forget(self._lost_addresses)
        self._lost_addresses.clear()
        self._nodes[name].online.set()
        for pod in list(self._pods.items.values()):
            if pod["spec"]["nodeName"] == name:
                self._pod_changed("MODIFIED", pod)

    def has_node(self, name: str) -> bool:
        return name in self._nodes

    # --- pods

    def _pod_changed(self, change: Change, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        node = self._nodes.get(pod["spec"]["nodeName"])
        running = self._running.get(uid)
        if running is not None:
            running.worker.update(pod)
            if change == "DELETED":
                running.worker.gone()
        elif change != "DELETED" and node is not None and node.online.is_set() and not _finished(pod):
            self._start(pod, node.name)

    def _start(self, pod: Object, node: str) -> None:
        number = next(self._numbers)
        address = str(network.FIRST_POD_IP + number)
        worker = PodWorker(pod, self._config, self._api, self._store, number, address, self._record)
        worker.update(pod)
        uid = pod["metadata"]["uid"]
        task = self._tasks.create_task(worker.run(), name=pod["metadata"]["name"])
        self._running[uid] = Running(worker, task, node)
        task.add_done_callback(lambda _: self._running.pop(uid, None))

    async def _correct(self) -> None:
        """The node controller calls pods of a node it holds to be lost not ready; nobody but us can take that back."""
        while True:
            await asyncio.sleep(CORRECT_EVERY_S)
            for running in self._running.values():
                running.worker.correct()

    def _config_changed(self) -> None:
        for running in self._running.values():
            running.worker.config_changed()

    # --- events

    def _record(self, pod: Object, kind: str, reason: str, message: str) -> None:
        metadata = pod["metadata"]
        name = f"{metadata['name'][:200]}.{next(self._event_number):x}.{metadata['uid'][:8]}"
        event = {
            "metadata": {"name": name, "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
            },
            "type": kind,
            "reason": reason,
            "message": message[:1000],
            "source": {"component": COMPONENT, "host": pod["spec"]["nodeName"]},
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "count": 1,
        }
        try:
            self._events.put_nowait((f"/api/v1/namespaces/{metadata['namespace']}/events", event))
        except asyncio.QueueFull:
            log.warning("event dropped: %s", message)

    async def _send_events(self) -> None:
        while True:
            path, event = await self._events.get()
            try:
                await self._api.create(path, event)
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                log.info("event not recorded: %s", error)  # Its namespace may be on its way out.


def _finished(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed") and "deletionTimestamp" not in pod["metadata"]
