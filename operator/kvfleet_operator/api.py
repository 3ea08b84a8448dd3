"""The API server over HTTP: a handful of verbs on JSON objects, with one error type.

Transport, kubeconfig, in-cluster tokens, exec plugins and TLS are the official client's (`kubernetes.aio`), which brings
no second HTTP stack: kopf runs on aiohttp as well. Its generated models and its dynamic client are left out: objects
stay dictionaries, and the kinds used are few and known (`resources`), so nothing has to be discovered.

Every write passes `fence` first: it raises once this process may no longer be the leader.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import aiohttp
import kubernetes.aio.config
from kubernetes.aio.client import ApiClient, Configuration

from kvfleet_operator.metrics import Metrics
from kvfleet_operator.reconcile.names import MANAGER
from kvfleet_operator.resources import BY_KIND, ResourceType

Manifest = dict[str, Any]
APPLY: Final = "application/apply-patch+yaml"
MERGE: Final = "application/merge-patch+json"
WRITE_TIMEOUT_S: Final = 4.0
"""Shorter than what a Lease has left when its holder gives up, so that no write outlives the leadership."""
READ_TIMEOUT_S: Final = 30.0
PAGE: Final = 500
VERBS: Final = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
"""As RBAC names them."""
TERMINATING: Final = "NamespaceTerminating"
"""Why an object is refused whose namespace is being deleted: as the API server names it, in errors and as the metric's code."""


kubernetes_config: Any = kubernetes.aio.config
"""Its functions carry no types, though the package says it is typed."""


class ApiError(Exception):
    """The API server refused, or did not answer (status 0)."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message or reason or f"HTTP {status}")
        self.status = status
        self.reason = reason

    @property
    def permanent(self) -> bool:
        """Trying the same again cannot help: the object itself is refused."""
        return self.status in (400, 403, 413, 415, 422)


class NotLeader(Exception):
    """A write was about to happen without a valid Lease."""


async def load_configuration(kubeconfig: str | None = None, context: str | None = None) -> Configuration:
    """Credentials from a kubeconfig file if given or found, else from the pod's service account."""
    configuration = Configuration()
    if kubeconfig is None and context is None:
        try:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        except kubernetes_config.ConfigException:
            await kubernetes_config.load_kube_config(client_configuration=configuration, persist_config=False)
        return configuration
    await kubernetes_config.load_kube_config(
        config_file=kubeconfig, context=context, client_configuration=configuration, persist_config=False
    )
    return configuration


