"""One leader at a time, through a `coordination.k8s.io` Lease.

The holder renews the Lease every `retry_s`. A standby counts a Lease as expired when it has not seen it change for
`duration_s` by its own monotonic clock: clocks of different machines are never compared.

Fencing: a holder that could not renew for `deadline_s` stops by itself, before any standby may take over. `fence` is
called before each write and raises from that moment on, whatever the event loop was doing meanwhile, and a write takes
gets less than the `duration_s - deadline_s` that are left. On an orderly end the Lease is given back, and a standby takes over
at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from kvfleet_operator.api import ApiError, KubeApi, NotLeader
from kvfleet_operator.resources import LEASE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseOptions:
    name: str
    namespace: str
    identity: str
    """Unique among the replicas: the pod's name with something random."""
    duration_s: float = 15.0
    deadline_s: float = 10.0
    retry_s: float = 2.0

    def __post_init__(self) -> None:
        if not self.retry_s < self.deadline_s < self.duration_s:
            raise ValueError("lease: retry_s < deadline_s < duration_s must hold: correct one of the three")

    @property
    def write_timeout_s(self) -> float:
        """A write begun at the last moment must be over before a standby may take over."""
        return 0.8 * (self.duration_s - self.deadline_s)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The Lease as last read: who holds it in which version, and since when that is so by our clock."""

    holder: str
    version: str
    at: float
    duration_s: float


class Lease:
    def __init__(
        self,
        api: KubeApi,
        options: LeaseOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        rng: random.Random | None = None,
    ) -> None:
        """`api` must not be fenced by this very Lease."""
        self._api = api
        self._options = options
        self._clock = clock
        self._now = now
        self._rng = rng or random.Random()
        self._seen: _Seen | None = None
        self._renewed_at: float | None = None
        self.answered = False
        """The API server has let us read the Lease at least once."""

    @property
    def held(self) -> bool:
        """Whether this process may act as the leader at this very moment."""
        return self._renewed_at is not None and self._clock() - self._renewed_at < self._options.deadline_s

    def fence(self) -> None:
        if not self.held:
            raise NotLeader(
                f"{self._options.identity} does not hold Lease {self._options.namespace}/{self._options.name}"
            )

    async def acquire(self) -> None:
        """Wait until this process is the leader."""
        while True:
            if await self._try():
                logger.info("%s became the leader", self._options.identity)
                return
            await asyncio.sleep(self._options.retry_s * self._rng.uniform(0.8, 1.2))

    async def keep(self) -> None:
        """Renew until it cannot be renewed any more, and return then."""
        while self.held:
            await asyncio.sleep(self._options.retry_s)
            if (
                not await self._try()
                and self._seen is not None
                and self._seen.holder not in ("", self._options.identity)
            ):
                break  # somebody else has it
        self._renewed_at = None
        logger.error("%s is no longer the leader", self._options.identity)

    async def release(self) -> None:
        """Give the Lease back, if it is ours, so that a standby need not wait for its end."""
        if not self.held:
            return
        try:
            live = await self._api.get(LEASE, self._options.namespace, self._options.name)
            if live is not None and (live.get("spec") or {}).get("holderIdentity") == self._options.identity:
                live["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": self._stamp()}
                await self._api.replace(LEASE, live)
        except ApiError as error:
            logger.warning("Lease not given back: %s", error)
        finally:
            self._renewed_at = None

    async def _try(self) -> bool:
        """Acquire or renew once. Whatever goes wrong is the same as not getting it."""
        started = self._clock()
        try:
            live = await self._api.get(LEASE, self._options.namespace, self._options.name)
            self.answered = True
            if live is None:
                await self._api.create(LEASE, self._fresh())
            elif self._may_take(live):
                await self._api.replace(LEASE, self._taken(live))
            else:
                return False
        except ApiError as error:
            if error.status != 409:  # somebody else was faster
                logger.warning("Lease %s/%s: %s", self._options.namespace, self._options.name, error)
            return False
        self._renewed_at = started  # not when the answer came: a standby counts from when it was written
        return True

    def _may_take(self, live: dict[str, Any]) -> bool:
        spec = live.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        version = str(live["metadata"].get("resourceVersion"))
        if self._seen is None or self._seen.version != version or self._seen.holder != holder:
            duration_s = float(spec.get("leaseDurationSeconds") or self._options.duration_s)
            self._seen = _Seen(holder, version, self._clock(), duration_s)
        if holder in ("", self._options.identity):
            return True
        return self._clock() - self._seen.at >= self._seen.duration_s

    def _fresh(self) -> dict[str, Any]:
        options = self._options
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.kind,
            "metadata": {"name": options.name, "namespace": options.namespace},
            "spec": {**self._spec(), "acquireTime": self._stamp(), "leaseTransitions": 0},
        }

    def _taken(self, live: dict[str, Any]) -> dict[str, Any]:
        """The Lease renewed or taken over; `resourceVersion` stays in it, so that only one can succeed."""
        spec = dict(live.get("spec") or {})
        if spec.get("holderIdentity") != self._options.identity:
            spec["acquireTime"] = self._stamp()
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        return {**live, "apiVersion": LEASE.api_version, "kind": LEASE.kind, "spec": {**spec, **self._spec()}}

    def _spec(self) -> dict[str, Any]:
        return {
            "holderIdentity": self._options.identity,
            "leaseDurationSeconds": max(1, round(self._options.duration_s)),
            "renewTime": self._stamp(),
        }

    def _stamp(self) -> str:
        return self._now().astimezone(UTC).strftime(_MICRO_TIME)


_MICRO_TIME: Final = "%Y-%m-%dT%H:%M:%S.%fZ"
