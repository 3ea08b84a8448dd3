"""What a router tells the other replicas, and what it makes of what they tell: sans-io, off every request's way.

    flush    every FLUSH_S: the messages to send now. Loads of workers where something happened since the last time, as they
             are now; every WHOLE_S all of them, so that whoever missed something or has just come knows; every PLACED_S
             the blocks that workers got to cache.
    hear     a message came, whatever it is: believed if it is well-formed, else counted.
    apply    the sum of what all others have in flight goes to the dispatcher: at once after a message, or when somebody
             has not been heard for EXPIRY_S and what it had in flight counts no more.

A request costs an entry in a set and, if it brings new blocks, a tuple in a list. All else depends on time alone.

A newcomer asks the replica that has been running longest for all the prefixes it knows, and gets them in small portions.
What is placed while nobody can be reached waits, up to MAX_BACKLOG_BLOCKS, and is told once others are heard again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import astuple
from math import inf

from kvfleet_router.core.dispatcher import Dispatcher
from kvfleet_router.core.shareduse import SharedUse, Usage
from kvfleet_router.core.sharewire import (
    EVERYONE,
    MAX_BLOCKS,
    MAX_LOADS,
    MAX_PLACED_BYTES,
    Body,
    Garbled,
    LoadRow,
    body_of,
    encode,
    head_of,
    packed,
    unpacked,
)
from kvfleet_router.core.worker import IDLE, Load

FLUSH_S = 0.004
PLACED_S = 0.05
WHOLE_S = 0.25
EXPIRY_S = 1.0
SETTLE_S = 1.2
"""After so long everybody who can be heard has been, and everybody hears: whoever lost the connection tries at least every second."""
UNNOTICED_S = 3.0
"""A dead connection is noticed within this time."""
ASK_AGAIN_S = 1.0
MAX_ASKED = 3
MAX_PEERS = 256
MAX_KNOWN_LOADS = 8192
"""Workers that one peer may speak of."""
MAX_PREFILLED_S = 600.0
"""Of one worker between two messages."""
MAX_BACKLOG_BLOCKS = 262_144
MAX_CAUGHT_UP_BLOCKS = 1_000_000
"""Of a newcomer: 8 MB told in portions of MAX_BLOCKS, the youngest blocks of each worker."""


BLOCK_BYTES = 8
ENTRY_BYTES = 16
"""More than what msgpack adds to a worker's name and its blocks."""


class _Peer:
    __slots__ = ("age_s", "from_its_start", "heard_at", "loads", "number", "prefilled_s", "worth_asking")

    def __init__(self) -> None:
        self.number = 0
        self.heard_at = 0.0
        self.age_s = 0.0
        self.from_its_start = False
        """Heard since it began."""
        self.loads: dict[str, Load] = {}
        self.prefilled_s: dict[str, float] = {}
        """By worker: prefill time ever spent, as last told."""
        self.worth_asking = True


