"""Every layout that engines were seen to send, and whatever else may come."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_events import engine_of, payloads, view_of_ids

from kvfleet_router.core.kvevents.wire import Cleared, Malformed, Removed, Stored, batch_time, decode

STORED: dict[str, Any] = {
    "type": "BlockStored",
    "block_hashes": [1, 2],
    "parent_block_hash": None,
    "token_ids": [10, 11, 12, 13],
    "block_size": 2,
    "lora_id": None,
}
NEWER = {
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [None, None],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
}
pack = msgspec.msgpack.encode


@pytest.mark.parametrize(
    "fields",
    [STORED, STORED | {"medium": "GPU"}, STORED | NEWER, STORED | NEWER | {"locality": "far", "session_id": [1]}],
)
@pytest.mark.parametrize(
    "batch",
    [lambda events: [1.5, events, 0], lambda events: [1.5, events], lambda events: {"ts": 1.5, "events": events}],
)
@pytest.mark.parametrize("as_array", [False, True])
def test_older_and_newer_layouts(fields: dict[str, Any], batch: Any, as_array: bool) -> None:
    event = list(fields.values()) if as_array else fields
    removed = ["BlockRemoved", [1]] if as_array else {"type": "BlockRemoved", "block_hashes": [1]}
    cleared = ["AllBlocksCleared"] if as_array else {"type": "AllBlocksCleared"}
    payload = pack(batch([cleared, event, removed]))
    events, malformed = decode(payload)
    assert malformed == 0
    first, stored, last = events
    assert isinstance(first, Cleared)
    assert isinstance(stored, Stored)
    assert isinstance(last, Removed)
    assert (stored.block_hashes, stored.token_ids, stored.block_size) == ([1, 2], [10, 11, 12, 13], 2)
    assert batch_time(payload) == 1.5


def test_hashes_may_be_whole() -> None:
    (event,) = decode(
        pack([0.0, [STORED | {"block_hashes": [b"a" * 32, b"b" * 32], "parent_block_hash": b"c" * 32}], 0])
    ).events
    assert isinstance(event, Stored)
    assert event.block_hashes == [b"a" * 32, b"b" * 32]


@pytest.mark.parametrize(
    "event",
    [
        {"type": "BlockMoved", "block_hashes": [1]},
        STORED | {"token_ids": [1, 2, 3]},
        STORED | {"token_ids": [-1, 2, 3, 4]},
        STORED | {"token_ids": ["a", 2, 3, 4]},
        STORED | {"block_size": 0},
        STORED | {"block_size": 2**40},
        STORED | {"block_hashes": [1.5, 2]},
        STORED | {"parent_block_hash": []},
        {"type": "BlockRemoved"},
        {},
        None,
        "BlockRemoved",
        ["BlockStored"],
        [[[]]],
    ],
)
def test_one_event_that_is_wrong_costs_no_other(event: Any) -> None:
    events, malformed = decode(pack([0.0, [STORED, event, {"type": "BlockRemoved", "block_hashes": [1]}], 0]))
    assert malformed == 1
    assert [type(one) for one in events] == [Stored, Removed]


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x93", pack("text"), pack([]), pack([1.0]), pack([None, [], 0]), pack({"events": 3}), b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff",
     b"\x93\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff"],
)  # fmt: skip
def test_what_is_no_batch_is_malformed(payload: bytes) -> None:
    with pytest.raises(Malformed):
        decode(payload)
    batch_time(payload)


@given(st.binary(max_size=200))
def test_any_bytes_are_survived(payload: bytes) -> None:
    view = view_of_ids_cached()
    engine = engine_of(view)
    engine.stream.heard(0, payload)


@given(st.integers(0, 40), st.integers(0, 255), st.integers(0, 2**20))
def test_any_change_of_a_recorded_batch_is_survived(batch: int, byte: int, place: int) -> None:
    recorded = payloads_cached()
    payload = bytearray(recorded[batch % len(recorded)][1])
    payload[place % len(payload)] = byte
    engine = engine_of(view_of_ids_cached())
    engine.stream.heard(0, bytes(payload))
    engine.reset()


_CACHED: list[Any] = []


def view_of_ids_cached() -> Any:
    if not _CACHED:
        _CACHED.append(view_of_ids())
    return _CACHED[0]


_PAYLOADS: list[tuple[int, bytes]] = []


def payloads_cached() -> list[tuple[int, bytes]]:
    if not _PAYLOADS:
        _PAYLOADS.extend(payloads("kv_events_all.jsonl"))
    return _PAYLOADS
