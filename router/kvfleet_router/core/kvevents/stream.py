"""The batches of one publisher (an engine, or a data-parallel rank of it) in their order. Sans-io.

Batches are numbered from 0, each once. A number left out is a gap: what happened to the cache in it is unknown. The last
10,000 or so can be asked for again (a replay), and a subscriber that begins late begins with that.

    STARTING ── replay from 0 ──► LIVE ── gap, or the connection broke ──► CATCHING_UP ── replay ──► LIVE
                                    └── the engine restarted: forget its cache, STARTING again

A replay to fill a gap begins with the batch last applied: only if the very same bytes come back it is the same engine still;
a restarted one counts from 0 again and may have reached the very numbers that are missing. Where a gap cannot be filled,
this worker's cache is forgotten and learned anew from what the publisher can still tell; no other worker is touched.

`complete` says that nothing can be in the cache that is not known: the stream was followed from batch 0 or from an
AllBlocksCleared on. Until then what is known is true, but may not be all.

The caller sends the replay that `wants_replay` names, and feeds what comes:  heard, replayed, replay_ended, connected.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from xxhash import xxh3_64_intdigest

from kvfleet_router.core.kvevents.wire import batch_time

MAX_WAITING_BATCHES = 8192
MAX_WAITING_BYTES = 64 * 1_048_576
"""Held back while a replay is under way; beyond it the oldest go, and are a gap again."""
MAX_REPLAYS = 4
"""In a row, without a batch applied from them, before what cannot be had is given up."""

STARTING, LIVE, CATCHING_UP = "starting", "live", "catching_up"
LOST, RESTARTED = "lost", "restarted"
"""Why a cache is forgotten: batches cannot be had any more; the engine began anew."""


class Sink(Protocol):
    """The view of a cache that the batches change."""

    def apply(self, payload: bytes) -> bool:
        """Take in a batch. Returns whether it told that the cache was cleared."""

    def reset(self) -> None:
        """What was known holds no more."""


class Counts:
    """What happened, over all publishers of a router."""

    __slots__ = ("batches", "gaps", "impossible", "repeated", "replays", "replays_failed", "resets", "restarts")

    def __init__(self) -> None:
        self.batches = 0
        self.repeated = 0
        """Batches that came a second time."""
        self.impossible = 0
        """Batches with a number that their publisher had not come to."""
        self.gaps = 0
        """Times that batches were missing."""
        self.replays = 0
        self.replays_failed = 0
        self.restarts = 0
        """Engines found to have begun anew."""
        self.resets = 0
        """Times a worker's cache had to be forgotten because a gap could not be filled."""


