"""What a decision changes in the cluster: the workload's `replicas`, the marks of victims, status and Events.

`replicas` is written with a field manager of its own, and only onto the very state that was judged: if a router woke the
pool meanwhile, or somebody scaled it by hand, the write is refused and the next round judges anew. Pods are marked right
before a write that lowers `replicas` (`autoscale.victims`); a mark that cannot be written costs a better choice, no more.
Before that, once they are likely to go, the routers are told to send them nothing new (`sparing`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from kvfleet_api.common import Condition
from kvfleet_api.fleetconfig import DRAINING_ANNOTATION
from kvfleet_api.modelpool import AutoscalingStatus
from kvfleet_operator.api import ApiError, KubeApi
from kvfleet_operator.autoscale import report
from kvfleet_operator.autoscale.autoscaler import PoolResult
from kvfleet_operator.autoscale.expressions import Samples
from kvfleet_operator.autoscale.readers.routers import RouterReader
from kvfleet_operator.autoscale.victims import DELETION_COST, Candidate, choose_victims, deletion_costs, highest_indices
from kvfleet_operator.reconcile import conditions, names
from kvfleet_operator.reconcile.conditions import Finding
from kvfleet_operator.reconcile.names import SCALER
from kvfleet_operator.reconcile.plan import Manifest
from kvfleet_operator.resources import BY_KIND, CONFIG_MAP, POD, POOL, pod_address, unix_s
from kvfleet_operator.scaling.pools import ScaledPool
from kvfleet_operator.scaling.sparing import Spared
from kvfleet_operator.statuses import StatusWriter, rfc3339
from kvfleet_operator.world import World

logger = logging.getLogger(__name__)
WORKER_IN_FLIGHT: Final = "kvfleet_router_worker_in_flight"
WORKER_CACHED_TOKENS: Final = "kvfleet_router_worker_cached_tokens"


class Effects:
    def __init__(self, api: KubeApi, world: World, statuses: StatusWriter, routers: RouterReader) -> None:
        self._api = api
        self._world = world
        self._statuses = statuses
        self._routers = routers
        self._spared = Spared()

    async def bring_about(self, pool: ScaledPool, result: PoolResult, now: datetime) -> bool:
        """Scale and report. True where `replicas` was written. Raises ApiError."""
        going = max(pool.workers.wanted - result.decision.desired, 0) + result.decision.leaving
        candidates: Sequence[Candidate] = ()
        try:
            candidates = await self._candidates(pool, now) if going else ()
            await self._spare(pool, going, candidates, now)
        except ApiError as error:
            self._spared.forget(pool.scope.namespace, pool.scope.pool)
            logger.warning("%s: the routers could not be told which workers will go: %s", pool.name, error)
        scaled = await self._scale(pool, result, candidates, now)
        await self._report(pool, result, scaled, now)
        return scaled

    async def pods(self, pool: ScaledPool) -> list[Manifest]:
        """The pool's pods that serve HTTP."""
        return await self._api.list(POD, pool.scope.namespace, pool.selector) or []

    # Scaling

    async def _scale(
        self, pool: ScaledPool, result: PoolResult, candidates: Sequence[Candidate], now: datetime
    ) -> bool:
        current, desired = pool.workers.wanted, result.decision.desired
        if desired == current:
            return False
        if desired < current and pool.workload["kind"] == "Deployment":
            await self._mark_victims(pool, current - desired, candidates)
        if not await self._write_replicas(pool, desired):
            return False
        logger.info("%s: %s", pool.name, result.decision.message)
        regarding = self._world.get(pool.key)
        if regarding is None:
            return True
        await self._statuses.tell(
            regarding,
            action="Rescale",
            reason="ScaledUp" if desired > current else "ScaledDown",
            note=f"from {current} to {desired} workers: {result.decision.message}",
            warning=False,
            now=now,
        )
        return True

    async def _write_replicas(self, pool: ScaledPool, desired: int) -> bool:
        """False where the workload is not what was judged any more."""
        live = pool.workload
        resource = BY_KIND[live["kind"]]
        for _ in range(2):
            try:
                written = await self._api.scale(resource, live, desired, manager=SCALER)
            except ApiError as error:
                if error.status == 404:
                    return False
                if error.status != 409:
                    raise
            else:
                self._world.put({"apiVersion": resource.api_version, "kind": resource.kind, **written})
                return True
            # Most often just its status moved.
            fresh = await self._api.get(resource, pool.scope.namespace, live["metadata"]["name"])
            if fresh is None or fresh["metadata"]["uid"] != live["metadata"]["uid"]:
                return False
            fresh = {"apiVersion": resource.api_version, "kind": resource.kind, **fresh}
            self._world.put(fresh)
            if fresh["spec"].get("replicas", 1) != pool.workers.wanted:
                return False
            live = fresh
        return False

    async def _spare(self, pool: ScaledPool, going: int, candidates: Sequence[Candidate], now: datetime) -> None:
        """Tell the routers who is to go now or soon, where that changed."""
        namespace, now_s = pool.scope.namespace, now.timestamp()
        if pool.workload["kind"] == "Deployment":
            victims = choose_victims(candidates, going)
        else:
            victims = highest_indices([candidate.pod for candidate in candidates], going)
        if not self._spared.want(namespace, pool.scope.pool, victims, now_s):
            return
        told = {DRAINING_ANNOTATION: self._spared.annotation(namespace, now_s)}
        for router in self._world.routers(namespace):
            await self._api.annotate(CONFIG_MAP, namespace, names.bounded(router.metadata.name), told)

    async def _mark_victims(self, pool: ScaledPool, count: int, candidates: Sequence[Candidate]) -> None:
        try:
            for name, cost in deletion_costs(candidates, count).items():
                await self._api.annotate(POD, pool.scope.namespace, name, {DELETION_COST: cost})
        except ApiError as error:
            logger.warning("%s: workers to go could not be marked, Kubernetes chooses: %s", pool.name, error)

    async def _candidates(self, pool: ScaledPool, now: datetime) -> list[Candidate]:
        spared = self._spared.of(pool.scope.namespace, pool.scope.pool, now.timestamp())
        pages = await self._routers.samples(pool.router_urls, {WORKER_IN_FLIGHT, WORKER_CACHED_TOKENS})
        in_flight = _by_worker(pages, WORKER_IN_FLIGHT, pool.scope.pool, sum)
        cached = _by_worker(pages, WORKER_CACHED_TOKENS, pool.scope.pool, max)
        prefill_s_per_token = pool.config.cost.prefill_s(1.0, 1.0)
        found = []
        for pod in await self.pods(pool):
            metadata = pod["metadata"]
            if metadata.get("deletionTimestamp"):
                continue
            name = metadata["name"]
            found.append(
                Candidate(
                    name,
                    pod_address(pod) is not None,
                    int(in_flight.get(name, 0)),
                    cached.get(name, 0.0) * prefill_s_per_token,
                    unix_s(metadata.get("creationTimestamp")) or 0.0,
                    (metadata.get("annotations") or {}).get(DELETION_COST),
                    spared=name in spared,
                )
            )
        return found

    # Reporting

    async def _report(self, pool: ScaledPool, result: PoolResult, scaled: bool, now: datetime) -> None:
        live = self._world.get(pool.key)
        for _ in range(2):
            if live is None or live["metadata"].get("uid") != pool.pool.metadata.uid:
                return
            try:
                await self._statuses.write(live, _status(pool, live, result, scaled, now), now)
                return
            except ApiError as error:
                if error.status != 409:
                    raise
            # The reconciler was faster. Its answer, or the watch's, may not be here yet.
            fresh = await self._api.get(POOL, pool.scope.namespace, pool.scope.pool)
            live = fresh and {"apiVersion": POOL.api_version, "kind": POOL.kind, **fresh}


