"""Listings beside the watches: the first state of the world, and the proof, time and again, that no watch is stalled.

A watch can stop delivering without breaking, and one that broke says nothing of what was deleted meanwhile. So every
`period_s` (jittered) everything watched is listed. What a listing shows and the watch has not delivered `GRACE_S` later
was missed: it is taken over from the listing, counted, and the kind's age goes on growing. A kind whose listing held
nothing new is proven fresh. The probe of liveness looks at these ages (`health`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection
from typing import Final

from kvfleet_operator.api import ApiError, KubeApi
from kvfleet_operator.metrics import Metrics
from kvfleet_operator.reconcile.dependents import Key, key_of
from kvfleet_operator.reconcile.plan import Manifest
from kvfleet_operator.resources import OWN, WATCHED, ResourceType, label_selector
from kvfleet_operator.world import World, version

logger = logging.getLogger(__name__)
GRACE_S: Final = 5.0
"""Seconds an event may be on its way."""
RETRY_S: Final = 2.0


class Resync:
    def __init__(
        self,
        api: KubeApi,
        world: World,
        metrics: Metrics,
        *,
        namespaces: Collection[str] | None,
        period_s: float,
        grace_s: float | None = None,
        retry_s: float = RETRY_S,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._api = api
        self._world = world
        self._metrics = metrics
        self._namespaces = namespaces
        self._period_s = period_s
        self._grace_s = min(GRACE_S, period_s / 10) if grace_s is None else grace_s
        self._retry_s = retry_s
        self._clock = clock
        self._rng = rng or random.Random()
        self._fresh: dict[str, float] = {}
        metrics.watch_ages.read = self.ages

    def seen(self, kind: str) -> None:
        """An event of this kind arrived."""
        self._fresh[kind] = self._clock()

    def ages(self) -> dict[str, float]:
        """Kind → seconds since its watch was last proven to work."""
        now = self._clock()
        return {kind: now - at for kind, at in dict(self._fresh).items()}

    async def first(self) -> None:
        """Take over everything there is. Waits for the four kinds' CRDs, and for an API server that answers."""
        pending = list(WATCHED)
        while pending:
            pending = [resource for resource in pending if not await self._take_over(resource)]
            if pending:
                await asyncio.sleep(self._retry_s)

    async def _take_over(self, resource: ResourceType) -> bool:
        """False: the kind cannot be listed yet."""
        found = await self._first_listing(resource)
        if found is None:
            return False
        for manifest in found:
            self._world.put(manifest)
        self.seen(resource.kind)
        return True

    async def _first_listing(self, resource: ResourceType) -> list[Manifest] | None:
        """None: to be tried again."""
        try:
            found = await self._list(resource)
        except ApiError as error:
            if error.status in (401, 403):
                raise
            logger.warning("cannot list %s yet: %s", resource.plural, error)
            return None
        if found is None and resource in OWN:
            logger.warning("the cluster has no %s.%s yet: install kvfleet's CRDs", resource.plural, resource.group)
            return None
        return found or []

    async def run(self, after: Callable[[], None]) -> None:
        """Check every period, for ever; `after` is called at the end of each."""
        while True:
            await asyncio.sleep(self._period_s * self._rng.uniform(0.9, 1.1))
            for resource in WATCHED:
                try:
                    await self.check(resource)
                except ApiError as error:
                    logger.warning("resync of %s failed: %s", resource.plural, error)
            after()

    async def check(self, resource: ResourceType) -> int:
        """Compare one kind with a listing; returns how many changes its watch missed."""
        known = self._world.snapshot(resource.kind)
        listed = await self._list(resource)
        if listed is None:
            listed = []
        present = {key_of(manifest): manifest for manifest in listed}
        suspects = [manifest for key, manifest in present.items() if self._behind(key, manifest)]
        ghosts = [manifest for key, manifest in known.items() if key not in present]
        if suspects or ghosts:
            await asyncio.sleep(self._grace_s)
        missed = [manifest for manifest in suspects if self._world.put(manifest)]
        gone = [manifest for manifest in ghosts if self._world.get(key_of(manifest)) is manifest]
        for manifest in gone:
            self._world.remove(manifest)
        count = len(missed) + len(gone)
        if count:
            logger.warning("the watch of %s missed %d change(s); taken over from a listing", resource.plural, count)
            self._metrics.missed_events.labels(resource.kind).inc(count)
        else:
            self.seen(resource.kind)
        return count

    def _behind(self, key: Key, manifest: Manifest) -> bool:
        known = self._world.get(key)
        return known is None or version(known) < version(manifest)

    async def _list(self, resource: ResourceType) -> list[Manifest] | None:
        selector = label_selector(resource)
        if self._namespaces is None or not resource.namespaced:
            return await self._api.list(resource, None, selector)
        found: list[Manifest] = []
        for namespace in sorted(self._namespaces):
            part = await self._api.list(resource, namespace, selector)
            if part is None:
                return None
            found += part
        return found
