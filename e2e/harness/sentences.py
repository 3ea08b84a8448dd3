"""What tests are written in: given a state, when something is done, then something comes about.

    given.applied(deployment)
    when.scaled("Deployment", "web", to=3)
    then.ready("Deployment", "web").counts("Pod", 3, selector="app=web")

Each sentence is told as it is done, with the time it took, so that a failing test's output reads as its story. `then`
waits, each time for at most `within_s`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from harness.cluster import Cluster
from harness.kube import Kube, Object, wait_until

WITHIN_S = 30.0


@dataclass
class Story:
    """A test's cluster and namespace, and what was done so far."""

    cluster: Cluster
    kube: Kube
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def tells(self, sentence: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        except BaseException:
            self._print(begun, f"{sentence}: FAILED")
            raise
        self._print(begun, sentence)

    def _print(self, begun: float, sentence: str) -> None:
        now = time.monotonic()
        print(f"{now - self.started:7.2f} s  {sentence}  ({now - begun:.2f} s)")

    def url(self, service: str, port: int = 80, path: str = "/") -> str:
        """Where the tests reach a Service of the test's namespace."""
        namespace = self.kube.namespace
        if self.cluster.reaches_pods:
            address = self.kube.get("v1/Service", service)["spec"]["clusterIP"]
            return f"http://{address}:{port}{path}"
        return f"{self.cluster.api_proxy()}/api/v1/namespaces/{namespace}/services/{service}:{port}/proxy{path}"


@dataclass(frozen=True)
class Given:
    story: Story

    def applied(self, *manifests: Mapping[str, Any]) -> Given:
        for manifest in manifests:
            with self.story.tells(f"given {_name(manifest)}"):
                self.story.kube.apply(manifest)
        return self


@dataclass(frozen=True)
class When:
    story: Story

    def applied(self, *manifests: Mapping[str, Any]) -> When:
        for manifest in manifests:
            with self.story.tells(f"when {_name(manifest)} is applied"):
                self.story.kube.apply(manifest)
        return self

    def patched(self, kind: str, name: str, patch: Mapping[str, Any]) -> When:
        with self.story.tells(f"when {kind} {name} is patched with {patch}"):
            self.story.kube.patch(kind, name, patch)
        return self

    def scaled(self, kind: str, name: str, to: int) -> When:
        with self.story.tells(f"when {kind} {name} is scaled to {to}"):
            self.story.kube.patch(kind, name, {"spec": {"replicas": to}}, subresource="scale")
        return self

    def deleted(self, kind: str, name: str, grace_s: int | None = None) -> When:
        with self.story.tells(f"when {kind} {name} is deleted"):
            self.story.kube.delete(kind, name, grace_s)
        return self

    def signalled(self, pod: str, container: str, number: int = 9) -> When:
        """A signal from outside to the container's process 1: SIGKILL is a crash."""
        with self.story.tells(f"when container {container} of pod {pod} gets signal {number}"):
            self.story.cluster.signal_container(self.story.kube.namespace, pod, container, number)
        return self

    def evicted(self, pod: str) -> int:
        """The answer's status: 201, or 429 where a budget forbids it."""
        with self.story.tells(f"when pod {pod} is evicted"):
            return self.story.kube.evict(pod)


@dataclass(frozen=True)
class Then:
    story: Story

    def ready(self, kind: str, name: str, within_s: float = WITHIN_S) -> Then:
        """The controller has seen the latest spec and fulfilled it."""
        return self.is_so(kind, name, "is ready", is_ready, within_s)

    def is_so(
        self, kind: str, name: str, what: str, holds: Callable[[Object], object], within_s: float = WITHIN_S
    ) -> Then:
        with self.story.tells(f"then {kind} {name} {what}"):
            self.story.kube.wait(kind, name, what, holds, within_s)
        return self

    def gone(self, kind: str, name: str, within_s: float = WITHIN_S) -> Then:
        with self.story.tells(f"then {kind} {name} is gone"):
            self.story.kube.wait_gone(kind, name, within_s)
        return self

    def counts(self, kind: str, number: int, selector: str = "", within_s: float = WITHIN_S) -> Then:
        def look() -> bool:
            return len(self.story.kube.list(kind, selector)) == number

        return self.eventually(f"there are {number} {kind} {selector}", look, within_s)

    def eventually(self, what: str, look: Callable[[], object], within_s: float = WITHIN_S) -> Then:
        """Anything else that comes about; `look` may raise until it does."""
        last = ""

        def quiet() -> object:
            nonlocal last
            try:
                return look()
            except Exception as error:
                last = repr(error)
                return None

        with self.story.tells(f"then {what}"):
            wait_until(quiet, what, within_s, lambda: last)
        return self


def is_ready(item: Object) -> bool:
    """Ready in the sense of kstatus: the latest generation is observed and done."""
    status, generation = item.get("status") or {}, item["metadata"].get("generation")
    if status.get("observedGeneration", generation) != generation:
        return False
    if item["kind"] in ("Deployment", "StatefulSet"):
        wanted = item["spec"]["replicas"]
        numbers = [status.get(name, 0) for name in ("replicas", "updatedReplicas", "readyReplicas")]
        return numbers == [wanted] * 3
    return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in status.get("conditions") or [])


def _name(manifest: Mapping[str, Any]) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"
