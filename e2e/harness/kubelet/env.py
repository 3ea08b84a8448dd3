"""A container's environment, in the order in which later entries win: image, Service links, envFrom, env.

Service links are the `NAME_SERVICE_HOST` and `NAME_PORT` variables of every Service in the namespace, which a real
kubelet adds unless `enableServiceLinks` is false; they are reproduced because they break programs whose own settings
have such names (a Service called `vllm` sets `VLLM_PORT`).
"""

from __future__ import annotations

from base64 import b64decode
from dataclasses import dataclass
from typing import Protocol

from harness.kubelet.api import Object
from harness.kubelet.images import expand
from harness.kubelet.store import MissingReferenceError


class ConfigSource(Protocol):
    """Where ConfigMaps and Secrets are looked up; `Store` is one."""

    def config_map(self, namespace: str, name: str) -> Object: ...
    def secret(self, namespace: str, name: str) -> Object: ...


@dataclass(frozen=True)
class PodFacts:
    """What the downward API tells beside the pod object itself."""

    pod_ip: str
    host_ip: str


def container_env(
    pod: Object,
    container: Object,
    base: dict[str, str],
    services: list[Object],
    source: ConfigSource,
    facts: PodFacts,
) -> dict[str, str]:
    """Raises MissingReferenceError where something referred to, and not optional, is not there."""
    namespace = pod["metadata"]["namespace"]
    environment = {**base, **service_links(services)}
    for entry in container.get("envFrom") or []:
        environment |= _from_source(entry, namespace, source)
    for entry in container.get("env") or []:
        value = _value(entry, pod, container, source, facts, environment)
        if value is not None:
            environment[entry["name"]] = value
    return environment


def service_links(services: list[Object]) -> dict[str, str]:
    links: dict[str, str] = {}
    for service in services:
        address = service["spec"].get("clusterIP")
        if not address or address == "None":
            continue
        prefix = service["metadata"]["name"].upper().replace("-", "_")
        ports = service["spec"]["ports"]
        links[f"{prefix}_SERVICE_HOST"] = address
        links[f"{prefix}_SERVICE_PORT"] = str(ports[0]["port"])
        links[f"{prefix}_PORT"] = f"tcp://{address}:{ports[0]['port']}"
        for port in ports:
            if "name" in port:
                links[f"{prefix}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
    return links


def config_data(item: Object) -> dict[str, bytes]:
    """The contents of a ConfigMap or Secret."""
    if "type" in item:  # Only a Secret has one; objects out of a list do not name their kind.
        return {key: b64decode(value) for key, value in (item.get("data") or {}).items()}
    text = {key: value.encode() for key, value in (item.get("data") or {}).items()}
    return text | {key: b64decode(value) for key, value in (item.get("binaryData") or {}).items()}


def field_value(pod: Object, path: str, facts: PodFacts) -> str:
    """A field of the downward API."""
    metadata, spec = pod["metadata"], pod["spec"]
    for prefix in ("labels", "annotations"):
        if path.startswith(f"metadata.{prefix}['") and path.endswith("']"):
            return str(metadata.get(prefix, {}).get(path[len(f"metadata.{prefix}['") : -2], ""))
        if path == f"metadata.{prefix}":
            return "\n".join(f'{key}="{value}"' for key, value in sorted(metadata.get(prefix, {}).items()))
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.podIP": facts.pod_ip,
        "status.podIPs": facts.pod_ip,
        "status.hostIP": facts.host_ip,
        "status.hostIPs": facts.host_ip,
    }
    if path not in fields:
        raise MissingReferenceError(f"fieldPath {path} is not one the downward API has")
    return str(fields[path])


def _from_source(entry: Object, namespace: str, source: ConfigSource) -> dict[str, str]:
    reference = entry.get("configMapRef") or entry["secretRef"]
    look_up = source.config_map if "configMapRef" in entry else source.secret
    try:
        item = look_up(namespace, reference["name"])
    except MissingReferenceError:
        if reference.get("optional"):
            return {}
        raise
    return {entry.get("prefix", "") + key: value.decode() for key, value in config_data(item).items()}


def _value(
    entry: Object, pod: Object, container: Object, source: ConfigSource, facts: PodFacts, so_far: dict[str, str]
) -> str | None:
    origin = entry.get("valueFrom")
    if not origin:
        return expand(entry.get("value", ""), so_far)
    if "fieldRef" in origin:
        return field_value(pod, origin["fieldRef"]["fieldPath"], facts)
    if "resourceFieldRef" in origin:
        return resource_value(container, origin["resourceFieldRef"])
    return _key_value(origin, pod["metadata"]["namespace"], source)


def resource_value(container: Object, reference: Object) -> str:
    """A container's own request or limit, as it is written."""
    where, name = reference["resource"].split(".", 1)
    value = (container.get("resources", {}).get(where) or {}).get(name)
    return "0" if value is None else str(value)


def _key_value(origin: Object, namespace: str, source: ConfigSource) -> str | None:
    reference = origin.get("configMapKeyRef") or origin["secretKeyRef"]
    look_up = source.config_map if "configMapKeyRef" in origin else source.secret
    try:
        data = config_data(look_up(namespace, reference["name"]))
        if reference["key"] not in data:
            raise MissingReferenceError(f'{reference["name"]} has no key "{reference["key"]}"')
    except MissingReferenceError:
        if reference.get("optional"):
            return None
        raise
    return data[reference["key"]].decode()