class KubeApi:
    def __init__(
        self,
        configuration: Configuration,
        metrics: Metrics,
        *,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self.configuration = configuration
        self.fence: Callable[[], None] = lambda: None
        self._client: Any = ApiClient(configuration)
        self._metrics = metrics
        self._write_timeout_s = write_timeout_s
        self._read_timeout_s = read_timeout_s

    async def close(self) -> None:
        await self._client.close()

    async def get(self, resource: ResourceType, namespace: str | None, name: str) -> Manifest | None:
        """The object, or None where there is none."""
        try:
            return await self._request("GET", resource, resource.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, resource: ResourceType, namespace: str | None, selector: str | None) -> list[Manifest] | None:
        """All objects of a kind, page by page; None where the cluster does not have the kind."""
        found: list[Manifest] = []
        token = ""
        while True:
            query = {"limit": str(PAGE), "labelSelector": selector, "continue": token}
            try:
                page = await self._request("GET", resource, resource.path(namespace), query=query, verb="list")
            except ApiError as error:
                if error.status == 404 and not token:
                    return None
                if error.status == 410 and token:  # the listing took too long: start again
                    found, token = [], ""
                    continue
                raise
            # Items of a list carry neither apiVersion nor kind.
            about = {"apiVersion": resource.api_version, "kind": resource.kind}
            found += [{**about, **item} for item in page.get("items") or []]
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return found

    async def create(self, resource: ResourceType, manifest: Manifest) -> Manifest:
        path = resource.path(manifest["metadata"].get("namespace"))
        return await self._request("POST", resource, path, body=manifest, query={"fieldManager": MANAGER})

    async def replace(self, resource: ResourceType, manifest: Manifest) -> Manifest:
        """Conditional on `metadata.resourceVersion` where the manifest carries one."""
        metadata = manifest["metadata"]
        path = resource.path(metadata.get("namespace"), metadata["name"])
        return await self._request("PUT", resource, path, body=manifest, query={"fieldManager": MANAGER})

    async def apply(self, manifest: Manifest, *, force: bool, manager: str = MANAGER) -> Manifest:
        """Server-side apply. With `metadata.uid` it only ever changes that very object."""
        resource = BY_KIND[manifest["kind"]]
        metadata = manifest["metadata"]
        path = resource.path(metadata.get("namespace"), metadata["name"])
        query = {"fieldManager": manager, "force": "true" if force else "false"}
        return await self._request("PATCH", resource, path, body=manifest, query=query, content_type=APPLY)

    async def overwrite(self, manifest: Manifest) -> None:
        """Make everything but the metadata of that very object (by uid) what `manifest` says, lists as a whole."""
        resource = BY_KIND[manifest["kind"]]
        metadata = manifest["metadata"]
        body = {key: value for key, value in manifest.items() if key not in ("apiVersion", "kind", "metadata")}
        path = resource.path(metadata.get("namespace"), metadata["name"])
        body["metadata"] = {"uid": metadata["uid"]}
        await self._request("PATCH", resource, path, body=body, query={"fieldManager": MANAGER}, content_type=MERGE)

    async def patch_status(self, resource: ResourceType, live: Manifest, status: Mapping[str, Any]) -> Manifest:
        """Merge `status` into the object's, provided nobody changed the object since `live` was read."""
        metadata = live["metadata"]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": status}
        path = resource.path(metadata.get("namespace"), metadata["name"], "status")
        query = {"fieldManager": MANAGER}
        return await self._request(
            "PATCH", resource, path, body=body, query=query, content_type=MERGE, subresource="status"
        )

    async def scale(self, resource: ResourceType, live: Manifest, replicas: int, *, manager: str) -> Manifest:
        """Set `spec.replicas`, provided nobody changed the object since `live` was read."""
        metadata = live["metadata"]
        path = resource.path(metadata.get("namespace"), metadata["name"])
        guard = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        body = {"metadata": guard, "spec": {"replicas": replicas}}
        return await self._request(
            "PATCH", resource, path, body=body, query={"fieldManager": manager}, content_type=MERGE
        )

    async def annotate(
        self, resource: ResourceType, namespace: str, name: str, annotations: Mapping[str, str | None]
    ) -> None:
        """Set annotations; None removes one. An object that is gone needs none."""
        body = {"metadata": {"annotations": dict(annotations)}}
        path, query = resource.path(namespace, name), {"fieldManager": MANAGER}
        try:
            await self._request("PATCH", resource, path, body=body, query=query, content_type=MERGE)
        except ApiError as error:
            if error.status != 404:
                raise

    async def delete(self, live: Manifest) -> None:
        """Delete that very object (by uid); its pods go with it in the background. Gone already is fine."""
        resource = BY_KIND[live["kind"]]
        metadata = live["metadata"]
        body = {"preconditions": {"uid": metadata["uid"]}, "propagationPolicy": "Background"}
        try:
            path = resource.path(metadata.get("namespace"), metadata["name"])
            await self._request("DELETE", resource, path, body=body)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _request(
        self,
        method: str,
        resource: ResourceType,
        path: str,
        *,
        verb: str = "",
        subresource: str = "",
        query: Mapping[str, str | None] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Manifest:
        timeout_s = self._read_timeout_s
        if method != "GET":
            timeout_s = self._write_timeout_s
            self.fence()
        code, payload = 0, b""
        try:
            pairs = [(key, value) for key, value in (query or {}).items() if value]
            serialized = await self._client.param_serialize(
                method,
                path,
                query_params=pairs,
                header_params={"Accept": "application/json", "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            async with asyncio.timeout(timeout_s):
                response = await self._client.call_api(*serialized, _request_timeout=timeout_s)
                code, payload = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, "Unreachable", f"{method} {path}: {error or type(error).__name__}") from error
        finally:
            what = f"{resource.plural}/{subresource}" if subresource else resource.plural
            document = _parsed(payload)
            told = TERMINATING if code == 403 and _of_a_dying_namespace(document) else str(code)
            self._metrics.api_requests.labels(verb or VERBS[method], what, told).inc()
        return _checked(code, document, payload, f"{method} {path}")


def _parsed(payload: bytes) -> Any:
    try:
        return json.loads(payload) if payload else {}
    except ValueError:
        return {}


def _of_a_dying_namespace(document: Any) -> bool:
    """Creating in a namespace that is being deleted is "forbidden", as if a right were missing; its details say why."""
    details = document.get("details") if isinstance(document, dict) else None
    causes = details.get("causes") if isinstance(details, dict) else None
    return any(isinstance(cause, dict) and cause.get("reason") == TERMINATING for cause in causes or ())


def _checked(code: int, document: Any, payload: bytes, what: str) -> Manifest:
    if 200 <= code <= 299 and isinstance(document, dict):
        return cast(Manifest, document)
    status = document if isinstance(document, dict) else {}
    message = str(status.get("message") or payload[:200].decode(errors="replace"))
    reason = TERMINATING if _of_a_dying_namespace(document) else str(status.get("reason") or "")
    raise ApiError(code, reason, f"{what}: {message}" if message else what)
