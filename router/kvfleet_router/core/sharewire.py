"""What router replicas tell each other, as bytes: small, versioned, and nothing in it is believed before it was checked.

    message = "kvf" version(1) sender(8) to(8)   then msgpack of Body

The head alone says whether a message is one's own, or for somebody else, so that most of what a shared channel carries costs
no decoding. `version` counts incompatible changes: replicas of another version are counted and ignored, which is what happens
half-way through an upgrade. Everything is bounded: a message by MAX_MESSAGE_BYTES, names, numbers and lists by their types.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, error, pack, unpack
from typing import Annotated, NamedTuple

import msgspec

VERSION = 1
EVERYONE = 0
"""As `to`."""
MAX_MESSAGE_BYTES = 61_440
"""Fits into one datagram of a Unix socket."""
MAX_LOADS = 160
"""Workers in one message."""
MAX_USED = 160
"""API keys in one message."""
MAX_BLOCKS = 4096
"""Block hashes in one message: 32 KiB."""
MAX_PLACED_BYTES = 49_152
"""Of block hashes with their workers' names in one message."""

_MAGIC = b"kvf"
_HEAD = Struct(">3sBQQ")

_Name = Annotated[str, msgspec.Meta(max_length=300)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Uptime = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Tokens = Annotated[float, msgspec.Meta(ge=0, le=1e10)]
_Total = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**62)]

LoadRow = tuple[_Count, _Count, _Count, _Seconds, _Tokens, _Tokens, _Tokens, _Tokens, _Uptime]
"""The fields of `Load`, in their order."""


class Garbled(ValueError):
    """Not a message of this version; `cause` is one of few words, to be counted by."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Head(NamedTuple):
    sender: int
    to: int


class Body(msgspec.Struct, array_like=True, omit_defaults=True):
    """Loads are absolute, never differences: a message that is lost or comes twice does no lasting harm."""

    number: _Number
    """Counts a sender's messages to everyone."""
    age_s: _Uptime
    """How long the sender has been running."""
    loads: Annotated[dict[_Name, LoadRow], msgspec.Meta(max_length=MAX_LOADS)] = {}
    span: tuple[_Name, _Name] | None = None
    """(from, up to, not including): of the workers whose names are in between, those not in `loads` have nothing. An empty
    end is no bound."""
    placed: Annotated[list[tuple[_Name, bytes]], msgspec.Meta(max_length=MAX_BLOCKS)] = []
    """(worker, hashes of consecutive blocks of a prompt, 8 bytes each) that the worker has cached now."""
    asks: _Number = 0
    """The replica that is asked for all the prefixes it knows, by a newcomer."""
    left: _Number = 0
    """Blocks still to come of what a newcomer asked for."""
    leaving: bool = False
    """The sender's last message."""
    used: Annotated[dict[_Name, tuple[_Total, _Total]], msgspec.Meta(max_length=MAX_USED)] = {}
    """By API key's name: requests and tokens it has used at the sender since that began. (Replicas that do not know of it ignore it.)"""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Body)


def encode(sender: int, to: int, body: Body) -> bytes:
    return _HEAD.pack(_MAGIC, VERSION, sender, to) + _encoder.encode(body)


def head_of(message: bytes) -> Head:
    """Who sent it, to whom. Raises Garbled."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise Garbled("too_large")
    try:
        magic, version, sender, to = _HEAD.unpack_from(message)
    except error:
        raise Garbled("malformed") from None
    if magic != _MAGIC:
        raise Garbled("malformed")
    if version != VERSION:
        raise Garbled("other_version")
    return Head(sender, to)


def body_of(message: bytes) -> Body:
    """What a message with a good head says. Raises Garbled."""
    try:
        body = _decoder.decode(memoryview(message)[_HEAD.size :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise Garbled("malformed") from None
    blocks = 0
    for _, packed in body.placed:
        blocks += len(packed) // 8
        if len(packed) % 8:
            raise Garbled("malformed")
    if blocks > MAX_BLOCKS:
        raise Garbled("too_large")
    return body


def packed(blocks: Sequence[int]) -> bytes:
    return pack(f">{len(blocks)}Q", *blocks)


def unpacked(data: bytes) -> list[int]:
    return list(unpack(f">{len(data) // 8}Q", data))
