"""A batch of KV events, decoded from what vLLM publishes: msgpack, read in one typed pass.

Seen are four forms: the batch is an array [time, events, rank] or a map {ts, events, data_parallel_rank}, and each event a
map with a `type` or an array that begins with it (older engines, with fewer fields at the end). The typed decoder of the
common form is tried first; what it does not understand goes through `_leniently`, event by event, so that one event of a
kind yet unknown costs no other. Fields not named here are skipped.

What comes is not trusted: a wrong type, too many bytes, or tokens that do not fill the blocks make the batch or the event
Malformed; nothing else is raised.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, NamedTuple, cast

import msgspec
from msgspec import Meta, Struct

MAX_PAYLOAD_BYTES = 32 * 1_048_576
"""A batch of a step that stores a million tokens has some 5 MiB."""
MAX_BLOCK_TOKENS = 65_536

Hash = int | bytes
"""An engine's name of a block: 64 bits, or all 32 bytes where it is told to."""
_Token = Annotated[int, Meta(ge=0)]
_BlockTokens = Annotated[int, Meta(ge=1, le=MAX_BLOCK_TOKENS)]


class Malformed(ValueError):
    """No batch of KV events."""


class Stored(Struct, tag="BlockStored", gc=False):
    """Blocks of one chain that are full now, first to last."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[_Token]
    block_size: _BlockTokens
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    """What else than tokens names each block: adapter, images, cache salt."""
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class Removed(Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class Cleared(Struct, tag="AllBlocksCleared", gc=False):
    """Nothing is cached any more. Engines tell it with the first batch after the fact."""


class _StoredArray(Struct, tag="BlockStored", array_like=True, gc=False):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[_Token]
    block_size: _BlockTokens
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _RemovedArray(Struct, tag="BlockRemoved", array_like=True, gc=False):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class _ClearedArray(Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


Event = Stored | Removed | Cleared


class Batch(NamedTuple):
    events: list[Event]
    malformed: int
    """Events left out: of an unknown kind, or wrong in themselves."""


class _Batch(Struct, array_like=True, gc=False):
    ts: float
    events: list[Stored | Removed | Cleared]


class _BatchOfAny(Struct, array_like=True, gc=False):
    ts: float
    events: list[Any]


class _BatchMap(Struct, gc=False):
    ts: float
    events: list[Any]


_decode = msgspec.msgpack.Decoder(_Batch).decode
_LENIENT = (msgspec.msgpack.Decoder(_BatchOfAny), msgspec.msgpack.Decoder(_BatchMap))
_KINDS: dict[str, tuple[type, type]] = {
    "BlockStored": (Stored, _StoredArray),
    "BlockRemoved": (Removed, _RemovedArray),
    "AllBlocksCleared": (Cleared, _ClearedArray),
}
_WIRE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError)


def decode(payload: bytes) -> Batch:
    """The events of a batch, in order. Raises Malformed."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise Malformed(f"a batch of {len(payload)} bytes")
    try:
        events: list[Event] = _decode(payload).events
    except _WIRE_ERRORS:
        return _leniently(payload)
    sound = [event for event in events if type(event) is not Stored or _fills(event)]
    return Batch(sound, len(events) - len(sound))


def batch_time(payload: bytes) -> float:
    """When the engine made the batch (Unix time), 0 where it does not say: the rest is not decoded if it can be helped."""
    if (
        payload[1:2] == b"\xcb" and payload[0] & 0xF0 == 0x90 and len(payload) >= 10
    ):  # an array that begins with a float
        return float(_BIG_ENDIAN_DOUBLE.unpack_from(payload, 2)[0])
    for decoder in _TIMES:
        try:
            return float(decoder.decode(payload).ts)
        except _WIRE_ERRORS:
            continue
    return 0.0


class _Time(Struct, array_like=True, gc=False):
    ts: float


class _TimeMap(Struct, gc=False):
    ts: float


_TIMES = (msgspec.msgpack.Decoder(_Time), msgspec.msgpack.Decoder(_TimeMap))
_BIG_ENDIAN_DOUBLE = struct.Struct(">d")


def _leniently(payload: bytes) -> Batch:
    """Any form of batch, each event by itself."""
    raw: list[Any] | None = None
    problem = ""
    for decoder in _LENIENT:
        try:
            raw = decoder.decode(payload).events
            break
        except _WIRE_ERRORS as error:
            problem = str(error)
    if raw is None:
        raise Malformed(problem)
    events = [event for event in map(_event, raw) if event is not None]
    return Batch(events, len(raw) - len(events))


def _event(raw: Any) -> Event | None:
    """One event in either form; none where it is wrong or of no known kind."""
    if isinstance(raw, dict):
        kind, form = raw.get("type"), 0
    elif isinstance(raw, list) and raw:
        kind, form = raw[0], 1
    else:
        return None
    forms = _KINDS.get(kind) if isinstance(kind, str) else None
    if forms is None:
        return None
    try:
        event: Any = msgspec.convert(raw, forms[form])
    except (msgspec.ValidationError, RecursionError):
        return None
    if form:
        event = forms[0](*(getattr(event, name) for name in event.__struct_fields__))
    if isinstance(event, Stored) and not _fills(event):
        return None
    return cast(Event, event)


def _fills(event: Stored) -> bool:
    """Its tokens fill its blocks; or it names blocks alone, as offloading to a slower medium does."""
    tokens = len(event.token_ids)
    return tokens == len(event.block_hashes) * event.block_size or not tokens
