"""Reads just enough of a request body to route it. (skeleton: signatures are final)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["chat", "completions", "other"]


class RequestError(Exception):
    """The request cannot be routed; carries what an OpenAI error body says."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",  # noqa: A002 - OpenAI's own field name
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code


@dataclass(slots=True)
class ParsedRequest:
    """What routing needs of a request. The simulator builds it directly, with `block_hashes` and `prompt_tokens` given."""

    kind: Kind
    model: str
    """Empty: the client named none."""
    stream: bool = False
    prompt: bytes = b""
    """The prompt's bytes in the engine's order (tools, then messages); emptied by the dispatcher once hashed."""
    prompt_bytes: int = 0
    """Length of the prompt. With given `block_hashes`: 4 bytes for each token."""
    prompt_tokens: int | None = None
    """Exact, where the request carries token ids (or a simulator knows)."""
    block_hashes: list[int] | None = None
    """Chained hashes of the whole blocks (`prefix.blockBytes` each) of the prompt, if known already."""
    max_output_tokens: int | None = None
    sequences: int = 1
    """Sequences the engine decodes for this request (`n` x prompts)."""
    priority: int = 0
    """Lower is more urgent, as in vLLM."""
    session_id: str | None = None
    tenant: str = ""
    cache_salt: str | None = None
    include_usage: bool = False
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    """Lower-case names."""


def read_request(
    path: str, body: bytes, headers: Mapping[bytes, bytes], *, max_body_bytes: int = 33_554_432
) -> ParsedRequest:
    """Parse a request. Raises RequestError and nothing else. `headers`: lower-case names."""
    raise NotImplementedError
