"""Gaps, repetitions, restarts: whatever is lost on the way, what is known of a cache is true, and in the end whole."""

from __future__ import annotations

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_router.core.kvevents.stream import LIVE, Counts, Stream


class Cache:
    """A sink that remembers what it was told."""

    def __init__(self) -> None:
        self.applied: list[bytes] = []
        self.resets = 0

    def apply(self, payload: bytes) -> bool:
        self.applied.append(payload)
        return b"cleared" in payload

    def reset(self) -> None:
        self.applied = []
        self.resets += 1


class Publisher:
    """An engine's publisher: numbers from 0 at every start, the last `buffer` batches kept."""

    def __init__(self, buffer: int = 10_000) -> None:
        self.buffer = buffer
        self.batches: list[bytes] = []
        self.clock = 1000.0
        self.start = 0

    def publish(self, cleared: bool = False) -> tuple[int, bytes]:
        self.clock += 1.0
        events = ["cleared"] if cleared else []
        self.batches.append(msgspec.msgpack.encode([self.clock, events, self.start]))
        return len(self.batches) - 1, self.batches[-1]

    def restart(self) -> None:
        self.batches = []
        self.start += 1

    def answer(self, stream: Stream) -> None:
        """Serve the replay that the stream wants."""
        first = stream.wants_replay
        assert first is not None
        kept = max(len(self.batches) - self.buffer, 0)
        for number in range(max(first, kept), len(self.batches)):
            stream.replayed(number, self.batches[number])
        stream.replay_ended(ok=True)


def followed(publisher: Publisher, *, can_replay: bool = True) -> tuple[Stream, Cache, Counts]:
    cache, counts = Cache(), Counts()
    stream = Stream(cache, counts, can_replay=can_replay)
    while stream.wants_replay is not None:
        publisher.answer(stream)
    return stream, cache, counts


def test_a_late_subscriber_begins_with_all_that_is_kept() -> None:
    publisher = Publisher()
    for _ in range(5):
        publisher.publish()
    stream, cache, _ = followed(publisher)
    assert cache.applied == publisher.batches
    assert stream.complete
    assert stream.state == LIVE


def test_an_engine_that_has_said_nothing_yet_holds_nothing() -> None:
    stream, _, _ = followed(Publisher())
    assert stream.begun
    assert stream.complete


def test_a_history_cut_off_is_known_to_be_incomplete_until_the_cache_is_cleared() -> None:
    publisher = Publisher(buffer=2)
    for _ in range(5):
        publisher.publish()
    stream, cache, _ = followed(publisher)
    assert cache.applied == publisher.batches[3:]
    assert not stream.complete
    stream.heard(*publisher.publish(cleared=True))
    assert stream.complete


def test_a_gap_is_filled_and_what_came_meanwhile_waits() -> None:
    publisher = Publisher()
    stream, cache, counts = followed(publisher)
    stream.heard(*publisher.publish())
    publisher.publish()
    stream.heard(*publisher.publish())
    assert stream.wants_replay == 0  # it begins with the batch applied last
    stream.heard(*publisher.publish())
    assert len(cache.applied) == 1
    publisher.answer(stream)
    assert cache.applied == publisher.batches
    assert (counts.gaps, counts.resets, counts.restarts) == (1, 0, 0)


def test_a_gap_that_cannot_be_filled_forgets_this_cache() -> None:
    publisher = Publisher(buffer=1)
    stream, cache, counts = followed(publisher)
    stream.heard(*publisher.publish())
    for _ in range(3):
        late = publisher.publish()
    stream.heard(*late)
    while stream.wants_replay is not None:
        publisher.answer(stream)
    assert cache.applied == publisher.batches[-1:]
    assert not stream.complete
    assert counts.resets == 1


def test_without_a_replay_endpoint_a_gap_forgets_this_cache() -> None:
    publisher = Publisher()
    stream, cache, counts = followed(publisher, can_replay=False)
    stream.heard(*publisher.publish())
    assert stream.complete
    publisher.publish()
    stream.heard(*publisher.publish())
    assert cache.applied == publisher.batches[2:]
    assert not stream.complete
    assert (counts.gaps, counts.resets) == (1, 1)


