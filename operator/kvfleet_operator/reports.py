"""Which configuration each router replica serves with: asked from the replicas themselves.

A router answers `GET /loaded` at its admin port:

    {"revision": "…", "policies": {"chat": {"generation": 3, "revision": "…"}, …}, "refused": null or a reason,
     "pools": {"llama-8b": {"mode": "Precise" or "Approximate", "reason": "…", "message": "…",
                            "energy": {"source": "Measured", "trusted": true, "estimates": {"StepEnergy": …}, …}}, …}}

Replicas that do not yet say what they should are asked every `EAGER_S`, the others now and then. What they say goes into
the world; conditions follow from it. Routers need no permission to write anything for this, and serve on when nobody asks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Final, Literal

import httpx
from pydantic import BaseModel, Field, FiniteFloat, JsonValue, ValidationError

from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_operator.exchange import NoAnswer, base_url, exchange
from kvfleet_operator.reconcile import energyview
from kvfleet_operator.reconcile.cacheview import CacheView
from kvfleet_operator.reconcile.energyview import EnergyView, Learned
from kvfleet_operator.reconcile.routingpolicy import Loaded
from kvfleet_operator.world import World

logger = logging.getLogger(__name__)
EAGER_S: Final = 2.0
CALM_S: Final = 30.0
TIMEOUT_S: Final = 2.0
MAX_BYTES: Final = 2**20
PARALLEL: Final = 32
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]


class _LoadedPolicy(BaseModel):
    revision: Digest


class _PoolView(BaseModel):
    mode: Literal["Precise", "Approximate"]
    reason: Annotated[str, Field(pattern=r"^[A-Za-z]{1,64}$")]
    message: Annotated[str, Field(max_length=1000)] = ""
    energy: JsonValue = None
    """An `_Energy`. Judged apart: what a router of another version says of energy must not cost the rest."""


class _Learned(BaseModel):
    value: FiniteFloat
    standard_error: FiniteFloat


class _Energy(BaseModel):
    source: Literal["Profile", "Learning", "Measured", "LowConfidence", "Stale", "Frozen", "Absurd"]
    trusted: bool
    message: Annotated[str, Field(max_length=1000)] = ""
    error: FiniteFloat
    intervals: Annotated[int, Field(ge=0)]
    estimates: dict[Literal["StepEnergy", "TokenEnergy", "PrefillTokenEnergy", "IdlePower"], _Learned]


class _Answer(BaseModel):
    revision: Digest
    policies: dict[str, _LoadedPolicy]
    pools: dict[str, _PoolView] = {}
    refused: Annotated[str, Field(max_length=1000)] | None


class Reports:
    def __init__(
        self,
        world: World,
        on_report: Callable[[str], None],
        *,
        client: httpx.AsyncClient | None = None,
        eager_s: float = EAGER_S,
        calm_s: float = CALM_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_report(namespace)` is called when a replica of the namespace says something new."""
        self._world = world
        self._on_report = on_report
        self._client = client or httpx.AsyncClient(trust_env=False)
        self._eager_s = eager_s
        self._calm_s = calm_s
        self._clock = clock
        self._asked: dict[tuple[str, str], float] = {}
        self._limit = asyncio.Semaphore(PARALLEL)

    async def run(self) -> None:
        try:
            while True:
                await self.poll()
                await asyncio.sleep(self._eager_s)
        finally:
            await self._client.aclose()

    async def poll(self) -> None:
        """Ask every replica that is due."""
        due: list[tuple[FleetRouter, str, str]] = []
        present: set[tuple[str, str]] = set()
        for key in self._world.keys("FleetRouter"):
            router = self._world.parsed(key)
            if not isinstance(router, FleetRouter):
                continue
            namespace = router.metadata.namespace or "default"
            wanted = self._world.fleet(namespace, router).config.revision
            for pod, ip in self._world.router_pods(router).items():
                present.add((namespace, pod))
                if self._due((namespace, pod), wanted):
                    due.append((router, pod, ip))
        self._asked = {replica: at for replica, at in self._asked.items() if replica in present}
        await asyncio.gather(*(self._ask(router, pod, ip) for router, pod, ip in due))

    def _due(self, replica: tuple[str, str], wanted: str) -> bool:
        asked = self._asked.get(replica)
        known = self._world.reports.get(replica)
        if asked is None or known is None or known.revision != wanted:
            return True
        if any(view.reason == "Loading" for view in known.pools.values()):
            return True
        return self._clock() - asked >= self._calm_s

    async def _ask(self, router: FleetRouter, pod: str, ip: str) -> None:
        replica = (router.metadata.namespace or "default", pod)
        self._asked[replica] = self._clock()
        async with self._limit:
            loaded = await self._loaded(f"{base_url(ip, router.spec.admin_port)}/loaded")
        if loaded is None:
            return
        known = self._world.reports.get(replica)
        if known is not None:
            loaded = replace(loaded, energy=energyview.steady(known.energy, loaded.energy))
        if loaded != known:
            self._world.reports[replica] = loaded
            self._on_report(replica[0])

    async def _loaded(self, url: str) -> Loaded | None:
        """What the replica says, or None where it says nothing."""
        try:
            status, body = await exchange(self._client, "GET", url, timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES)
            answer = _Answer.model_validate_json(body) if status == 200 else None
        except (NoAnswer, ValidationError) as error:
            logger.debug("%s: %s", url, error)
            return None
        if answer is None:
            return None
        policies = {name: policy.revision for name, policy in answer.policies.items()}
        pools = {name: CacheView(view.mode, view.reason, view.message) for name, view in answer.pools.items()}
        energy = {name: told for name, view in answer.pools.items() if (told := _energy(view.energy)) is not None}
        return Loaded(answer.revision, policies, answer.refused or "", pools, energy)


def _energy(told: JsonValue) -> EnergyView | None:
    if told is None:
        return None
    try:
        read = _Energy.model_validate(told)
    except ValidationError as error:
        logger.debug("energy: %s", error)
        return None
    estimates: dict[str, Learned] = {
        name: Learned(entry.value, entry.standard_error) for name, entry in read.estimates.items()
    }
    return EnergyView(read.source, read.trusted, read.message, read.error, read.intervals, estimates)