class Stream:
    def __init__(self, sink: Sink, counts: Counts, *, can_replay: bool) -> None:
        self.state = STARTING
        self.complete = False
        self.next = 0
        """The number expected next; what it says is only meant once a batch was applied or a replay told so."""
        self.wants_replay: int | None = None
        """Number to ask a replay from, until `replay_ended`; none: no replay is wanted."""
        self._sink = sink
        self._counts = counts
        self._can_replay = can_replay
        self.begun = False
        self._digest = 0
        self._time = 0.0
        self._waiting: deque[tuple[int, int, bytes]] = deque()  # (replays asked for by then, number, payload)
        self._waiting_bytes = 0
        self._verifying = False  # the replay under way has to begin with the batch applied last
        self._mismatch = ""  # why the replay under way does not continue what is known
        self._replays_in_vain = 0
        self._connected_again = False
        self._asked = 0
        if can_replay:
            self._ask(0)

    # -- in ---------------------------------------------------------------------------------------------------------------

    def heard(self, sequence: int, payload: bytes) -> None:
        """A batch was published."""
        if self.wants_replay is not None:
            self._hold(sequence, payload)
            return
        if not self.begun:
            if sequence and self._can_replay and self._replays_in_vain < MAX_REPLAYS:
                self._hold(sequence, payload)
                self._ask(0)
            else:
                self._begin(sequence, payload)
        elif sequence == self.next:
            self._apply(sequence, payload)
        elif sequence > self.next:
            self._counts.gaps += 1
            self._hold(sequence, payload)
            self._catch_up()
        elif batch_time(payload) <= self._time:
            self._counts.repeated += 1
        else:
            self._restarted(sequence, payload)

    def replayed(self, sequence: int, payload: bytes) -> None:
        """A batch came as part of the replay asked for."""
        if self.wants_replay is None or self._mismatch:
            return
        if self._verifying:
            self._verifying = False
            if sequence > self.next - 1:
                self._mismatch = LOST
            elif sequence != self.next - 1 or _digest(sequence, payload) != self._digest:
                self._mismatch = RESTARTED
        elif not self.begun:
            self._begin(sequence, payload)
        elif sequence == self.next:
            self._apply(sequence, payload)
        elif sequence > self.next:
            self._mismatch = LOST
        else:
            self._counts.repeated += 1

    def replay_ended(self, ok: bool) -> None:
        """The replay's end mark came; not ok: it did not come in time, or the publisher cannot be reached."""
        self._counts.replays += 1
        self._counts.replays_failed += not ok
        mismatch = self._mismatch or (RESTARTED if self._verifying and ok else "")
        asked_from, self.wants_replay = self.wants_replay, None
        self._verifying, self._mismatch = False, ""
        if ok and not mismatch:
            self._replays_in_vain = 0
            if not self.begun and asked_from == 0:
                self.begun = self.complete = True  # it has published nothing yet: its cache is empty
                self._sink.reset()
                self.next = 0
        elif ok:
            self._replays_in_vain += 1
            self._forget(mismatch)
            if self._replays_in_vain < MAX_REPLAYS:
                self._ask(0)
                return
        else:
            self._replays_in_vain += 1
            if self.begun:
                self._forget(LOST)
        self.state = LIVE
        if self._connected_again:
            self._connected_again = False
            self.connected()
        else:
            self._drain(replayed=ok)

    def connected(self) -> None:
        """The connection was made, or made again: batches may be missing, and the publisher may be another process. What waits
        came over the old one: it may be another's, and can be had again."""
        if not self._can_replay:
            return
        self._waiting.clear()
        self._waiting_bytes = self._replays_in_vain = 0
        if self.wants_replay is not None:
            self._connected_again = True
        elif self.begun:
            self._catch_up()
        else:
            self._ask(0)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _begin(self, sequence: int, payload: bytes) -> None:
        """The first batch known of."""
        self._sink.reset()
        self.begun = True
        self.complete = sequence == 0
        self.state = LIVE if self.wants_replay is None else self.state
        self._apply(sequence, payload)

    def _apply(self, sequence: int, payload: bytes) -> None:
        self._counts.batches += 1
        self.next = sequence + 1
        self._digest = _digest(sequence, payload)
        self._time = batch_time(payload)
        if self._sink.apply(payload):
            self.complete = True

    def _catch_up(self) -> None:
        """Ask for what is missing; without a replay, what was known is lost."""
        if not self._can_replay:
            self._forget(LOST)
            self._drain(replayed=False)
            return
        self.state = CATCHING_UP
        self._verifying = self.next > 0
        self._ask(max(self.next - 1, 0))

    def _restarted(self, sequence: int, payload: bytes) -> None:
        self._forget(RESTARTED)
        if sequence and self._can_replay:
            self._hold(sequence, payload)
            self._ask(0)
        else:
            self._begin(sequence, payload)

    def _ask(self, first: int) -> None:
        self._asked += 1
        self.wants_replay = first

    def _forget(self, cause: str) -> None:
        self._counts.restarts += cause == RESTARTED
        self._counts.resets += cause == LOST
        self._sink.reset()
        self.begun = self.complete = False
        self.state = STARTING

    def _hold(self, sequence: int, payload: bytes) -> None:
        waiting = self._waiting
        waiting.append((self._asked, sequence, payload))
        self._waiting_bytes += len(payload)
        while len(waiting) > MAX_WAITING_BATCHES or self._waiting_bytes > MAX_WAITING_BYTES:
            self._waiting_bytes -= len(waiting.popleft()[2])

    def _drain(self, *, replayed: bool) -> None:
        """What came meanwhile; stops where it leads to another replay. What came before a replay was asked for, and is beyond
        all that the publisher then told, was never published by it."""
        waiting, self._waiting = self._waiting, deque()
        self._waiting_bytes = 0
        asked = self._asked
        for heard_at, sequence, payload in waiting:
            if replayed and heard_at < asked and self.begun and sequence > self.next:
                self._counts.impossible += 1
            else:
                self.heard(sequence, payload)


def _digest(sequence: int, payload: bytes) -> int:
    return int(xxh3_64_intdigest(payload, sequence & 0xFFFFFFFFFFFFFFFF))
