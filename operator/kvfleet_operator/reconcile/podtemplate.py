"""A user's partial pod template over the generated one, as Kubernetes' strategic merge does it.

Mappings merge key by key; `null` deletes a key. Lists that Kubernetes merges by a key (containers by `name`, mounts by
`mountPath`, …) merge item by item, new items come last and `$patch: delete` in an item removes it; every other list
(`args`, `command`, `tolerations`) is replaced. A volume or an environment variable replaces its namesake as a whole,
and a probe's or hook's handler the other handlers, since only one of the alternatives may be set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

MERGE_KEYS: Final[Mapping[str, str]] = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "resourceClaims": "name",
}
"""List field → the field that tells its items apart."""
WHOLE_ITEMS: Final = frozenset({"env", "volumes"})
"""Lists whose items hold alternatives (`value` or `valueFrom`): an item replaces its namesake."""
HANDLERS: Final = frozenset({"exec", "httpGet", "tcpSocket", "grpc", "sleep"})
"""Alternatives inside a probe or a lifecycle hook."""
HANDLED: Final = frozenset({"startupProbe", "readinessProbe", "livenessProbe", "preStop", "postStart"})
DIRECTIVE: Final = "$patch"


class TemplateError(ValueError):
    """The partial template does not fit. The message names the field."""


def merge_pod(generated: Mapping[str, Any], patch: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """A whole pod template: `patch` over `generated`, and on top the `labels` that selectors need."""
    merged = merge(generated, patch, "spec.podTemplate")
    if not isinstance(merged.get("metadata"), Mapping) or not isinstance(merged.get("spec"), Mapping):
        raise TemplateError("spec.podTemplate: metadata and spec must stay mappings: do not set them to null")
    return {
        **merged,
        "metadata": {**merged["metadata"], "labels": {**(merged["metadata"].get("labels") or {}), **labels}},
    }


def merge(base: Mapping[str, Any], patch: Mapping[str, Any], path: str = "podTemplate") -> dict[str, Any]:
    """`patch` over `base`; neither is changed. Raises TemplateError where their shapes differ."""
    merged = dict(base)
    for key, value in patch.items():
        merged[key] = _value(merged.get(key), value, key, f"{path}.{key}")
        if merged[key] is None:
            del merged[key]
    return merged


def _value(old: Any, new: Any, key: str, path: str) -> Any:
    if isinstance(new, Mapping):
        if old is not None and not isinstance(old, Mapping):
            raise TemplateError(f"{path}: is a mapping here but must be {_shape(old)}: correct it")
        if key in HANDLED and old is not None and HANDLERS & new.keys():
            old = {name: value for name, value in old.items() if name not in HANDLERS}
        return merge(old or {}, new, path)
    if isinstance(old, Mapping) and new is not None:
        raise TemplateError(f"{path}: must be a mapping; found {_shape(new)}: correct it")
    if isinstance(old, list) and new is not None and not isinstance(new, list):
        raise TemplateError(f"{path}: must be a list; found {_shape(new)}: start each entry with `- `")
    if isinstance(new, list) and key in MERGE_KEYS:
        return _items(old or [], new, key, path)
    return new


def _items(old: list[Any], new: list[Any], key: str, path: str) -> list[Any]:
    by = MERGE_KEYS[key]
    merged: dict[Any, Any] = {item[by]: item for item in old}
    for index, item in enumerate(new):
        where = f"{path}[{index}]"
        if not isinstance(item, Mapping) or not isinstance(item.get(by), str | int):
            raise TemplateError(f"{where}: must be a mapping with `{by}`, by which it is merged: add it")
        name = item[by]
        if item.get(DIRECTIVE) == "delete":
            merged.pop(name, None)
        elif key in WHOLE_ITEMS:
            merged[name] = dict(item)
        else:
            merged[name] = merge(merged.get(name, {}), item, where)
    return list(merged.values())


def _shape(value: Any) -> str:
    return {dict: "a mapping", list: "a list", str: "a string", bool: "true or false"}.get(type(value), "a number")
