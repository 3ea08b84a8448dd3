"""The shapes of request bodies, as far as routing reads them (parse.py): msgspec skips what is not named here.

A module of its own because msgspec builds its decoders from annotations, which compiled modules do not keep.
"""

from __future__ import annotations

import msgspec

Scalar = int | float | str | bool | None
NO_RAW = msgspec.Raw()


class StreamOptions(msgspec.Struct):
    include_usage: Scalar = None


class Body(msgspec.Struct):
    """Fields that every endpoint shares."""

    model: str | None = None
    stream: Scalar = None
    stream_options: StreamOptions | None = None
    max_tokens: Scalar = None
    n: Scalar = None
    priority: Scalar = None
    cache_salt: str | None = None
    kv_transfer_params: msgspec.Raw = NO_RAW


class Message(msgspec.Struct):
    role: str
    content: msgspec.Raw = NO_RAW
    tool_calls: msgspec.Raw = NO_RAW


class Chat(Body):
    messages: list[Message] = []
    max_completion_tokens: Scalar = None
    tools: msgspec.Raw = NO_RAW


class Completion(Body):
    prompt: str | list[str | int | list[int]] | None = None


class AnthropicMessages(Chat):
    system: msgspec.Raw = NO_RAW


class Other(Body):
    instructions: msgspec.Raw = NO_RAW
    input: msgspec.Raw = NO_RAW
    max_output_tokens: Scalar = None


class Part(msgspec.Struct):
    text: msgspec.Raw = NO_RAW


CHAT = msgspec.json.Decoder(Chat)
ANTHROPIC = msgspec.json.Decoder(AnthropicMessages)
COMPLETION = msgspec.json.Decoder(Completion)
OTHER = msgspec.json.Decoder(Other)
RAW_LIST = msgspec.json.Decoder(list[msgspec.Raw])
PART = msgspec.json.Decoder(Part)
