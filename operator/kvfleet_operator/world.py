"""The observed world: the latest known state of every watched object, fed by watches, listings and own writes.

Objects are kept by resource version, so that what comes late never overwrites something newer; of removed objects uid and
last version are remembered, so that the answer to a write that a deletion overtook brings nothing back. The fleet of a
namespace is compiled once per change and shared by all that need it: routers, policies and pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import ValidationError

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.common import Resource
from kvfleet_api.compile import CompiledFleet, compile_fleet
from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_api.manifests import KINDS
from kvfleet_api.modelpool import ModelPool
from kvfleet_api.problems import FieldProblem, explain
from kvfleet_api.routingpolicy import RoutingPolicy
from kvfleet_operator.reconcile import energyview, names
from kvfleet_operator.reconcile.adapters import WorkerAdapters
from kvfleet_operator.reconcile.cacheview import CacheView
from kvfleet_operator.reconcile.dependents import Key, key_of
from kvfleet_operator.reconcile.energyview import EnergyView, PoolEnergy
from kvfleet_operator.reconcile.plan import Manifest, kind_name
from kvfleet_operator.reconcile.routingpolicy import Loaded
from kvfleet_operator.resources import pod_address, ready_since

Parsed = Resource | list[FieldProblem]
"""An own object as its model, or what is wrong with it."""
R = TypeVar("R", bound=Resource)

MAX_TOMBSTONES: Final = 10_000
SCALED: Final = frozenset({"Deployment", "LeaderWorkerSet"})
"""Kinds whose managed fields tell who owns `replicas`."""


class WorkerPod(NamedTuple):
    """A ready pod that serves a model."""

    ip: str
    incarnation: str
    """Another one after each restart of its engine."""


class World:
    def __init__(self) -> None:
        self._objects: dict[str, dict[tuple[str | None, str], Manifest]] = {}
        self._parsed: dict[Key, Parsed] = {}
        self._fleets: dict[tuple[str, str | None], CompiledFleet] = {}
        self._gone: dict[str, int] = {}
        self.reports: dict[tuple[str, str], Loaded] = {}
        """(namespace, router pod) → what it says it serves with."""
        self.adapters: dict[tuple[str, str], WorkerAdapters] = {}
        """(namespace, worker) → its adapters, as it was last asked."""
        self._pods: dict[tuple[str | None, str, str], dict[str, Manifest]] = {}
        """(namespace, label, its value) → pods by name."""
        self.on_change: Callable[[Manifest | None, Manifest], None] = lambda before, after: None
        """Called with the state before (None: new) and after of everything that changed."""

    # Reading

    def get(self, key: Key) -> Manifest | None:
        return self._objects.get(key.kind, {}).get((key.namespace, key.name))

    def keys(self, kind: str, namespace: str | None = None) -> list[Key]:
        """Keys of a kind, of one namespace if given."""
        found = self._objects.get(kind, {})
        return [Key(kind, ns, name) for ns, name in found if namespace is None or ns == namespace]

    def pools_of_profile(self, profile: str) -> Iterator[Key]:
        for pool in self._all(ModelPool):
            if pool.spec.accelerator.profile_ref == profile:
                yield Key("ModelPool", pool.metadata.namespace, pool.metadata.name)

    def parsed(self, key: Key) -> Parsed | None:
        """An own object as its model, or its problems; None where it does not exist."""
        manifest = self.get(key)
        if manifest is None:
            return None
        if key not in self._parsed:
            self._parsed[key] = _parse(manifest)
        return self._parsed[key]

    def profile(self, name: str) -> AcceleratorProfile | None:
        found = self.parsed(Key("AcceleratorProfile", None, name))
        return found if isinstance(found, AcceleratorProfile) else None

    def pools(self) -> list[ModelPool]:
        return list(self._all(ModelPool))

    def routers(self, namespace: str) -> list[FleetRouter]:
        found = (router for router in self._all(FleetRouter) if router.metadata.namespace == namespace)
        return sorted(found, key=lambda router: router.metadata.name)

    def fleet(self, namespace: str, router: FleetRouter | None = None) -> CompiledFleet:
        """The compiled fleet of a namespace, for a router or for nobody in particular."""
        key = (namespace, router.metadata.name if router else None)
        if key not in self._fleets:
            pools = [pool for pool in self._all(ModelPool) if pool.metadata.namespace == namespace]
            policies = [policy for policy in self._all(RoutingPolicy) if policy.metadata.namespace == namespace]
            profiles = list(self._all(AcceleratorProfile))
            self._fleets[key] = compile_fleet(router, pools, policies, profiles, namespace=namespace)
        return self._fleets[key]

    def children(self, owner: Resource) -> dict[tuple[str, str], Manifest]:
        """(kind, name) → what `owner` controls, except pods."""
        uid, namespace = owner.metadata.uid, owner.metadata.namespace
        return {
            kind_name(manifest): manifest
            for kind, objects in self._objects.items()
            if kind not in KINDS and kind != "Pod"
            for (where, _name), manifest in objects.items()
            if where == namespace and names.is_owned(manifest, uid)
        }

    def router_pods(self, router: FleetRouter) -> dict[str, str]:
        """Name → IP of a router's ready pods."""
        pods = self._pods_of(names.ROUTER, router)
        return {name: ip for name, pod in pods.items() if (ip := pod_address(pod))}

    def lora_workers(self, pool: ModelPool) -> dict[str, WorkerPod]:
        """A pool's ready workers whose engines can load adapters."""
        return {
            name: WorkerPod(ip, f"{pod['metadata'].get('uid')} {ready_since(pod)}")
            for name, pod in self._workers(pool)
            if names.LORA in pod["metadata"]["labels"] and (ip := pod_address(pod))
        }

    def worker_adapters(self, pool: ModelPool) -> dict[str, WorkerAdapters | None]:
        """Ready worker → what is known of its adapters; None: it was not asked yet."""
        namespace, with_lora = pool.metadata.namespace or "default", self.lora_workers(pool)
        return {
            name: self.adapters.get((namespace, name)) if name in with_lora else WorkerAdapters(lora=False)
            for name, pod in self._workers(pool)
            if pod_address(pod)
        }

    def workers(self, pool: ModelPool) -> list[Manifest]:
        """A pool's pods that serve HTTP, ready or not."""
        return [pod for _, pod in self._workers(pool)]

    def _workers(self, pool: ModelPool) -> Iterator[tuple[str, Manifest]]:
        """Those that serve HTTP."""
        for name, pod in self._pods_of(names.POOL, pool).items():
            if pod["metadata"]["labels"].get(names.COMPONENT) == names.ENGINE:
                yield name, pod

    def _pods_of(self, label: str, owner: Resource) -> dict[str, Manifest]:
        return self._pods.get((owner.metadata.namespace, label, names.label_value(owner.metadata.name)), {})

    def replicas(self, router: FleetRouter) -> dict[str, Loaded | None]:
        """Ready replica → what it reported."""
        namespace = router.metadata.namespace or "default"
        return {pod: self.reports.get((namespace, pod)) for pod in self.router_pods(router)}

    def cache_views(self, pool: ModelPool) -> dict[str, CacheView | None]:
        """Ready replica of the namespace's routers → what it knows the pool's caches by."""
        said: dict[str, CacheView | None] = {}
        for router in self.routers(pool.metadata.namespace or "default"):
            for replica, loaded in self.replicas(router).items():
                said[replica] = loaded.pools.get(pool.metadata.name) if loaded else None
        return said

    def energy_views(self, pool: ModelPool) -> dict[str, EnergyView | None] | None:
        """Ready replica of the routers with telemetry → what it says of the pool's energy; None: there is no such router."""
        routers = [
            router for router in self.routers(pool.metadata.namespace or "default") if router.spec.telemetry is not None
        ]
        if not routers:
            return None
        return {
            replica: loaded.energy.get(pool.metadata.name) if loaded else None
            for router in routers
            for replica, loaded in self.replicas(router).items()
        }

    def pool_energies(self, profile: str) -> list[PoolEnergy]:
        """What routers say of the pools that refer to a profile."""
        found = []
        for pool in self.pools():
            view = energyview.best((self.energy_views(pool) or {}).values())
            if pool.spec.accelerator.profile_ref == profile and view is not None:
                found.append(PoolEnergy(pool.key, pool.spec.model.source, pool.spec.parallelism.tensor, view))
        return found

    def snapshot(self, kind: str) -> dict[Key, Manifest]:
        return {Key(kind, *where): manifest for where, manifest in self._objects.get(kind, {}).items()}

    # Writing

    def put(self, manifest: Manifest) -> bool:
        """Take over a newer state. False where what is known is as new or newer, or the object is known to be gone."""
        if version(manifest) <= self._gone.get(manifest["metadata"].get("uid") or "", -1):
            return False
        key = key_of(manifest)
        before = self.get(key)
        if before is not None and not _newer(manifest, before):
            return False
        kept = _kept(manifest)
        self._objects.setdefault(key.kind, {})[key.namespace, key.name] = kept
        self._index(before, kept)
        self._forget(key, concerns_others=before is None or summary(before) != summary(kept))
        self.on_change(before, kept)
        return True

    def remove(self, manifest: Manifest) -> bool:
        """Forget an object that was deleted; a namesake created since stays."""
        self._bury(manifest)
        key = key_of(manifest)
        before = self.get(key)
        if before is None or before["metadata"].get("uid") != manifest["metadata"].get("uid"):
            return False
        del self._objects[key.kind][key.namespace, key.name]
        self._index(before, None)
        self._forget(key, concerns_others=True)
        if key.kind == "Pod" and key.namespace:
            self.reports.pop((key.namespace, key.name), None)
            self.adapters.pop((key.namespace, key.name), None)
        self.on_change(before, {**manifest, "metadata": {**manifest["metadata"], "deletionTimestamp": "gone"}})
        return True

    def _index(self, before: Manifest | None, after: Manifest | None) -> None:
        """Keep `_pods` in step with a change of one pod."""
        for pod, present in ((before, False), (after, True)):
            if pod is None or pod["kind"] != "Pod":
                continue
            metadata = pod["metadata"]
            for label in {names.ROUTER, names.POOL} & (metadata.get("labels") or {}).keys():
                place = (metadata.get("namespace"), label, metadata["labels"][label])
                if present:
                    self._pods.setdefault(place, {})[metadata["name"]] = pod
                else:
                    self._pods[place].pop(metadata["name"])
                    if not self._pods[place]:
                        del self._pods[place]

    def _bury(self, manifest: Manifest) -> None:
        """Remember that nothing up to this version counts. A later one does: an object that lost our label was not deleted."""
        uid = manifest["metadata"].get("uid")
        if uid is not None:
            self._gone[uid] = version(manifest)
            if len(self._gone) > MAX_TOMBSTONES:
                del self._gone[next(iter(self._gone))]

    def _forget(self, key: Key, *, concerns_others: bool) -> None:
        """Drop what was derived from an object's former state."""
        self._parsed.pop(key, None)
        if not concerns_others:
            return
        if key.kind == "AcceleratorProfile":
            self._fleets.clear()
        elif key.kind in KINDS:
            self._fleets = {where: fleet for where, fleet in self._fleets.items() if where[0] != key.namespace}

    def _all(self, model: type[R]) -> Iterator[R]:
        for key in self.keys(model.__name__):
            parsed = self.parsed(key)
            if isinstance(parsed, model) and not parsed.metadata.deletion_timestamp:
                yield parsed