def _status(pool: ScaledPool, live: Manifest, result: PoolResult, scaled: bool, now: datetime) -> dict[str, Any]:
    """The autoscaler's part of the pool's status; the condition keeps its place among the others."""
    before = live.get("status") or {}
    stamp = rfc3339(now)
    earlier = AutoscalingStatus.model_validate(before["autoscaling"]) if before.get("autoscaling") else None
    told = report.status(result, earlier, scaled=scaled, now=stamp)
    known = [Condition.model_validate(entry) for entry in before.get("conditions") or []]
    gone = dict.fromkeys(before.get("autoscaling") or {})
    return {
        "desiredReplicas": result.decision.desired,
        "autoscaling": gone | told.model_dump(by_alias=True, exclude_none=True, mode="json"),
        "conditions": conditions.dump(_with(known, report.scaling_active(result), live, stamp)),
    }


def _with(known: Sequence[Condition], finding: Finding, live: Manifest, stamp: str) -> list[Condition]:
    mine = conditions.settle(
        [entry for entry in known if entry.type == finding.type],
        [finding],
        generation=live["metadata"].get("generation"),
        now=stamp,
    )
    others = [entry for entry in known if entry.type != finding.type]
    return [*others, *mine]


def _by_worker(pages: Sequence[Samples], metric: str, pool: str, merge: Any) -> Mapping[str, float]:
    """Worker → the figures of all routers, merged."""
    found: dict[str, list[float]] = {}
    for page in pages:
        for labels, value in page.get(metric, ()):
            if labels.get("pool") == pool:
                found.setdefault(labels.get("worker", ""), []).append(value)
    return {worker: float(merge(values)) for worker, values in found.items()}
