"""Which configuration each router replica serves with: asked from the replicas themselves.

A router exports `kvfleet_router_config_info{revision="…"} 1` at its admin port. Replicas that do not yet say what they
should are asked every `EAGER_S`, the others now and then. What they say goes into the world; conditions follow from it.
Routers need no permission to write anything for this, and serve on when nobody asks.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from typing import Final

import httpx

from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_operator.world import World

logger = logging.getLogger(__name__)
EAGER_S: Final = 2.0
CALM_S: Final = 30.0
TIMEOUT_S: Final = 2.0
MAX_BYTES: Final = 4 * 2**20
PARALLEL: Final = 32
_REVISION = re.compile(
    r'^kvfleet_router_config_info\{[^}]*\brevision="([0-9a-f]{1,64})"[^}]*\} 1(?:\.0)?$', re.MULTILINE
)


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
        self._client = client or httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False)
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
        if asked is None or self._world.reports.get(replica) != wanted:
            return True
        return self._clock() - asked >= self._calm_s

    async def _ask(self, router: FleetRouter, pod: str, ip: str) -> None:
        replica = (router.metadata.namespace or "default", pod)
        self._asked[replica] = self._clock()
        host = f"[{ip}]" if ":" in ip else ip
        async with self._limit:
            revision = await self._revision(f"http://{host}:{router.spec.admin_port}/metrics")
        if revision is not None and self._world.reports.get(replica) != revision:
            self._world.reports[replica] = revision
            self._on_report(replica[0])

    async def _revision(self, url: str) -> str | None:
        """What the replica says, or None where it says nothing."""
        try:
            async with self._client.stream("GET", url) as response:
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        return None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            logger.debug("%s: %s", url, error or type(error).__name__)
            return None
        found = _REVISION.search(body.decode(errors="replace")) if response.status_code == 200 else None
        return found[1] if found else None
