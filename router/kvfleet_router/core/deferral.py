"""Requests that may begin later than they came, kept for a cheaper time.

How long a request may be kept is its own word (`x-kvfleet-defer-seconds`) or its policy's, by priority (`energy.defer`). It goes

    cheap   in an hour whose carbon intensity is within 5 % of the lowest until it must begin, while there is room; where the
            intensity is the same all day: while there is room
    due     when it must begin, or a little earlier where so many must that they could not all begin in time
    drain   when the router leaves: then all go, as fast as the queue takes them

There is room while its pools are below the load at which joules lose their price, and nobody waits in the lane's queue. Then
requests go one after another, by when they must begin, no faster than a fifth of what the pools can serve, all routers together:
a cheap hour does not begin with a herd, and requests that may not wait hardly notice. Bounded in number (`maxRequests`) and bytes:
whoever finds no place is not kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

from kvfleet_api.fleetrouter import TelemetrySpec
from kvfleet_api.routingpolicy import DeferSpec
from kvfleet_router.core.carbon import HOUR_S, grams_by_hour
from kvfleet_router.core.holdqueue import HoldQueue
from kvfleet_router.core.parse import ParsedRequest
from kvfleet_router.core.routes import Lane
from kvfleet_router.core.ticket import Held, Refusal

if TYPE_CHECKING:
    from kvfleet_router.core.placement import Placement

DEFER_HEADER: Final = b"x-kvfleet-defer-seconds"
LONGEST_S: Final = 86_400
ROOM_BELOW_LOAD: Final = 0.6
NEAR_LOWEST: Final = 1.05
PACE_SHARE: Final = 0.2
LEAST_PACE_RPS: Final = 0.1
MAX_KEPT_BYTES: Final = 256 * 1024 * 1024
"""Of request bodies, all policies together."""
LOOK_AGAIN_S: Final = 0.25

Entry = tuple[float, int, Held]
"""(when it must begin, a number of its own, the request)"""


class Deferral:
    def __init__(self, epoch_s: float) -> None:
        """`epoch_s`: what to add to a time for Unix time."""
        self.draining = False
        self.ended: Counter[tuple[str, str]] = Counter()
        """(policy, why) → requests no longer kept. `full`: not kept for want of a place."""
        self._epoch_s = epoch_s
        self._hours: tuple[float, ...] = ()
        self._pace_share = PACE_SHARE
        self._kept: dict[Lane, list[Entry]] = {}
        self._next: dict[Lane, float] = {}
        self._counts: Counter[str] = Counter()
        self._bytes = 0
        self._sequence = 0

    def __len__(self) -> int:
        return sum(self._counts.values())

    @property
    def kept(self) -> dict[str, int]:
        """Requests kept, by policy."""
        return {policy: count for policy, count in self._counts.items() if count}

    def configure(self, telemetry: TelemetrySpec | None, routers: int) -> None:
        """`routers`: how many let requests go onto the same workers."""
        self._hours = grams_by_hour(telemetry)
        self._pace_share = PACE_SHARE / max(routers, 1)

    # In

    @staticmethod
    def wish_s(spec: DeferSpec | None, parsed: ParsedRequest) -> float | Refusal:
        """How long the request may be kept. `spec`: its policy's."""
        if spec is None:
            return 0.0
        asked = parsed.headers.get(DEFER_HEADER)
        if asked is None:
            late = spec.min_priority is not None and parsed.priority >= spec.min_priority
            return float(spec.max_seconds) if late else 0.0
        if len(asked) <= 9 and asked.isdigit():
            return float(min(int(asked), spec.max_seconds))
        name = DEFER_HEADER.decode()
        message = f"{name}: {asked[:20]!r} is no whole number of seconds: write one from 0 to {spec.max_seconds}, or leave it out"
        return Refusal(400, "invalid_header", message, param=name)

    def keep(self, held: Held, spec: DeferSpec, body_bytes: int) -> bool:
        """From now on it is kept, until `held.expires_at` at the latest. False: there is no place, or the router leaves."""
        policy = held.arrival.lane.config.name
        if not self._has_place(policy, spec, body_bytes):
            self.ended[policy, "full"] += 1
            return False
        held.kept_bytes = body_bytes
        self._insert(held)
        return True

    def would_keep(self, lane: Lane, wish_s: float, body_bytes: int, now: float, queue: HoldQueue) -> bool:
        """Whether a request that came now, and may be kept for so long, would be: there is a place, and it would not go at once."""
        spec = lane.config.defer
        if spec is None or wish_s <= 0.0 or not self._has_place(lane.config.name, spec, body_bytes):
            return False
        kept = len(self._kept.get(lane, ())) + 1
        return not self._why(lane, now + wish_s, kept, self._pace_rps(lane), now, queue)

    def _has_place(self, policy: str, spec: DeferSpec, body_bytes: int) -> bool:
        full = self._counts[policy] >= spec.max_requests or self._bytes + body_bytes > MAX_KEPT_BYTES
        return not full and not self.draining

    def _insert(self, held: Held) -> None:
        self._sequence += 1
        held.deferred = True
        heappush(self._kept.setdefault(held.arrival.lane, []), (held.expires_at, self._sequence, held))
        self._counts[held.arrival.lane.config.name] += 1
        self._bytes += held.kept_bytes

    # Out

    def remove(self, held: Held, why: str) -> None:
        """It is kept no longer."""
        policy = held.arrival.lane.config.name
        held.deferred = False
        self._counts[policy] -= 1
        self._bytes -= held.kept_bytes
        self.ended[policy, why] += 1
        lane = held.arrival.lane
        entries = self._kept[lane]
        if len(entries) > 2 * self._counts[policy] + 64:
            entries[:] = [entry for entry in entries if entry[2].deferred]
            heapify(entries)

    def ready(self, now: float, queue: HoldQueue) -> Iterator[Held]:
        """Those that go now, first to go first; they are kept no longer."""
        for lane in list(self._kept):
            entries = self._kept[lane]
            pace_rps = self._pace_rps(lane)
            while entries:
                held = entries[0][2]
                why = self._why(lane, held.expires_at, len(entries), pace_rps, now, queue) if held.deferred else "gone"
                if not why:
                    break
                heappop(entries)
                if why != "gone":
                    self.remove(held, why)
                    held.arrival.decision.deferred_s = now - held.held_since
                    held.arrival.decision.deferred_why = why
                    self._next[lane] = now + 1.0 / pace_rps
                    yield held
            if not entries:
                del self._kept[lane]
                self._next.pop(lane, None)

    def _pace_rps(self, lane: Lane) -> float:
        return max(self._pace_share * lane.capacity_rps(), LEAST_PACE_RPS)

    def _why(self, lane: Lane, expires_at: float, kept: int, pace_rps: float, now: float, queue: HoldQueue) -> str:
        """Why one that must begin at `expires_at` goes now; empty: it stays."""
        most = lane.config.admission.max_queue
        if most and queue.depths.get(lane.config.name, 0) >= max(most // 2, 1):
            return ""
        if self.draining:
            return "drain"
        if now >= expires_at:
            return "due"
        if now < self._next.get(lane, now) or queue.waiting(lane) or lane.busy() >= ROOM_BELOW_LOAD:
            return ""
        if not lane.capacity_rps() and not any(pool.asleep for pool in lane.pools):
            return ""  # nobody could take it now
        if now + kept / pace_rps >= expires_at:
            return "due"
        return "cheap" if self._cheap(now, expires_at) else ""

    def _cheap(self, now: float, until: float) -> bool:
        if not self._hours:
            return True
        first = int((now + self._epoch_s) // HOUR_S)
        last = min(int((until + self._epoch_s) // HOUR_S), first + 23)
        lowest = min(self._hours[hour % 24] for hour in range(first, last + 1))
        return self._hours[first % 24] <= NEAR_LOWEST * lowest

    def reroute(self, find: Callable[[ParsedRequest], Lane | Refusal], placement: Placement, now: float) -> None:
        """Lanes are others now: who is kept is kept on where the policy that takes it now allows it."""
        entries = sorted(entry for entries in self._kept.values() for entry in entries if entry[2].deferred)
        self._kept, self._next = {}, {}
        self._counts.clear()
        self._bytes = 0
        for _, _, held in entries:
            lane = find(held.arrival.parsed)
            held.deferred = False
            if isinstance(lane, Refusal):
                placement.dismiss(held, lane, now)
                continue
            held.arrival.lane = lane
            if lane.config.defer is not None:
                self._insert(held)
            else:
                placement.start(held, now)

    def next_look(self, now: float) -> float | None:
        """When `ready` may have somebody; none: nobody is kept."""
        if not self._kept:
            return None
        hour_s = HOUR_S - (now + self._epoch_s) % HOUR_S if self._hours else LOOK_AGAIN_S
        soonest = now + hour_s
        for lane, entries in self._kept.items():
            must_begin = entries[0][0]
            if self.draining or self._cheap(now, must_begin):
                return now + LOOK_AGAIN_S
            pace_rps = self._pace_rps(lane)
            soonest = min(soonest, max(must_begin - len(entries) / pace_rps, now + LOOK_AGAIN_S))
        return soonest
