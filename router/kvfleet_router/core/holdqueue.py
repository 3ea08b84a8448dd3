"""Requests held at the router, in the order they are to be decided again.

Per lane (policy and model), sorted by: priority; then those that can still meet their deadline, earliest deadline first;
then the hopeless ones, first come first served. So that these are not passed over until there is no time left, every eighth turn goes to
whoever has waited for half of the time it may, first come first served. More of them would, under a load that is too much, make
everybody late. Bounded per policy. When a policy's queue is full, a newcomer takes the
place of a less urgent request, or else of the newest one of the tenant that holds the most places, if that is more than
the newcomer's tenant would hold: so one tenant cannot keep the others out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from heapq import heapify, heappop, heappush

from kvfleet_router.core.routes import Lane
from kvfleet_router.core.ticket import Held

HOPEFUL, HOPELESS = 0, 1
"""Within a priority."""
TURNS_OF_OTHERS = 7
"""Between two of those that have waited long."""
Entry = tuple[tuple[int, int, float, int], Held]
"""Never compared beyond the order: its last number is unique."""


class HoldQueue:
    def __init__(self) -> None:
        self._lanes: dict[Lane, list[Entry]] = {}
        self._depths: Counter[str] = Counter()
        self._tenants: dict[str, Counter[str]] = {}
        self._expiries: list[tuple[float, int, Held]] = []
        self._long_waiting: dict[Lane, deque[Held]] = {}
        self._turns: Counter[Lane] = Counter()
        """By lane: of others, since one that has waited long had its turn."""
        self._sequence = 0

    def __len__(self) -> int:
        return sum(self._depths.values())

    @property
    def depths(self) -> dict[str, int]:
        """Held requests per policy name."""
        return {name: depth for name, depth in self._depths.items() if depth}

    def lanes(self) -> list[Lane]:
        """Lanes with somebody waiting; that of the most urgent request first."""
        return sorted(self._lanes, key=lambda lane: self._lanes[lane][0][0])

    def waiting(self, lane: Lane) -> int:
        return len(self._lanes.get(lane, ()))

    def first(self, lane: Lane, count: int) -> list[Held]:
        """Those to be decided next."""
        found = [held for _, held in self._lanes.get(lane, [])[:count]]
        longest = self._longest_waiting(lane) if self._turns[lane] >= TURNS_OF_OTHERS else None
        if longest is not None and found[0].order[0] == longest.order[0]:
            found = [longest, *(held for held in found if held is not longest)][:count]
        return found

    def had_its_turn(self, held: Held) -> None:
        """It goes to a worker."""
        lane = held.arrival.lane
        if held is self._longest_waiting(lane):
            self._turns[lane] = 0
        else:
            self._turns[lane] += 1
        self.remove(held)

    def _longest_waiting(self, lane: Lane) -> Held | None:
        """Of those that have waited for half of the time they may."""
        waiting = self._long_waiting.get(lane)
        while waiting:
            if waiting[0].waiting:
                return waiting[0]
            waiting.popleft()
        self._long_waiting.pop(lane, None)
        return None

    def drain(self) -> list[Held]:
        """Take everybody out, most urgent first."""
        entries = sorted(entry for entries in self._lanes.values() for entry in entries)
        self._lanes, self._tenants, self._expiries, self._long_waiting = {}, {}, [], {}
        self._turns.clear()
        self._depths.clear()
        return [held for _, held in entries]

    def add(self, held: Held) -> Held | None:
        """Queue the request. Returns whoever has to leave for it: None, another, or the newcomer itself."""
        policy = held.arrival.lane.config
        if self._depths[policy.name] >= policy.admission.max_queue:
            leaver = self._least_entitled(held)
            if leaver is held:
                return held
            self.remove(leaver)
        else:
            leaver = None
        self._sequence += 1
        arrival = held.arrival
        held.order = (arrival.parsed.priority, HOPEFUL, arrival.deadline, self._sequence)
        self._insert(held)
        heappush(self._expiries, ((held.held_since + held.expires_at) / 2, self._sequence, held))
        self._depths[policy.name] += 1
        self._tenants.setdefault(policy.name, Counter())[arrival.parsed.tenant] += 1
        return leaver

    def remove(self, held: Held) -> None:
        """It leaves, assigned or not."""
        held.waiting = False
        self._take_out(held)
        name, tenant = held.arrival.lane.config.name, held.arrival.parsed.tenant
        self._depths[name] -= 1
        tenants = self._tenants[name]
        tenants[tenant] -= 1
        if not tenants[tenant]:
            del tenants[tenant]
        if len(self._expiries) > 2 * len(self) + 64:
            self._expiries = [entry for entry in self._expiries if entry[2].waiting]
            heapify(self._expiries)

    def give_up_hope(self, held: Held) -> None:
        """Its deadline cannot be met any more: behind those whose can."""
        if held.order[1] == HOPEFUL:
            self._take_out(held)
            held.order = (held.order[0], HOPELESS, held.arrival.arrived_at, held.order[3])
            self._insert(held)

    def expired(self, now: float) -> list[Held]:
        """Those whose time in the queue is over; they are still to be removed."""
        over = []
        while self._expiries and (self._expiries[0][0] <= now or not self._expiries[0][2].waiting):
            _, number, held = heappop(self._expiries)
            if not held.waiting:
                continue
            if held.expires_at <= now:
                over.append(held)
            else:
                self._long_waiting.setdefault(held.arrival.lane, deque()).append(held)
                heappush(self._expiries, (held.expires_at, number, held))
        return over

    def next_expiry(self) -> float | None:
        """When `expired` has something to do."""
        while self._expiries and not self._expiries[0][2].waiting:
            heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def _insert(self, held: Held) -> None:
        insort(self._lanes.setdefault(held.arrival.lane, []), (held.order, held))

    def _take_out(self, held: Held) -> None:
        lane = held.arrival.lane
        entries = self._lanes[lane]
        del entries[bisect_left(entries, (held.order,))]
        if not entries:
            del self._lanes[lane]

    def _least_entitled(self, newcomer: Held) -> Held:
        policy = newcomer.arrival.lane.config.name
        queued = [
            entry for lane, entries in self._lanes.items() if lane.config.name == policy for entry in entries[-1:]
        ]
        if not queued:
            return newcomer
        last = max(queued)[1]
        if last.order[0] > newcomer.arrival.parsed.priority:
            return last
        tenants = self._tenants[policy]
        greediest, places = tenants.most_common(1)[0]
        if places <= tenants[newcomer.arrival.parsed.tenant] + 1:
            return newcomer
        theirs = [
            e
            for lane, es in self._lanes.items()
            if lane.config.name == policy
            for e in es
            if e[1].arrival.parsed.tenant == greediest
        ]
        latest = max(theirs)[1]
        return latest if latest.order[0] >= newcomer.arrival.parsed.priority else newcomer