def version(manifest: Manifest) -> int:
    """The resource version as a number; they grow with every write to a kind."""
    text = str(manifest["metadata"].get("resourceVersion") or "")
    return int(text) if text.isdecimal() else 0


def _newer(manifest: Manifest, known: Manifest) -> bool:
    return version(manifest) > version(known) or version(manifest) == 0


def _kept(manifest: Manifest) -> Manifest:
    """What is worth its memory: no managed fields but a workload's; of a pod, who and where it is and whether ready."""
    metadata = manifest["metadata"]
    if manifest["kind"] in SCALED:
        return manifest
    slim = {**manifest, "metadata": {key: value for key, value in metadata.items() if key != "managedFields"}}
    if manifest["kind"] == "Pod":
        status = manifest.get("status") or {}
        slim = {**slim, "spec": {}, "status": {key: status.get(key) for key in ("podIP", "conditions")}}
    return slim


def _parse(manifest: Manifest) -> Parsed:
    model = KINDS[manifest["kind"]]
    try:
        return model.model_validate(manifest)
    except ValidationError as error:
        return explain(model, error)


def summary(manifest: Manifest) -> dict[str, Any]:
    """The part of an own object whose change concerns others: not its status, nor bookkeeping."""
    metadata = manifest["metadata"]
    return {
        "uid": metadata.get("uid"),
        "generation": metadata.get("generation"),
        "deletion": metadata.get("deletionTimestamp"),
        "spec": None if metadata.get("generation") else manifest.get("spec"),
    }
