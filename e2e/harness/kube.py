"""The Kubernetes API as tests use it: objects are plain dictionaries, a kind is named by its name.

`"Deployment"`, or with its group and version where that is not enough: `"events.k8s.io/v1/Event"`. Waiting is polling
with a deadline: unlike a watch it cannot miss what happened before it began, and it needs no repair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import NotFoundError, ResourceNotFoundError

Object = dict[str, Any]
T = TypeVar("T")

FIELD_MANAGER = "e2e"
POLL_EVERY_S = 0.1


class Timeout(AssertionError):
    """What was waited for did not come about; the message says how things stood at the end."""


class Kube:
    """One namespace of a cluster."""

    def __init__(self, kubeconfig: Path, namespace: str, cache: Path) -> None:
        self.namespace = namespace
        self._api: Any = config.new_client_from_config(str(kubeconfig))  # type: ignore[no-untyped-call]
        self._client: Any = DynamicClient(self._api, cache_file=str(cache))  # type: ignore[no-untyped-call]
        self._core = client.CoreV1Api(self._api)

    def close(self) -> None:
        self._api.close()

    # --- objects

    def find(self, kind: str, name: str) -> Object | None:
        try:
            answer = self._resource(kind).get(name=name, **self._where(kind))
        except (NotFoundError, ResourceNotFoundError):
            return None
        found: Object = answer.to_dict()
        return found

    def get(self, kind: str, name: str) -> Object:
        found = self.find(kind, name)
        if found is None:
            raise AssertionError(f"there is no {kind} {name} in namespace {self.namespace}")
        return found

    def list(self, kind: str, selector: str = "") -> list[Object]:
        answer = self._resource(kind).get(label_selector=selector, **self._where(kind))
        items: list[Object] = answer.to_dict()["items"]
        return items

    def apply(self, manifest: Mapping[str, Any]) -> Object:
        """Server-side apply."""
        kind = f"{manifest['apiVersion']}/{manifest['kind']}"
        answer = self._resource(kind).server_side_apply(
            body=dict(manifest),
            name=manifest["metadata"]["name"],
            field_manager=FIELD_MANAGER,
            force_conflicts=True,
            **self._where(kind),
        )
        applied: Object = answer.to_dict()
        return applied

    def create_dry(self, manifest: Mapping[str, Any]) -> None:
        """Everything creating it would check, as kubectl asks for it (unknown fields are errors); nothing is kept."""
        kind = f"{manifest['apiVersion']}/{manifest['kind']}"
        strict = [("dryRun", "All"), ("fieldValidation", "Strict")]
        self._resource(kind).create(body=dict(manifest), query_params=strict, **self._where(kind))

    def patch(self, kind: str, name: str, patch: Mapping[str, Any], subresource: str = "") -> Object:
        """A JSON merge patch; the object as it is then."""
        resource = self._resource(kind)
        target = getattr(resource, subresource) if subresource else resource
        answer = target.patch(
            name=name, body=dict(patch), content_type="application/merge-patch+json", **self._where(kind)
        )
        patched: Object = answer.to_dict()
        return patched

    def delete(self, kind: str, name: str, grace_s: int | None = None) -> None:
        body: Object = {"propagationPolicy": "Background"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        self._resource(kind).delete(name=name, body=body, **self._where(kind))

    def delete_if_there(self, kind: str, name: str, grace_s: int | None = None) -> None:
        try:
            self.delete(kind, name, grace_s)
        except NotFoundError:
            pass

    def evict(self, pod: str) -> int:
        """Asks for an eviction, which budgets may refuse: the HTTP status, 201 or 429."""
        body = client.V1Eviction(metadata=client.V1ObjectMeta(name=pod, namespace=self.namespace))
        try:
            self._core.create_namespaced_pod_eviction(pod, self.namespace, body)
        except ApiException as error:
            return int(error.status)
        return 201

    def logs(self, pod: str, container: str | None = None, previous: bool = False) -> str:
        return str(self._core.read_namespaced_pod_log(pod, self.namespace, container=container, previous=previous))

    # --- waiting

    def wait(
        self,
        kind: str,
        name: str,
        what: str,
        holds: Callable[[Object], object],
        within_s: float,
    ) -> Object:
        """The object as soon as `holds` says so of it."""

        def look() -> Object | None:
            found = self.find(kind, name)
            return found if found is not None and holds(found) else None

        def now() -> str:
            found = self.find(kind, name)
            return "it does not exist" if found is None else f"its status: {found.get('status')}"

        return wait_until(look, f"{kind} {name} {what}", within_s, now)

    def wait_gone(self, kind: str, name: str, within_s: float) -> None:
        def now() -> str:
            return str((self.find(kind, name) or {}).get("status"))

        wait_until(lambda: self.find(kind, name) is None, f"{kind} {name} is gone", within_s, now)

    def _resource(self, kind: str) -> Any:
        version, _, name = kind.rpartition("/")
        if version:
            return self._client.resources.get(api_version=version, kind=name)
        return self._client.resources.get(kind=name)

    def _where(self, kind: str) -> dict[str, str]:
        return {"namespace": self.namespace} if self._resource(kind).namespaced else {}


def wait_until(look: Callable[[], T | None], what: str, within_s: float, now: Callable[[], str] = lambda: "") -> T:
    """Polls until `look` returns something that counts as true; `now` describes the state where it never does."""
    deadline = time.monotonic() + within_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Timeout(f"not within {within_s:g} s: {what}; {now()}")
        time.sleep(POLL_EVERY_S)