class Sharing:
    def __init__(
        self, dispatcher: Dispatcher, *, clock: Callable[[], float], identity: int, usage: Usage | None = None
    ) -> None:
        """`identity`: a random number above 0, below 2^62, that no other replica has. `clock`: seconds, real ones. `usage`: API keys."""
        self._use = None if usage is None else SharedUse(usage)
        self.identity = identity
        self.ignored: Counter[str] = Counter()
        """Messages that were not believed, by cause."""
        self.missed = 0
        """Messages that never came, by the gaps in what came."""
        self.dropped_blocks = 0
        """Placed, but not told: more than MAX_BACKLOG_BLOCKS waited."""
        self._dispatcher = dispatcher
        self._clock = clock
        self._started_at = clock()
        self._peers: dict[int, _Peer] = {}
        self._number = 0
        self._whole_due = self._placed_due = self._started_at
        self._reachable_since: float | None = None
        self._first_reachable_at: float | None = None
        self._changed: set[str] = set()
        self._prefilled_s: dict[str, float] = {}
        self._version = -1
        self._new = dispatcher.replicas.share()
        self._backlog: deque[tuple[str, tuple[int, ...]]] = deque()
        self._backlog_blocks = 0
        self._told_placed: deque[tuple[float, list[tuple[str, bytes]]]] = deque()
        self._lost = 0
        """Peers that fell silent and may be heard again."""
        self._asked = 0
        self._asked_at = self._started_at
        self._caught_up = False
        self._newcomers: dict[int, Iterator[tuple[int, list[tuple[str, bytes]]]]] = {}

    @property
    def peers(self) -> int:
        """Other replicas that are heard."""
        return len(self._peers)

    @property
    def caught_up(self) -> bool:
        """Knows the prefixes that others knew when it came, as far as it could be told."""
        return self._caught_up

    # -- out ------------------------------------------------------------------------------------------------------------

    def flush(self, *, reachable: bool = True) -> list[bytes]:
        """What to send now. Not `reachable`: nobody would hear it."""
        now = self._clock()
        self._expire(now)
        self._take_placed()
        changed = self._dispatcher.replicas.changed_loads()
        if not reachable:
            if self._reachable_since is not None:
                self._tell_again(now)
            self._reachable_since = None
            return []
        if self._first_reachable_at is None:
            self._first_reachable_at = now
        if self._reachable_since is None:
            self._reachable_since = self._whole_due = now
            self._placed_due = now if now - self._started_at < SETTLE_S else now + SETTLE_S
        bodies: list[Body] = []
        if now >= self._whole_due:
            self._whole_due = now + WHOLE_S
            bodies += self._whole()
        elif changed:
            rows = {name: _row(load) for name, load in changed.items()}
            bodies += [Body(0, 0.0, part) for part in _parts(rows)]
        if self._use is not None:
            bodies += [Body(0, 0.0, used=used) for used in self._use.to_tell(now)]
        if self._backlog and now >= self._placed_due:
            self._placed_due = now + PLACED_S
            bodies.append(Body(0, 0.0, placed=self._next_placed(now)))
            if self._backlog:
                self._placed_due = now
        if not self._caught_up and (asked := self._whom_to_ask(now)):
            bodies.append(Body(0, 0.0, asks=asked))
        messages = [self._to_everyone(body, now) for body in bodies]
        if self._newcomers:
            messages.append(self._to_a_newcomer(now))
        return messages

    def leave(self) -> bytes:
        """The last message: what this router had in flight is over."""
        return self._to_everyone(Body(0, 0.0, leaving=True), self._clock())

    def _to_everyone(self, body: Body, now: float) -> bytes:
        self._number += 1
        body.number = self._number
        body.age_s = max(now - self._started_at, 0.0)
        return encode(self.identity, EVERYONE, body)

    def _whole(self) -> Iterator[Body]:
        """Everything in flight, as messages whose spans cover all names."""
        rows = {name: _row(load) for name, load in sorted(self._dispatcher.replicas.loads().items())}
        parts = _parts(rows) or [{}]
        first = ""
        for number, part in enumerate(parts):
            end = next(iter(parts[number + 1])) if number + 1 < len(parts) else ""
            yield Body(0, 0.0, part, (first, end))
            first = end

    def _take_placed(self) -> None:
        """From the dispatcher's list to the backlog, which is bounded."""
        for worker, blocks, new_from in self._new:
            new = tuple(blocks[new_from:])
            if self._backlog_blocks + len(new) > MAX_BACKLOG_BLOCKS:
                self.dropped_blocks += len(new)
            else:
                self._backlog.append((worker.name, new))
                self._backlog_blocks += len(new)
        self._new.clear()

    def _next_placed(self, now: float) -> list[tuple[str, bytes]]:
        """One message's worth of the backlog."""
        portion, blocks = _portion(self._backlog)
        self._backlog_blocks -= blocks
        self._told_placed.append((now, portion))
        while now - self._told_placed[0][0] > UNNOTICED_S:
            self._told_placed.popleft()
        return portion

    def _tell_again(self, now: float) -> None:
        """Somebody could not be reached; for some time before that was noticed, nobody may have heard."""
        for told_at, portion in self._told_placed:
            for name, data in portion if now - told_at <= UNNOTICED_S else ():
                blocks = tuple(unpacked(data))
                self._backlog.append((name, blocks))
                self._backlog_blocks += len(blocks)
        self._told_placed.clear()

    def _to_a_newcomer(self, now: float) -> bytes:
        """The next portion of what one of them asked for."""
        newcomer, portions = next(iter(self._newcomers.items()))
        left, placed = next(portions, (0, []))
        if not left:
            del self._newcomers[newcomer]
        return encode(self.identity, newcomer, Body(0, max(now - self._started_at, 0.0), placed=placed, left=left))

    # -- in -------------------------------------------------------------------------------------------------------------

    def hear(self, message: bytes) -> None:
        """Take a message from whoever sent it. `apply` afterwards."""
        try:
            head = head_of(message)
            if head.sender == self.identity or head.to not in (EVERYONE, self.identity):
                return
            body = body_of(message)
        except Garbled as error:
            self.ignored[error.cause] += 1
            return
        if head.to == EVERYONE:
            self._heard_of(head.sender, body)
        else:
            self._store(body)
            self._asked_at = self._clock()
            self._caught_up = self._caught_up or not body.left

    def _heard_of(self, sender: int, body: Body) -> None:
        peer = self._peers.get(sender)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                self.ignored["too_many_senders"] += 1
                return
            if not body.leaving:
                peer = self._peers[sender] = _Peer()
                peer.number = body.number - 1
                peer.from_its_start = body.age_s < SETTLE_S
                self._whole_due = -inf  # it may have come just now: do not let it wait
                if self._lost:  # one of them, most likely: nor let it miss what was told while it could not hear
                    self._lost -= 1
                    self._tell_again(self._clock())
            else:
                return
        if body.number <= peer.number:
            self.ignored["repeated"] += 1
            return
        self.missed += body.number - peer.number - 1
        peer.number, peer.age_s, peer.heard_at = body.number, body.age_s, self._clock()
        if body.leaving:
            self._forget(sender)
            return
        self._learn_loads(peer, body)
        self._store(body)
        if self._use is not None and body.used:
            self._use.hear(sender, body.used, from_its_start=peer.from_its_start)
        if body.asks == self.identity and len(self._newcomers) < MAX_PEERS:
            self._newcomers.setdefault(sender, self._everything_placed())

    def _learn_loads(self, peer: _Peer, body: Body) -> None:
        loads = peer.loads
        if body.span is not None:
            first, end = body.span
            gone = [name for name in loads if name >= first and (not end or name < end) and name not in body.loads]
            for name in gone:
                del loads[name]
            self._changed.update(gone)
        for name, row in body.loads.items():
            before = peer.prefilled_s.get(name)
            if before is None and len(peer.prefilled_s) >= MAX_KNOWN_LOADS:
                self.ignored["too_many_workers"] += 1
                continue
            peer.prefilled_s[name] = row[-1]
            if before is not None and row[-1] > before:
                self._prefilled_s[name] = self._prefilled_s.get(name, 0.0) + min(row[-1] - before, MAX_PREFILLED_S)
            if row[0]:
                loads[name] = Load(*row)
            else:
                loads.pop(name, None)
            self._changed.add(name)

    def _store(self, body: Body) -> None:
        for name, data in body.placed:
            worker = self._dispatcher.worker(name)
            if worker is not None:
                self._dispatcher.cache_stored(worker, unpacked(data))

    def _expire(self, now: float) -> None:
        silent = [sender for sender, peer in self._peers.items() if now - peer.heard_at > EXPIRY_S]
        for sender in silent:
            self._forget(sender)
        self._lost += len(silent)
        if silent:
            self.apply()

    def _forget(self, sender: int) -> None:
        self._changed.update(self._peers.pop(sender).loads)
        self._newcomers.pop(sender, None)
        if self._use is not None:
            self._use.forget(sender)

    def apply(self) -> None:
        """Let the dispatcher know what has changed."""
        version = self._dispatcher.fleet_version
        if version != self._version:  # workers came, perhaps some that others have spoken of before
            self._version = version
            self._changed.update(name for peer in self._peers.values() for name in peer.loads)
        if self._changed:
            self._dispatcher.replicas.told({name: self._elsewhere(name) for name in self._changed}, self._prefilled_s)
            self._changed.clear()
            self._prefilled_s.clear()

    def _elsewhere(self, name: str) -> Load:
        """What all peers together have on a worker. Summed anew each time: rounding cannot add up."""
        loads = [load for peer in self._peers.values() if (load := peer.loads.get(name)) is not None]
        if not loads:
            return IDLE
        return loads[0] if len(loads) == 1 else Load(*map(sum, zip(*map(_row, loads), strict=True)))

    # -- newcomers ------------------------------------------------------------------------------------------------------

    def _whom_to_ask(self, now: float) -> int:
        """The replica to be asked for its prefixes now; 0: none."""
        if self._asked and now - self._asked_at < ASK_AGAIN_S:
            return 0
        older = {
            sender: peer.age_s
            for sender, peer in self._peers.items()
            if peer.worth_asking and peer.age_s > now - self._started_at
        }
        listened_s = 0.0 if self._first_reachable_at is None else now - self._first_reachable_at
        if self._asked >= MAX_ASKED or (not older and listened_s > SETTLE_S):
            self._caught_up = True  # nobody is there who knows more, or who answers
            return 0
        if not older or listened_s < WHOLE_S:  # the oldest may not have spoken yet
            return 0
        sender = max(older, key=older.__getitem__)
        self._peers[sender].worth_asking = False
        self._asked += 1
        self._asked_at = now
        return sender

    def _everything_placed(self) -> Iterator[tuple[int, list[tuple[str, bytes]]]]:
        """(blocks left after it, portion): each worker's blocks, oldest first, as they are when asked for."""
        workers = self._dispatcher.workers()
        each = MAX_CAUGHT_UP_BLOCKS // max(len(workers), 1)
        known = deque((worker.name, run) for worker in workers for run in worker.cache.youngest(each))
        left = sum(len(run) for _, run in known)
        while known:
            portion, blocks = _portion(known)
            left -= blocks
            yield left, portion


