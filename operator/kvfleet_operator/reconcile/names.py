"""What things are called: children's names, labels, selectors, owner references.

Names are derived from the owner's name alone, so that children are found again without remembering anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from kvfleet_api import API_VERSION
from kvfleet_api.common import Resource
from kvfleet_api.compile import lws_name, workers_service_name

MANAGER: Final = "kvfleet-operator"
"""Field manager of everything the operator applies, and the value of `app.kubernetes.io/managed-by`."""
SCALER: Final = "kvfleet-autoscaler"
"""Field manager of `replicas` where a pool is autoscaled."""

COMPONENT: Final = "app.kubernetes.io/component"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
POOL: Final = "kvfleet.io/pool"
ROUTER: Final = "kvfleet.io/router"
MODEL: Final = "kvfleet.io/model"
PROFILE: Final = "kvfleet.io/accelerator-profile"
ROLE: Final = "kvfleet.io/role"
LORA: Final = "kvfleet.io/lora"
"""Label of workers that can load LoRA adapters."""
HASH: Final = "kvfleet.io/applied-hash"
"""Annotation: digest of the object as last applied. It tells a wanted change from what others did."""
REVISION: Final = "kvfleet.io/config-revision"

ENGINE: Final = "engine"
FOLLOWER: Final = "engine-follower"
ROUTER_COMPONENT: Final = "router"

MAX_NAME: Final = 63


def bounded(name: str, suffix: str = "") -> str:
    """`name` + `suffix`, cut to 63 characters with a digest in the cut name so that it stays unique."""
    if len(name) + len(suffix) <= MAX_NAME:
        return name + suffix
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - len(suffix) - 9]}-{digest}{suffix}"


def label_value(text: str) -> str:
    """`text` as a label value; what had to be changed gets a digest so that different texts stay different."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    if clean == text and len(text) <= MAX_NAME:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{clean[: MAX_NAME - 9].rstrip('-._')}-{digest}".lstrip("-")


def pool_workload(pool: str, *, multi_node: bool) -> str:
    """Name of a pool's Deployment or LeaderWorkerSet. They differ: a LeaderWorkerSet makes a Service of its own name."""
    return lws_name(pool) if multi_node else workers_service_name(pool)


def pool_selector(pool: str) -> dict[str, str]:
    """Labels of the pods that serve HTTP: every worker, or the leaders of a multi-node pool."""
    return {COMPONENT: ENGINE, POOL: label_value(pool)}


def router_selector(router: str) -> dict[str, str]:
    return {COMPONENT: ROUTER_COMPONENT, ROUTER: label_value(router)}


def selector_text(labels: Mapping[str, str]) -> str:
    """As a label selector is written in a query or in `status.selector`."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def common_labels(application: str, instance: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": application,
        "app.kubernetes.io/instance": label_value(instance),
        "app.kubernetes.io/part-of": "kvfleet",
        MANAGED_BY: MANAGER,
    }


def owner_references(owner: Resource) -> list[dict[str, Any]]:
    """The owner as controller; empty for an object that no API server has seen (`render`)."""
    if owner.metadata.uid is None:
        return []
    return [
        {
            "apiVersion": API_VERSION,
            "kind": owner.kind,
            "name": owner.metadata.name,
            "uid": owner.metadata.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def controller_of(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The owner reference with `controller: true`, if any."""
    references = manifest.get("metadata", {}).get("ownerReferences") or []
    return next((reference for reference in references if reference.get("controller")), None)


def is_owned(manifest: Mapping[str, Any], owner_uid: str | None) -> bool:
    controller = controller_of(manifest)
    return controller is not None and owner_uid is not None and controller.get("uid") == owner_uid


def child(
    owner: Resource, api_version: str, kind: str, name: str, labels: Mapping[str, str], body: Mapping[str, Any],
    *, annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A child of `owner` with metadata as every child has it; `body` is what follows `metadata`."""
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": owner.metadata.namespace or "default",
        "labels": dict(labels),
        "annotations": dict(annotations or {}),
    }
    references = owner_references(owner)
    if references:
        metadata["ownerReferences"] = references
    manifest = {"apiVersion": api_version, "kind": kind, "metadata": metadata, **body}
    metadata["annotations"][HASH] = digest(manifest)
    return manifest


def digest(manifest: Mapping[str, Any]) -> str:
    """16 hex digits of the object without `spec.replicas`, which a scaler may own."""
    spec = manifest.get("spec")
    if isinstance(spec, Mapping) and "replicas" in spec:
        manifest = {**manifest, "spec": {key: value for key, value in spec.items() if key != "replicas"}}
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
