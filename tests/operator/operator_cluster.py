"""An API server for tests of the operator, on kmock: real HTTP, with the semantics the operator relies on.

kmock brings the server, discovery, the request log and scripted failures (`cluster["patch /..."] << 500`). `Cluster` adds
state: resource versions, generations, server-side apply with field ownership, the status subresource, preconditions,
label selectors, watches from a resource version on, and the garbage collector.
"""

import asyncio
import copy
import json
import re
import uuid

import attrs
import kmock

from kvfleet_operator.resources import BY_KIND

EXTRA = {
    "v1/namespaces": ("Namespace", False),
    "apiextensions.k8s.io/v1/customresourcedefinitions": ("CustomResourceDefinition", False),
}
BY_PLURAL = {(resource.group, resource.plural): resource for resource in BY_KIND.values()}
MERGED_LISTS = {"containers": "name", "env": "name", "volumes": "name", "ports": "port", "volumeMounts": "mountPath"}
MERGED_LISTS |= {"ownerReferences": "uid"}


@attrs.define(kw_only=True, eq=False)
class Cluster(kmock.KubernetesScaffold):
    """The stateful part. Everything is keyed by kind, namespace and name."""

    stored: dict = attrs.field(factory=dict)
    log: list = attrs.field(factory=list)
    applied: dict = attrs.field(factory=dict)
    latest: int = 0
    writes: list = attrs.field(factory=list)
    normalise: object = None
    """Called with every object before it is stored, as a mutating webhook would be."""
    silent: set = attrs.field(factory=set)
    """Kinds whose watches stay open and deliver nothing."""
    _grown: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)

    def __attrs_post_init__(self):
        super().__attrs_post_init__()
        for resource in BY_KIND.values():
            self.serve(resource.group, resource.version, resource.plural, resource.kind, resource.namespaced)
        for path, (kind, namespaced) in EXTRA.items():
            *group, version, plural = path.split("/")
            self.serve("".join(group), version, plural, kind, namespaced)
        self.fallback[kmock.action.LIST] << self._list
        self.fallback[kmock.action.WATCH] << self._watch
        self.fallback[kmock.action.FETCH] << self._fetch
        self.fallback[kmock.action.CREATE] << self._create
        self.fallback[kmock.action.UPDATE] << self._patch
        self.fallback[kmock.action.DELETE] << self._delete
        self.fallback[kmock.method.PUT] << self._replace

    def serve(self, group, version, plural, kind, namespaced):
        self.resources[kmock.resource(group, version, plural)] = {
            "kind": kind, "namespaced": namespaced, "singular": kind.lower(), "shortnames": [], "categories": [],
            "subresources": ["status"], "verbs": ["get", "list", "watch", "create", "patch", "update", "delete"],
        }  # fmt: skip

    # For tests

    def get(self, kind, name, namespace="default"):
        return self.stored.get((kind, None if kind == "AcceleratorProfile" else namespace, name))

    def all(self, kind):
        return [found for key, found in self.stored.items() if key[0] == kind]

    def put(self, manifest):
        """What somebody else writes: create or replace, without field ownership."""
        manifest = copy.deepcopy(manifest)
        metadata = manifest["metadata"]
        if manifest["kind"] != "AcceleratorProfile":
            metadata.setdefault("namespace", "default")
        key = (manifest["kind"], metadata.get("namespace"), metadata["name"])
        stored = self._store(key, manifest)
        for owner, stated in self.applied.items():
            if owner[0] == stored["metadata"]["uid"]:
                self.applied[owner] = _still_owned(stated, stored)
        return stored

    def edit(self, kind, name, change, namespace="default"):
        """Let somebody else change a stored object: `change(object)`."""
        found = copy.deepcopy(self.get(kind, name, namespace))
        change(found)
        return self.put(found)

    def remove(self, kind, name, namespace="default"):
        key = (kind, None if kind == "AcceleratorProfile" else namespace, name)
        gone = self.stored.pop(key)
        self._record("DELETED", gone)
        self.collect(gone["metadata"]["uid"])

    def collect(self, uid):
        """The garbage collector: whatever `uid` controlled goes with it."""
        for key, found in list(self.stored.items()):
            if any(reference["uid"] == uid for reference in found["metadata"].get("ownerReferences", [])):
                self.remove(key[0], key[2], key[1])

    def roll_out(self, name, kind="Deployment", namespace="default", ready=None):
        """Let the workload's controller report success."""

        def change(found):
            wanted = found["spec"].get("replicas", 1)
            ready_count = wanted if ready is None else ready
            found["status"] = {
                "observedGeneration": found["metadata"]["generation"], "replicas": wanted,
                "updatedReplicas": wanted, "readyReplicas": ready_count, "availableReplicas": ready_count,
            }  # fmt: skip

        return self.edit(kind, name, change, namespace)

    def conditions(self, kind, name, namespace="default"):
        found = self.get(kind, name, namespace) or {}
        return {c["type"]: c for c in found.get("status", {}).get("conditions", [])}

    async def until(self, check, timeout_s=30.0):
        """Wait until `check()` is true of the stored objects; it is evaluated after every change."""
        async with asyncio.timeout(timeout_s):
            while not (result := check()):
                await self._grown.wait()
            return result

    # Storage

    def _store(self, key, manifest, verb="put"):
        before = self.stored.get(key)
        names = [port.get("name") for port in manifest.get("spec", {}).get("ports") or []]
        if manifest["kind"] == "Service" and len(set(names)) != len(names):
            raise kmock.KubernetesError(status=422, reason="Invalid", message="spec.ports[1].name: Duplicate value")
        if self.normalise:
            self.normalise(manifest)
        metadata = manifest["metadata"]
        metadata.setdefault("uid", before["metadata"]["uid"] if before else str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        metadata["generation"] = (
            before["metadata"]["generation"] + (self._essence(manifest) != self._essence(before)) if before else 1
        )
        if before is not None and self._stable(before) == self._stable(manifest):
            return before  # as etcd: writing the same is no write
        self.latest += 1
        metadata["resourceVersion"] = str(self.latest)
        self.stored[key] = manifest
        self._record("MODIFIED" if before else "ADDED", manifest, before)
        return manifest

    @staticmethod
    def _essence(manifest):
        return {key: value for key, value in manifest.items() if key not in ("metadata", "status")}

    @staticmethod
    def _stable(manifest):
        metadata = {key: value for key, value in manifest["metadata"].items() if key != "resourceVersion"}
        return {**manifest, "metadata": metadata}

    def _record(self, type_, manifest, before=None):
        if type_ == "DELETED":
            self.latest += 1
            manifest = {**manifest, "metadata": {**manifest["metadata"], "resourceVersion": str(self.latest)}}
        self.log.append((self.latest, type_, copy.deepcopy(manifest), before))
        self._grown.set()  # wakes everybody who waits; the next ones wait for the next change
        self._grown = asyncio.Event()

    # HTTP

    @staticmethod
    def _where(request):
        resource = BY_PLURAL.get((request.resource.group, request.resource.plural))
        kind = resource.kind if resource else request.resource.plural
        return kind, request.namespace, request.name

    def _known(self, request):
        if request.resource not in self.resources:
            raise kmock.KubernetesResourceNotFoundError()

    @staticmethod
    def _selected(manifest, selector):
        labels = (manifest or {}).get("metadata", {}).get("labels") or {}
        return manifest is not None and all(
            labels.get(part.partition("=")[0]) == part.partition("=")[2] for part in filter(None, selector.split(","))
        )

    def _matching(self, request):
        kind, namespace, _ = self._where(request)
        selector = request.params.get("labelSelector", "")
        return [
            found for key, found in self.stored.items()
            if key[0] == kind and (namespace is None or key[1] == namespace) and self._selected(found, selector)
        ]  # fmt: skip

    async def _list(self, request):
        self._known(request)
        found = self._matching(request)
        limit, offset = int(request.params.get("limit", 0)), int(request.params.get("continue", 0))
        page = found[offset : offset + limit] if limit else found
        rest = str(offset + limit) if limit and offset + limit < len(found) else ""
        items = [{key: value for key, value in item.items() if key not in ("kind", "apiVersion")} for item in page]
        return {"metadata": {"resourceVersion": str(self.latest), "continue": rest}, "items": items}

    async def _watch(self, request):
        yield b""  # send the headers
        kind, namespace, _ = self._where(request)
        selector = request.params.get("labelSelector", "")
        position = next(
            (i for i, e in enumerate(self.log) if e[0] > int(request.params.get("resourceVersion", 0))), len(self.log)
        )
        while True:
            while position >= len(self.log):
                await self._grown.wait()
            _, type_, manifest, before = self.log[position]
            position += 1
            if manifest["kind"] != kind or kind in self.silent:
                continue
            if namespace is not None and manifest["metadata"].get("namespace") != namespace:
                continue
            was, now = self._selected(before, selector), self._selected(manifest, selector)
            if now or was:
                yield {"type": type_ if now else "DELETED", "object": manifest}

    async def _fetch(self, request):
        self._known(request)
        return self._existing(request)

    def _existing(self, request):
        found = self.stored.get(self._where(request))
        if found is None:
            raise kmock.KubernetesObjectNotFoundError()
        return found

    @staticmethod
    def _conflict(message):
        return kmock.KubernetesError(status=409, reason="Conflict", message=message)

    async def _create(self, request):
        self._known(request)
        self._written("create", request)
        manifest = copy.deepcopy(request.data)
        metadata = manifest["metadata"]
        if "generateName" in metadata:
            if not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?-?", metadata["generateName"]):
                raise kmock.KubernetesError(status=422, reason="Invalid", message="metadata.generateName")
            metadata["name"] = f"{metadata['generateName']}{self.latest}"
        key = (self._where(request)[0], request.namespace, metadata["name"])
        if key in self.stored:
            raise kmock.KubernetesError(status=409, reason="AlreadyExists", message="exists")
        return self._store(key, manifest)

    async def _replace(self, request):
        self._written("update", request)
        before, manifest = self._existing(request), copy.deepcopy(request.data)
        if (
            manifest["metadata"].get("resourceVersion", before["metadata"]["resourceVersion"])
            != before["metadata"]["resourceVersion"]
        ):
            raise self._conflict("the object has been modified")
        return self._store(self._where(request), manifest)

    async def _patch(self, request):
        self._known(request)
        self._written("patch", request)
        if "apply-patch" in request.headers["Content-Type"]:
            return self._apply(request)
        before, patch = self._existing(request), request.data
        version = patch.get("metadata", {}).get("resourceVersion")
        if version not in (None, before["metadata"]["resourceVersion"]):
            raise self._conflict("the object has been modified")
        if patch.get("metadata", {}).get("uid") not in (None, before["metadata"]["uid"]):
            raise self._conflict("uid mismatch")
        manifest = copy.deepcopy(before)
        if request.subresource == "status":
            manifest["status"] = self._merge(manifest.get("status", {}), patch["status"])
            return self._store(self._where(request), manifest)
        manifest = self._merge(manifest, patch)
        if "replicas" in patch.get("spec", {}):
            fields = {"f:spec": {"f:replicas": {}}}
            entry = {"manager": request.params["fieldManager"], "operation": "Update", "fieldsV1": fields}
            others = [e for e in manifest["metadata"].get("managedFields", []) if e["manager"] != entry["manager"]]
            manifest["metadata"]["managedFields"] = [*others, entry]
        return self.put(manifest)

    def _merge(self, base, patch):
        merged = dict(base)
        for key, value in patch.items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = self._merge(merged.get(key) or {}, value) if isinstance(value, dict) else value
        return merged

    def _apply(self, request):
        """Server-side apply: what the manager stated before and states no longer goes; the rest is merged."""
        key, wanted = self._where(request), json.loads(request.body)
        manager, force = request.params["fieldManager"], request.params.get("force") == "true"
        before = self.stored.get(key)
        uid = wanted["metadata"].get("uid")
        if uid and (before is None or before["metadata"]["uid"] != uid):
            raise self._conflict("uid mismatch")
        if before is not None and not force:
            raise self._conflict("conflict with another manager")
        if wanted["metadata"].get("resourceVersion") not in (None, before and before["metadata"]["resourceVersion"]):
            raise self._conflict("the object has been modified")
        manifest = copy.deepcopy(before) if before else {}
        owner = before["metadata"]["uid"] if before else None
        stated = self.applied.get((owner, manager), {})
        manifest = _applied(manifest, stated, wanted)
        if "spec" in manifest and manifest["kind"] == "Deployment":
            manifest["spec"].setdefault("replicas", 1)
        entries = [e for e in manifest["metadata"].get("managedFields", []) if e["manager"] != manager]
        fields = {"f:spec": {"f:replicas": {}}} if "replicas" in wanted.get("spec", {}) else {}
        manifest["metadata"]["managedFields"] = [
            *entries,
            {"manager": manager, "operation": "Apply", "fieldsV1": fields},
        ]
        result = self._store(key, manifest)
        self.applied[result["metadata"]["uid"], manager] = wanted
        return result

    async def _delete(self, request):
        self._written("delete", request)
        found = self._existing(request)
        uid = (request.data or {}).get("preconditions", {}).get("uid")
        if uid not in (None, found["metadata"]["uid"]):
            raise self._conflict("uid mismatch")
        kind, namespace, name = self._where(request)
        self.remove(kind, name, namespace)
        return {"kind": "Status", "status": "Success"}

    def _written(self, verb, request):
        plural = request.resource.plural + (f"/{request.subresource}" if request.subresource else "")
        self.writes.append((verb, plural, request.name))


def _applied(live, stated, wanted):
    """`wanted` merged over `live`, without what `stated` had and `wanted` has not."""
    merged = {key: value for key, value in live.items() if key in wanted or key not in stated}
    for key, value in wanted.items():
        old, said = live.get(key), stated.get(key)
        if isinstance(value, dict):
            merged[key] = _applied(old or {}, said if isinstance(said, dict) else {}, value)
        elif isinstance(value, list) and key in MERGED_LISTS:
            by = "containerPort" if value and "containerPort" in value[0] else MERGED_LISTS[key]
            olds, saids = ({item.get(by): item for item in items or []} for items in (old, said))
            kept = [item for name, item in olds.items() if name not in saids and name not in {v.get(by) for v in value}]
            merged[key] = [_applied(olds.get(v.get(by), {}), saids.get(v.get(by), {}), v) for v in value] + kept
        else:
            merged[key] = value
    return merged


def _still_owned(stated, live):
    """Without the fields that somebody else has given another value: those are his now."""
    kept = {}
    for key, value in stated.items():
        now = live.get(key)
        if isinstance(value, dict) and isinstance(now, dict):
            kept[key] = _still_owned(value, now)
        elif now == value or isinstance(value, list):
            kept[key] = value
    return kept