def test_a_replay_that_fails_forgets_this_cache_and_goes_on() -> None:
    publisher = Publisher()
    stream, cache, counts = followed(publisher)
    stream.heard(*publisher.publish())
    publisher.publish()
    stream.heard(*publisher.publish())
    while stream.wants_replay is not None:
        stream.replay_ended(ok=False)
    assert cache.applied == publisher.batches[2:]
    assert stream.state == LIVE
    assert not stream.complete
    assert (counts.replays_failed, counts.resets) == (4, 1)


def test_repeated_batches_change_nothing() -> None:
    publisher = Publisher()
    stream, cache, counts = followed(publisher)
    for _ in range(3):
        stream.heard(*publisher.publish())
    for number, payload in enumerate(publisher.batches):
        stream.heard(number, payload)
    assert cache.applied == publisher.batches
    assert counts.repeated == 3


def test_a_restarted_engine_counts_from_zero_and_its_old_cache_is_gone() -> None:
    publisher = Publisher()
    stream, cache, counts = followed(publisher)
    for _ in range(3):
        stream.heard(*publisher.publish())
    publisher.restart()
    stream.heard(*publisher.publish())
    assert cache.applied == publisher.batches
    assert stream.complete
    assert counts.restarts == 1


def test_a_restarted_engine_is_found_though_it_reached_the_very_number_expected() -> None:
    publisher = Publisher()
    stream, cache, counts = followed(publisher)
    for _ in range(3):
        stream.heard(*publisher.publish())
    publisher.restart()
    for _ in range(3):
        publisher.publish()
    stream.connected()
    stream.heard(*publisher.publish())  # number 3: as if nothing had happened
    while stream.wants_replay is not None:
        publisher.answer(stream)
    assert cache.applied == publisher.batches
    assert stream.complete
    assert counts.restarts == 1


def test_a_restarted_engine_that_has_said_nothing_yet_is_found_when_connected() -> None:
    publisher = Publisher()
    stream, cache, _ = followed(publisher)
    stream.heard(*publisher.publish())
    publisher.restart()
    stream.connected()
    while stream.wants_replay is not None:
        publisher.answer(stream)
    assert cache.applied == []
    assert stream.complete


def test_what_waits_for_a_replay_is_bounded() -> None:
    publisher = Publisher()
    cache = Cache()
    stream = Stream(cache, Counts(), can_replay=True)
    for _ in range(20_000):
        stream.heard(*publisher.publish())
    assert len(stream._waiting) <= 8192
    while stream.wants_replay is not None:
        publisher.answer(stream)
    assert cache.applied == publisher.batches[-publisher.buffer :]


ACTIONS = st.lists(
    st.sampled_from(["publish", "publish", "lose", "repeat", "restart", "answer", "fail", "clear"]), max_size=60
)


@given(ACTIONS, st.integers(1, 40), st.integers(0, 2**16))
def test_whatever_happens_what_is_applied_is_a_tail_of_what_this_engine_published(
    actions: list[str], buffer: int, seed: int
) -> None:
    rng = random.Random(seed)
    publisher = Publisher(buffer)
    stream, cache, _ = followed(publisher)
    for action in actions:
        if action in ("publish", "clear"):
            stream.heard(*publisher.publish(cleared=action == "clear"))
        elif action == "lose":
            publisher.publish()
        elif action == "repeat" and publisher.batches:
            number = rng.randrange(len(publisher.batches))
            stream.heard(number, publisher.batches[number])
        elif action == "restart":
            publisher.restart()
            stream.connected()
        elif action == "answer" and stream.wants_replay is not None:
            publisher.answer(stream)
        elif action == "fail" and stream.wants_replay is not None:
            stream.replay_ended(ok=False)
    stream.connected()
    stream.heard(*publisher.publish())
    for _ in range(10):
        if stream.wants_replay is not None:
            publisher.answer(stream)
    assert stream.wants_replay is None
    assert cache.applied
    assert cache.applied == publisher.batches[-len(cache.applied) :]
    if buffer >= len(publisher.batches):
        assert stream.complete
    if stream.complete:
        cleared = max((place for place, payload in enumerate(publisher.batches) if b"cleared" in payload), default=0)
        assert len(cache.applied) >= len(publisher.batches) - cleared
