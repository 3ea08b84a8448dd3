"""What one replica places, all find cached; who comes late is told; and what is no message is counted and forgotten."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replicas import Replica, exchange, passes, replicas
from routing_fleet import request

from kvfleet_router.core import sharing as module
from kvfleet_router.core.dispatcher import Load
from kvfleet_router.core.sharewire import (
    EVERYONE,
    MAX_BLOCKS,
    MAX_MESSAGE_BYTES,
    Body,
    Garbled,
    body_of,
    encode,
    head_of,
    packed,
    unpacked,
)
from kvfleet_router.core.sharing import ASK_AGAIN_S, PLACED_S, SETTLE_S


def cached(replica, parsed):
    """Blocks of the prompt that each worker is believed to hold, by name."""
    held = {worker.cache.bit: worker.name for worker in replica.dispatcher.workers()}
    return {
        held[bit]: blocks
        for mask, blocks in replica.dispatcher._fleet.index.match(parsed.block_hashes)
        for bit in held
        if mask & bit
    }


def serve(replica, parsed):
    """A whole request; returns its worker."""
    ticket = replica.sent(parsed)
    replica.answer(ticket, ttft=0.0, seconds=0.0)
    return ticket.worker.name


def test_a_prompt_placed_by_one_is_cached_for_all():
    one, other, third = group = replicas(3, workers=4)
    worker = serve(one, request(2000, prefix=1))
    passes(PLACED_S, *group)
    for replica in (other, third):
        assert cached(replica, request(2000, prefix=1)) == {worker: 31}
        assert replica.sent(request(2000, prefix=1)).worker.name == worker


def test_only_new_blocks_are_told_and_they_extend_what_was():
    one, other = replicas(2, workers=1)
    serve(one, request(2000, prefix=1, tail=1))
    passes(PLACED_S, one, other)
    serve(one, request(2000, prefix=1, tail=2))
    one.now += PLACED_S
    told = [body_of(message) for message in one.sharing.flush()]
    assert [len(data) // 8 for body in told for _, data in body.placed] == [16]
    other.hear(*[encode(1, EVERYONE, body) for body in told])
    assert cached(other, request(2000, prefix=1, tail=2)) == {"pool-0": 31}


def test_one_that_joins_late_is_told_the_prefixes_by_the_oldest():
    one, other = replicas(2, workers=3)
    prompts = [request(6000, prefix=n) for n in range(60)]
    for n, prompt in enumerate(prompts):
        serve((one, other)[n % 2], prompt)
    passes(2.0, one, other)
    late = Replica(9, now=one.now, workers=3)
    passes(1.0, one, other, late)
    assert late.sharing.caught_up
    for prompt in prompts:
        assert cached(late, prompt) == cached(one, prompt) != {}


def test_a_router_that_hears_others_lists_all_blocks_from_the_beginning():
    one, other = replicas(2, workers=1)
    serve(one, request(2000, prefix=1))
    runs = one.dispatcher._fleet.index._runs
    assert len(runs.of_block) == len(one.dispatcher._fleet.index) > len(runs.blocks)
    assert other.dispatcher._fleet.index._runs._table


def test_the_order_of_eviction_is_told_too():
    one = Replica(1, workers=1)
    for n in range(5):
        serve(one, request(4000, prefix=n))
    one.now += SETTLE_S
    late = Replica(2, now=one.now, workers=1)
    passes(1.0, one, late)
    ages = [
        [block for run in replica.worker("pool-0").cache.youngest(10_000) for block in run[::-1]]
        for replica in (one, late)
    ]
    assert ages[0] == ages[1]
    assert len(ages[0]) == 5 * 62


def test_a_newcomer_asks_another_where_the_first_does_not_answer():
    one, other = replicas(2, workers=1)
    one.now -= 10  # the elder
    one.sharing._started_at -= 10
    serve(other, request(2000, prefix=1))
    passes(2.0, one, other)
    late = Replica(9, now=other.now, workers=1)
    one.now = other.now
    exchange(one, other, late)
    for _ in range(60):
        for replica in (one, other, late):
            replica.now += 0.05
        mute = [message for message in one.sharing.flush() if head_of(message).to == EVERYONE]
        heard = [*mute, *other.sharing.flush()]
        said = late.sharing.flush()
        late.hear(*heard)
        for replica in (one, other):
            replica.hear(*said, *heard)
    assert late.sharing.caught_up
    assert cached(late, request(2000, prefix=1)) == {"pool-0": 31}


def test_the_first_of_all_asks_nobody():
    one = Replica(1)
    passes(SETTLE_S + ASK_AGAIN_S, one)
    assert one.sharing.caught_up


def test_what_was_placed_while_nobody_could_be_reached_is_told_afterwards():
    one, other = replicas(2, workers=2)
    passes(2.0, one, other)
    prompts = [request(16_000, prefix=n) for n in range(40)]
    for prompt in prompts:
        serve(one, prompt)
        assert one.sharing.flush(reachable=False) == []
    passes(SETTLE_S + 0.5, one, other)
    for prompt in prompts:
        assert cached(other, prompt) == cached(one, prompt)
    assert one.sharing.dropped_blocks == 0


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_BACKLOG_BLOCKS", 100)
    one = Replica(1, workers=2)
    for n in range(10):
        serve(one, request(2000, prefix=n))
        one.sharing.flush(reachable=False)
    assert one.sharing.dropped_blocks == 310 - 93
    assert sum(len(blocks) for _, blocks in one.sharing._backlog) == 93


def test_messages_stay_within_their_size():
    one = Replica(1, workers=60)
    for n in range(400):
        serve(one, request(6000, prefix=n))
    messages = []
    while told := one.sharing.flush():
        messages += told
        one.now += PLACED_S
        if one.now > 110:
            break
    assert len(messages) > 9
    assert max(map(len, messages)) <= MAX_MESSAGE_BYTES
    assert sum(len(data) // 8 for message in messages for _, data in body_of(message).placed) == 400 * 93


GOOD = Body(1, 1.0, {"pool-0": (1, 1, 0, 0.1, 10.0, 0.0, 10.0, 0.0, 0.0)}, ("", ""), [("pool-0", packed([1, 2, 3]))])
HOSTILE = {
    "nothing": (b"", "malformed"),
    "another protocol": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "malformed"),
    "another version": (b"kvf\x02" + encode(7, EVERYONE, GOOD)[4:], "other_version"),
    "no body": (encode(7, EVERYONE, GOOD)[:20], "malformed"),
    "half a body": (encode(7, EVERYONE, GOOD)[:-9], "malformed"),
    "more after the body": (encode(7, EVERYONE, GOOD) + b"\x00", "malformed"),
    "too large": (encode(7, EVERYONE, GOOD) + bytes(MAX_MESSAGE_BYTES), "too_large"),
    "negative load": (encode(7, EVERYONE, Body(1, 1.0, {"w": (-1, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)})), "malformed"),
    "no number": (
        encode(7, EVERYONE, Body(1, 1.0, {"w": (1, 0, 0, float("nan"), 0.0, 0.0, 0.0, 0.0, 0.0)})),
        "malformed",
    ),
    "endless": (
        encode(7, EVERYONE, Body(1, 1.0, {"w": (1, 0, 0, float("inf"), 0.0, 0.0, 0.0, 0.0, 0.0)})),
        "malformed",
    ),
    "half a hash": (encode(7, EVERYONE, Body(1, 1.0, placed=[("pool-0", b"1234567")])), "malformed"),
    "too many blocks": (encode(7, EVERYONE, Body(1, 1.0, placed=[("p", bytes(8 * MAX_BLOCKS + 8))])), "too_large"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_are_counted_and_change_nothing(name):
    message, cause = HOSTILE[name]
    one = Replica(1, workers=1)
    one.hear(message)
    assert one.sharing.ignored == {cause: 1}
    assert (one.sharing.peers, one.elsewhere()) == (0, Load())


def test_repeated_and_late_messages_are_counted_and_change_nothing():
    one, other = replicas(2, workers=1)
    old = other.sharing.flush()
    ticket = other.sent(request(1000))
    one.hear(*old, *other.sharing.flush())
    other.answer(ticket)
    one.hear(*other.sharing.flush())
    assert one.elsewhere() == Load()
    one.hear(*old, *old)
    assert one.elsewhere() == Load()
    assert one.sharing.ignored["repeated"] == 2 * len(old)


def test_a_crowd_of_senders_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PEERS", 4)
    monkeypatch.setattr(module, "MAX_KNOWN_LOADS", 3)
    one = Replica(1, workers=1)
    row = (1, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for sender in range(10, 20):
        one.hear(encode(sender, EVERYONE, Body(1, 1.0, {f"w{n}": row for n in range(5)})))
    assert one.sharing.peers == 4
    assert one.sharing.ignored == {"too_many_senders": 6, "too_many_workers": 8}


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 255))
def test_garbled_bytes_never_raise(noise, place, byte):
    good = encode(7, EVERYONE, GOOD)
    flipped = bytearray(good)
    flipped[place % len(good)] = byte
    one = Replica(1, workers=1)
    one.hear(noise, good[:4] + noise, good[:20] + noise, bytes(flipped))
    assert one.sharing.peers <= 3


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_hashes_survive_the_wire(blocks):
    assert unpacked(packed(blocks)) == blocks


def test_garbled_says_why():
    with pytest.raises(Garbled, match="malformed"):
        head_of(b"x")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_all_agree_once_all_is_heard(seed):
    """Random requests at three replicas, a third of the messages lost or in the wrong order: soon after, every replica's
    view of the others is exactly what the others have."""
    draw = random.Random(seed)
    group = replicas(3, workers=3)
    running = []
    for number in range(150):
        replica = draw.choice(group)
        if running and draw.random() < 0.4:
            owner, ticket = running.pop(draw.randrange(len(running)))
            owner.answer(ticket, ttft=0.0, seconds=0.0)
        elif not isinstance(result := replica.submit(request(500, prefix=number % 20)), module.Iterator):
            running.append((replica, result)) if hasattr(result, "worker") else replica.dispatcher.cancel(result)
        for each in group:
            each.now += 0.01
        messages = [message for each in group for message in each.sharing.flush()]
        draw.shuffle(messages)
        for each in group:
            each.hear(*[message for message in messages if draw.random() < 0.66])
    passes(1.0, *group)
    for each in group:
        for worker in each.dispatcher.workers():
            others = [other.worker(worker.name).own for other in group if other is not each]
            assert worker.elsewhere.in_flight == sum(own.in_flight for own in others)
            assert worker.elsewhere.prefill_s == pytest.approx(sum(own.prefill_s for own in others))
            assert worker.elsewhere.kv_tokens == pytest.approx(sum(own.kv_tokens for own in others))


def test_a_prompt_in_flight_elsewhere_takes_its_room_once():
    """Its blocks are in this router's index as well: only what no index knows is counted beside them."""
    one, other = replicas(2, workers=1)
    other.sent(request(4000, prefix=1))
    passes(PLACED_S, one, other)
    mine, theirs = one.worker("pool-0"), other.worker("pool-0")
    assert mine.kv_free_tokens == pytest.approx(theirs.kv_free_tokens)
    assert mine.kv_used_tokens == pytest.approx(theirs.kv_used_tokens)


def test_a_newcomer_that_is_heard_late_asks_all_the_same():
    one = Replica(1, workers=1)
    serve(one, request(2000, prefix=1))
    passes(2.0, one)
    late = Replica(2, now=one.now, workers=1)
    for _ in range(60):  # its connection takes three seconds
        late.now += 0.05
        assert late.sharing.flush(reachable=False) == []
    assert not late.sharing.caught_up
    one.now = late.now
    passes(1.0, one, late)
    assert late.sharing.caught_up
    assert cached(late, request(2000, prefix=1)) == {"pool-0": 31}


def test_what_was_told_just_before_nobody_could_be_reached_is_told_again():
    one, other = replicas(2, workers=1)
    passes(2.0, one, other)
    serve(one, request(2000, prefix=1))
    one.now += PLACED_S
    assert one.sharing.flush(), "into a connection that is dead"
    one.now += 1.0
    assert one.sharing.flush(reachable=False) == []
    assert one.sharing._backlog_blocks == 31
    other.now = one.now
    passes(SETTLE_S + 0.2, one, other)
    assert cached(other, request(2000, prefix=1)) == {"pool-0": 31}
    assert one.sharing._backlog_blocks == 0