def _portion(queue: deque[tuple[str, tuple[int, ...]]]) -> tuple[list[tuple[str, bytes]], int]:
    """One message's worth of a queue of (worker, consecutive blocks), taken off it; and how many blocks that is."""
    room, free_bytes = MAX_BLOCKS, MAX_PLACED_BYTES
    portion: list[tuple[str, bytes]] = []
    while queue and room:
        name, blocks = queue[0]
        free_bytes -= len(name.encode()) + ENTRY_BYTES
        part = blocks[: min(room, max(free_bytes, 0) // BLOCK_BYTES)]
        if not part:
            break
        if len(part) == len(blocks):
            queue.popleft()
        else:
            queue[0] = (name, blocks[len(part) :])
        portion.append((name, packed(part)))
        room -= len(part)
        free_bytes -= len(part) * BLOCK_BYTES
    return portion, MAX_BLOCKS - room


def _row(load: Load) -> LoadRow:
    in_flight, pending, decoding, *sums = astuple(load)
    prefill_s, uncached, context, kv, unindexed, prefilled_s = (max(value, 0.0) for value in sums)  # rounding
    return in_flight, pending, decoding, prefill_s, uncached, context, kv, unindexed, prefilled_s


def _parts(rows: dict[str, LoadRow]) -> list[dict[str, LoadRow]]:
    """In pieces that fit into a message."""
    if len(rows) <= MAX_LOADS:
        return [rows] if rows else []
    names = list(rows)
    return [{name: rows[name] for name in names[at : at + MAX_LOADS]} for at in range(0, len(names), MAX_LOADS)]
