"""One `reconcile(key)` per kind: gather what is known, ask the pure part, bring it about, report.

    world ──► reconcile.<kind>.children ──► apply ──► reconcile.<kind>.status ──► status, Events

Level-based: a reconciliation looks at the present state only, whatever brought it about, and does nothing where nothing
differs. A change in the world enqueues what depends on it (`reconcile.dependents`). Workers take keys from the queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any, Final

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.common import Condition, Resource
from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_api.modelpool import ModelPool
from kvfleet_api.problems import FieldProblem, Problem
from kvfleet_api.routingpolicy import RoutingPolicy
from kvfleet_operator.api import ApiError, NotLeader
from kvfleet_operator.apply import Applier, OwnerGone
from kvfleet_operator.metrics import Metrics
from kvfleet_operator.reconcile import acceleratorprofile, cacheview, conditions, fleetrouter, modelpool, routingpolicy
from kvfleet_operator.reconcile.conditions import Finding
from kvfleet_operator.reconcile.dependents import KINDS, Key, dependents, key_of
from kvfleet_operator.reconcile.plan import Applied, Manifest, Plan
from kvfleet_operator.statuses import StatusWriter, rfc3339
from kvfleet_operator.workqueue import WorkQueue
from kvfleet_operator.world import World, summary

logger = logging.getLogger(__name__)
REFUSED_S: Final = 30.0
"""After which a refused child is tried again: no event tells that a foreign object is gone or a right was granted."""


class Controller:
    def __init__(
        self,
        world: World,
        queue: WorkQueue[Key],
        applier: Applier,
        statuses: StatusWriter,
        metrics: Metrics,
        *,
        now: Callable[[], datetime],
        namespaces: Collection[str] | None = None,
        refused_s: float = REFUSED_S,
    ) -> None:
        """`namespaces`: those watched, None for all."""
        self._world = world
        self._queue = queue
        self._applier = applier
        self._statuses = statuses
        self._metrics = metrics
        self._now = now
        self._namespaces = namespaces
        self._refused_s = refused_s
        world.on_change = self.changed

    # What to look at

    def changed(self, before: Manifest | None, after: Manifest) -> None:
        """Enqueue what depends on an object that came, changed or went."""
        key = key_of(after)
        if key.kind in KINDS and before is not None and summary(before) == summary(after):
            self._queue.add(key)  # only its status changed, which nobody else looks at
            return
        for dependent in dependents(after, self._world):
            self._queue.add(dependent)

    def enqueue_all(self) -> None:
        """Look at everything again: after a resync."""
        for kind in KINDS:
            for key in self._world.keys(kind):
                self._queue.add(key)

    def routers_reported(self, namespace: str) -> None:
        """A router replica says something new."""
        for kind in ("FleetRouter", "RoutingPolicy"):
            for key in self._world.keys(kind, namespace):
                self._queue.add(key)
        for pool in self._world.pools():
            if (pool.metadata.namespace or "default") != namespace:
                continue
            metered = self._world.energy_views(pool) is not None or (pool.status and pool.status.energy)
            if metered or pool.spec.model.tokenizer is not None:
                self._queue.add(Key("ModelPool", namespace, pool.metadata.name))
            if metered:
                self._queue.add(Key("AcceleratorProfile", None, pool.spec.accelerator.profile_ref))

    def adapters_reported(self, pool: Key) -> None:
        """Something new is known of the adapters of one of its workers."""
        self._queue.add(pool)

    # Working

    async def work(self) -> None:
        """One worker; several may run. Ends only by cancellation, or when this process stops being the leader."""
        while True:
            key = await self._queue.get()
            started, result = time.monotonic(), "error"
            try:
                result = "changed" if await self.reconcile(key) else "unchanged"
            except NotLeader:
                raise
            except OwnerGone:
                result = "unchanged"  # the event that says so is on its way
            except ApiError as error:
                # 409: the object moved on while we looked; the next look is at the newer state.
                log = logger.info if error.status == 409 else logger.warning
                log("%s: %s; will be tried again", key, error)
            except Exception:
                logger.exception("%s: reconciliation failed; will be tried again", key)
            finally:
                self._queue.done(key, failed=result == "error")
                self._metrics.reconciles.labels(key.kind, result).inc()
                self._metrics.time_reconcile(key.kind, started)

    async def reconcile(self, key: Key) -> bool:
        """Make the object's children and status what they should be. True where something was written."""
        live, parsed = self._world.get(key), self._world.parsed(key)
        if live is None or parsed is None or live["metadata"].get("deletionTimestamp"):
            return False  # gone or going: the garbage collector takes its children
        if isinstance(parsed, list):
            return await self._report(live, self._invalid(live, parsed))
        match parsed:
            case ModelPool():
                return await self._model_pool(live, parsed)
            case FleetRouter():
                return await self._fleet_router(live, parsed)
            case RoutingPolicy():
                return await self._report(live, self._routing_policy(parsed))
            case AcceleratorProfile():
                return await self._report(live, self._profile(parsed))
        raise TypeError(f"no reconciler for {key.kind}")

    async def _model_pool(self, live: Manifest, pool: ModelPool) -> bool:
        given = modelpool.PoolInput(
            pool,
            self._world.profile(pool.spec.accelerator.profile_ref),
            self._problems(pool),
            self._world.children(pool),
            self._world.worker_adapters(pool),
            self._world.cache_views(pool),
            self._world.energy_views(pool),
        )
        applied, written = await self._bring_about(live, pool, modelpool.children(given))
        return await self._report(live, modelpool.status(given, applied, self._stamp())) or written

    async def _fleet_router(self, live: Manifest, router: FleetRouter) -> bool:
        given = self._router_input(router)
        applied, written = await self._bring_about(live, router, fleetrouter.children(given))
        return await self._report(live, fleetrouter.status(given, applied, self._stamp())) or written

    async def _bring_about(self, live: Manifest, owner: Resource, plan: Plan) -> tuple[Applied, bool]:
        applied, written = await self._applier.bring_about(owner, plan)
        if applied.rejections:
            self._queue.add(key_of(live), self._refused_s)
        return applied, written

    def _router_input(self, router: FleetRouter) -> fleetrouter.RouterInput:
        fleet = self._world.fleet(router.metadata.namespace or "default", router)
        return fleetrouter.RouterInput(router, fleet, self._world.replicas(router))

    def _routing_policy(self, policy: RoutingPolicy) -> dict[str, Any]:
        namespace = policy.metadata.namespace or "default"
        compiled = {config.name for config in self._world.fleet(namespace).config.policies}
        views = [fleetrouter.view(self._router_input(router)) for router in self._world.routers(namespace)]
        included = policy.metadata.name in compiled
        caches = self._cache_known(policy)
        return routingpolicy.status(policy, self._problems(policy), included, views, self._stamp(), caches)

    def _cache_known(self, policy: RoutingPolicy) -> Finding | None:
        namespace, named = policy.metadata.namespace, {ref.name for ref in policy.spec.pools}
        pools = [
            pool for pool in self._world.pools() if pool.metadata.namespace == namespace and pool.metadata.name in named
        ]
        found = {pool.metadata.name: cacheview.of_pool(pool, self._world.cache_views(pool)) for pool in pools}
        return cacheview.of_policy(policy, found)

    def _profile(self, profile: AcceleratorProfile) -> dict[str, Any]:
        energies = self._world.pool_energies(profile.metadata.name)
        return acceleratorprofile.status(profile, self._world.pools(), self._namespaces, self._stamp(), energies)

    def _problems(self, resource: Resource) -> list[Problem]:
        return self._world.fleet(resource.metadata.namespace or "default").problems_of(resource)

    def _invalid(self, live: Manifest, problems: list[FieldProblem]) -> dict[str, Any]:
        """An object the schema let through and the model does not: said once, never retried."""
        message = "; ".join(map(str, problems))
        findings = [Finding(type_, "False", "Invalid", message) for type_ in ("Accepted", "Ready")]
        before = [Condition.model_validate(c) for c in (live.get("status") or {}).get("conditions") or []]
        generation = live["metadata"].get("generation")
        settled = conditions.settle(before, findings, generation=generation, now=self._stamp())
        return {"observedGeneration": generation, "conditions": conditions.dump(settled)}

    async def _report(self, live: Manifest, status: dict[str, Any]) -> bool:
        return await self._statuses.write(live, status, self._now())

    def _stamp(self) -> str:
        return rfc3339(self._now())


async def run_workers(controller: Controller, count: int) -> None:
    """`count` workers until cancelled, or until one of them may not go on."""
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(controller.work())
